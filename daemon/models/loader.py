"""One load, from a record to a running worker: memory, process, measurement; and its end.

Knows nothing of waiting requests or of models' states; the residency decides when to load. What a
load is to be is the business of `choice`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from backends.contract import (
    Artifact,
    LoadedModel,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
    Task,
)
from backends.registry import Registry
from daemon.catalog.record import Measurement, ModelRecord
from daemon.config import Models as ModelSettings
from daemon.errors import (
    EngineError,
    InsufficientMemory,
    InvalidRequest,
    LoadFailed,
    LoadTimeout,
    ModeldError,
    QueueFull,
    WorkerCrashed,
)
from daemon.memory.ledger import Ledger
from daemon.memory.measure import Use, private_bytes, worker_use
from daemon.models.choice import Choice, Measurements, Wish, described, files_key, settings_key
from daemon.models.conversations import Conversations
from daemon.models.resident import Instance
from daemon.store import Store, check_unchanged
from daemon.upstreams import Upstreams
from daemon.workers.prober import Probers
from daemon.workers.worker import Worker

# After these another backend is tried; what else goes wrong would go wrong with any.
_NEXT_MAY_DO = (
    LoadFailed,
    LoadTimeout,
    WorkerCrashed,
    EngineError,
    InsufficientMemory,
    InvalidRequest,
    QueueFull,
)
_MEASURE_S = 5.0
log = logging.getLogger(__name__)


class Room(Protocol):
    """Waits until a load may have memory. See Admission.room."""

    async def __call__(
        self, backend: str, ladder: list[MemoryEstimate], files: frozenset[str]
    ) -> MemoryEstimate:
        """Return which step of the ladder may be loaded by this backend, its memory booked."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How a load tells what it does: the worker, and progress from 0 to 1.

    `busy` returns how many other models compute at the moment; `room` books its memory.
    """

    started: Callable[[Worker], None]
    progress: Callable[[float], None]
    busy: Callable[[], int]
    room: Room


class Workers(Protocol):
    """Starts workers and measures them: real ones, but for tests of what happens around them."""

    async def start(self, backend_path: str, *, name: str, scratch: Path) -> Worker:
        """Start a worker for the backend at `module:Class`. Raises OSError."""
        ...

    async def use(self, worker: Worker, files: Mapping[str, str]) -> Use:
        """Return what a worker uses of RAM. `files` are its weights, by path, and their keys."""
        ...

    def private_bytes(self, worker: Worker) -> int:
        """Return the RAM of its own that a worker uses, at once."""
        ...


class RealWorkers:
    """See Workers."""

    start = staticmethod(Worker.start)

    @staticmethod
    async def use(worker: Worker, files: Mapping[str, str]) -> Use:
        """See Workers."""
        found = await asyncio.to_thread(worker_use, worker.pid, list(files))
        return Use(
            private_bytes=found.private_bytes,
            files={files[path]: size for path, size in found.files.items()},
        )

    @staticmethod
    def private_bytes(worker: Worker) -> int:
        """See Workers."""
        return private_bytes(worker.pid)


def _all_failed(record: ModelRecord, failures: list[tuple[str, ModeldError]]) -> ModeldError:
    """Return the error of a load that no backend could do.

    If all were refused alike, that is the error, with all that it says; and if one lacked nothing
    but memory, that is what to wait for.
    """
    first = failures[0][1]
    own = not isinstance(first, LoadFailed | WorkerCrashed)
    if own and all(type(error) is type(first) for _, error in failures):
        return first
    reasons = "; ".join(f"{name}: {error.message}" for name, error in failures)
    text = f"{record.unique} could not be loaded. {reasons}"
    for _, error in failures:
        if isinstance(error, InsufficientMemory) and error.retry_after_s is not None:
            return InsufficientMemory(text, retry_after_s=error.retry_after_s)
    return LoadFailed(text)


def mapped_files(artifact: Artifact) -> dict[str, str]:
    """Return the keys of the model's files, by path: the same for all links to one file."""
    keys = {}
    for file in artifact.files:
        path = os.path.realpath(file.path)
        try:
            facts = os.stat(path)
        except OSError:  # it went after it was checked: the load will say so
            continue
        keys[path] = f"{facts.st_dev}:{facts.st_ino}"
    return keys


class Loader:
    """Loads models with the best backend there is, or with the next best if that one fails."""

    def __init__(
        self,
        *,
        settings: ModelSettings,
        registry: Registry,
        probers: Probers,
        choice: Choice,
        measurements: Measurements,
        ledger: Ledger,
        store: Store,
        conversations: Conversations,
        upstreams: Upstreams,
        workers: Workers | None = None,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._probers = probers
        self._choice = choice
        self._measurements = measurements
        self._ledger = ledger
        self._store = store
        self._conversations = conversations
        self._upstreams = upstreams
        self._workers = workers or RealWorkers()

    async def load(self, record: ModelRecord, watch: Watch, wish: Wish) -> Instance:
        """Return a loaded instance of the model, its memory booked and measured.

        Raises ModelNotDownloaded, Conflict (files changed), BackendUnavailable,
        InsufficientMemory, LoadFailed, LoadTimeout. Nothing is left behind by a load that fails.
        """
        artifact = described(record)
        check_unchanged(artifact)
        failures: list[tuple[str, ModeldError]] = []
        for candidate in await self._choice.usable(record, artifact):
            try:
                instance = await self._load_with(candidate.backend, record, artifact, watch, wish)
            except _NEXT_MAY_DO as error:
                log.warning("model=%s backend=%s %s", record.unique, candidate.backend, error)
                failures.append((candidate.backend, error))
                if isinstance(error, LoadFailed | LoadTimeout | WorkerCrashed):
                    self._probers.doubt(candidate.backend)
            else:
                instance.passed_over = tuple(f"{name}: {e.message}" for name, e in failures)
                return instance
        raise _all_failed(record, failures)

    async def _load_with(
        self, backend: str, record: ModelRecord, artifact: Artifact, watch: Watch, wish: Wish
    ) -> Instance:
        options = await self._choice.options(record, backend, models=1 + watch.busy())
        ladder = await self._choice.ladder(backend, artifact, options, wish)
        files = mapped_files(artifact)
        estimate = await watch.room(backend, ladder, frozenset(files.values()))
        instance: Instance | None = None
        try:
            self._choice.taken[record.id] = estimate.gpu_parts
            instance = await self._started(
                backend, record, artifact, watch=watch, options=options, estimate=estimate
            )
            instance.reduced = _reduced(ladder[0], estimate)
            if use := await self.measure(instance):
                self._ledger.measured(record.id, use)
                self.remember(record.id, instance)
        except BaseException:
            if instance is not None:
                await self.give_back(record.id, instance, "the load was given up")
            self._ledger.release(record.id)
            raise
        finally:
            self._choice.taken.pop(record.id, None)
        log.info(
            "model=%s backend=%s pid=%d context_length=%d slots=%d estimate_bytes=%d "
            "measured_bytes=%d restored=%d seconds=%.2f",
            record.unique,
            backend,
            instance.worker.pid,
            instance.loaded.context_length,
            instance.loaded.slots,
            estimate.total_bytes,
            self._ledger.reservations[record.id].measured_bytes,
            len(instance.loaded.restored),
            instance.load_s,
        )
        return instance

    async def _started(
        self,
        backend: str,
        record: ModelRecord,
        artifact: Artifact,
        *,
        watch: Watch,
        options: LoadOptions,
        estimate: MemoryEstimate,
    ) -> Instance:
        """Return an instance in a worker of its own; nothing is left of one that fails."""
        scratch: Path | None = None
        worker: Worker | None = None
        loop = asyncio.get_running_loop()
        started = loop.time()
        shelf = None
        if hasattr(self._registry.classes[backend], "save_state"):
            version = await self._choice.version(backend)
            shelf = self._conversations.open(artifact, backend, version, estimate, options)
        try:
            scratch, worker = await self._start_worker(backend, record.unique)
            watch.started(worker)
            spec = LoadSpec(
                artifact=artifact,
                context_length=estimate.context_length,
                slots=estimate.slots,
                threads=options.threads,
                scratch_dir=str(scratch),
                placement=estimate.placement,
                engine=options.engine,
                upstream=self._upstreams.of(record),
                state_dir=str(shelf.folder) if shelf is not None else "",
                conversations=shelf.files() if shelf is not None else (),
            )
            loaded: LoadedModel = await worker.load(
                spec, timeout_s=self._settings.load_timeout_s, progress=watch.progress
            )
        except BaseException as error:
            if worker is not None:
                await worker.stop("the load was given up")
            if scratch is not None:
                self._store.drop_scratch(scratch)
            if isinstance(error, LoadFailed) and worker and (cause := worker.first_complaint()):
                raise LoadFailed(f"{error.message} The engine said: {cause}") from error
            raise
        if shelf is not None:
            shelf.used(loaded.restored)
        return Instance(
            worker=worker,
            loaded=loaded,
            artifact=artifact,
            scratch=scratch,
            backend=backend,
            options=options,
            estimate=estimate,
            load_s=loop.time() - started,
            idle_since=loop.time(),
            shelf=shelf,
        )

    async def _start_worker(self, backend: str, unique: str) -> tuple[Path, Worker]:
        """Return a worker that runs, and its private folder. Raises LoadFailed."""
        try:
            scratch = self._store.new_scratch()
        except OSError as error:
            raise LoadFailed(f"no folder could be made for its worker: {error}") from error
        try:
            path = self._registry.paths[backend]
            return scratch, await self._workers.start(path, name=unique, scratch=scratch)
        except OSError as error:
            self._store.drop_scratch(scratch)
            raise LoadFailed(f"its worker could not be started: {error}") from error

    async def measure(self, instance: Instance) -> Use | None:
        """Return what the instance's worker uses now, of RAM and of GPUs; None if that hangs."""
        try:
            async with asyncio.timeout(_MEASURE_S):
                files = mapped_files(instance.artifact)
                use = await self._workers.use(instance.worker, files)
                if not instance.estimate.gpu_parts:
                    return use
                return replace(use, gpus=await self._choice.gpu_use(instance.worker.pid))
        except TimeoutError:
            log.warning("model=%s its memory could not be measured in time", instance.worker.name)
            return None

    def private_bytes(self, worker: Worker) -> int:
        """Return the RAM of its own that a worker uses, at once."""
        return self._workers.private_bytes(worker)

    def remember(self, model_id: str, instance: Instance) -> None:
        """Keep the most that an instance was seen to use, for the next load's estimate."""
        booked = self._ledger.reservations.get(model_id)
        if booked is None:  # it has gone meanwhile
            return
        self._measurements.remember(
            Measurement(
                files=files_key(instance.artifact),
                backend=instance.backend,
                version=instance.loaded.engine_version,
                settings=settings_key(instance.estimate, instance.options),
                estimate_bytes=sum(
                    size for name, size in instance.estimate.parts.items() if name != "correction"
                ),
                peak_bytes=booked.measured_bytes,
                served=instance.served > 0,
                load_s=instance.load_s,
                seen_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )

    async def keep_conversations(
        self, instance: Instance, *, timeout_s: float, stopping: bool
    ) -> None:
        """Have the worker write its conversations down for the next load.

        Not when modeld is `stopping` and they would go with it. Raises ModeldError and OSError.
        """
        shelf = instance.shelf
        if shelf is None or (stopping and not self._conversations.outlive):
            return
        if Task.COMPLETE not in instance.loaded.tasks or not instance.alive:
            return  # what turns whole texts into vectors remembers none
        with shelf.saving() as folder:
            if (limit_bytes := shelf.room()) > 0:
                saved = await instance.worker.save_state(
                    folder, limit_bytes=limit_bytes, timeout_s=timeout_s
                )
                if saved:
                    await asyncio.to_thread(shelf.replace, instance.loaded.restored, saved, folder)

    async def give_back(self, model_id: str, instance: Instance, reason: str) -> None:
        """End the instance's process and return everything that it held."""
        await instance.worker.stop(reason)
        self._store.drop_scratch(instance.scratch)
        self._ledger.release(model_id)


def _reduced(wanted: MemoryEstimate, had: MemoryEstimate) -> str:
    """Say, for a person, what a model was loaded with less of for want of memory."""
    parts = []
    if had.context_length < wanted.context_length:
        parts.append(f"a context of {had.context_length} tokens instead of {wanted.context_length}")
    if had.slots < wanted.slots:
        parts.append(f"room for {had.slots} at once instead of {wanted.slots}")
    return f"for want of memory it has {' and '.join(parts)}" if parts else ""
