"""One load, from a record to a running worker: backend choice, reservation, process, measurement.

Knows nothing of waiting requests or of models' states; the manager decides when to load.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from backends.contract import (
    Artifact,
    BackendError,
    Gpu,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
)
from backends.registry import Candidate, Registry
from daemon.catalog.record import ModelRecord
from daemon.config import Models as ModelSettings
from daemon.errors import (
    BackendUnavailable,
    EngineError,
    InsufficientMemory,
    InvalidRequest,
    LoadFailed,
    LoadTimeout,
    ModeldError,
    ModelNotDownloaded,
    QueueFull,
    WorkerCrashed,
)
from daemon.memory.ledger import Ledger
from daemon.memory.measure import worker_memory
from daemon.models.resident import Instance
from daemon.models.threads import threads
from daemon.store import Store, check_unchanged
from daemon.upstreams import Upstreams
from daemon.workers.machine import Machine
from daemon.workers.prober import Probers
from daemon.workers.worker import Worker, error_from

_PATIENCE_S = 3.0  # for engines that do not answer, once another one has
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
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How a load tells what it does: the chosen backend, the worker, and progress from 0 to 1.

    `busy` returns how many other models compute at the moment.
    """

    chosen: Callable[[str, MemoryEstimate], None]
    started: Callable[[Worker], None]
    progress: Callable[[float], None]
    busy: Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Every backend with its fit for one model, the best first.

    `chosen` is empty if none can run it; `fixed` says who settled the choice, if anybody did.
    """

    candidates: list[Candidate]
    chosen: str
    fixed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What a load of a model would be: its backend and why, its settings and its memory."""

    backend: str
    reason: str
    options: LoadOptions
    estimate: MemoryEstimate


def _described(record: ModelRecord) -> Artifact:
    """Return the model's files, with the chat template that the record has, if it has one.

    Raises ModelNotDownloaded.
    """
    if record.artifact is None:
        raise ModelNotDownloaded(
            f"{record.unique} is not downloaded: run `modeld pull {record.unique}` first"
        )
    if not record.chat_template:
        return record.artifact
    # An engine that reads the file's own template has to be told of the other one.
    metadata = record.artifact.metadata | {"modeld.chat_template": True}
    return replace(record.artifact, chat_template=record.chat_template, metadata=metadata)


def _all_failed(record: ModelRecord, failures: list[tuple[str, ModeldError]]) -> ModeldError:
    """Return the error of a load that no backend could do.

    If all were refused alike (for want of memory), that is the error, with all that it says.
    """
    first = failures[0][1]
    own = not isinstance(first, LoadFailed | WorkerCrashed)
    if own and all(type(error) is type(first) for _, error in failures):
        return first
    reasons = "; ".join(f"{name}: {error.message}" for name, error in failures)
    return LoadFailed(f"{record.unique} could not be loaded. {reasons}")


class Loader:
    """Loads models with the best backend there is, or with the next best if that one fails."""

    def __init__(
        self,
        *,
        settings: ModelSettings,
        registry: Registry,
        probers: Probers,
        machine: Machine,
        ledger: Ledger,
        store: Store,
        upstreams: Upstreams,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._probers = probers
        self._machine = machine
        self._ledger = ledger
        self._store = store
        self._upstreams = upstreams
        # Of the loads that go on: their memory is not yet missing from what a GPU says is free.
        self._on_gpus: dict[str, dict[str, dict[str, int]]] = {}

    async def load(self, record: ModelRecord, watch: Watch) -> Instance:
        """Return a loaded instance of the model, its memory booked and measured.

        Raises ModelNotDownloaded, Conflict (files changed), BackendUnavailable,
        InsufficientMemory, LoadFailed, LoadTimeout. Nothing is left behind by a load that fails.
        """
        artifact = _described(record)
        check_unchanged(artifact)
        failures: list[tuple[str, ModeldError]] = []
        for candidate in await self._usable(record, artifact):
            try:
                instance = await self._load_with(candidate.backend, record, artifact, watch)
            except _NEXT_MAY_DO as error:
                log.warning("model=%s backend=%s %s", record.unique, candidate.backend, error)
                failures.append((candidate.backend, error))
                if isinstance(error, LoadFailed | LoadTimeout | WorkerCrashed):
                    self._probers.doubt(candidate.backend)
            else:
                instance.passed_over = tuple(f"{name}: {e.message}" for name, e in failures)
                return instance
        raise _all_failed(record, failures)

    async def explain(self, record: ModelRecord) -> Explanation:
        """Say what each backend makes of the model, and which one a load would take.

        Raises ModelNotDownloaded.
        """
        fixed, by = self._fixed(record)
        ranked = await self._ranked(_described(record))
        usable = [c for c in ranked if c.fit.score > 0 and fixed in ("", c.backend)]
        return Explanation(
            candidates=ranked,
            chosen=usable[0].backend if usable else "",
            fixed=f"{by} asks for {fixed}" if fixed else "",
        )

    def _fixed(self, record: ModelRecord) -> tuple[str, str]:
        """Return the backend that the model or the settings ask for, and which of them does."""
        if record.backend:
            return record.backend, "the model"
        return self._settings.backend, "[models] backend"

    async def plan(self, record: ModelRecord) -> Planned:
        """Say what a load of the model would be if nothing else ran. Starts and books nothing.

        Raises ModelNotDownloaded, BackendUnavailable, InvalidRequest.
        """
        artifact = _described(record)
        candidate = (await self._usable(record, artifact))[0]
        options = await self._options(record, candidate.backend, models=1, afresh=False)
        return Planned(
            backend=candidate.backend,
            reason=candidate.fit.reason,
            options=options,
            estimate=self._estimate(candidate.backend, artifact, options),
        )

    async def _ranked(self, artifact: Artifact, fixed: str = "") -> list[Candidate]:
        names = [fixed] if fixed in self._registry.classes else None
        probes = await self._probers.ask(
            names or self._registry.for_format(artifact.format), patience_s=_PATIENCE_S
        )
        return self._registry.rank(artifact, probes, await self._machine.look(afresh=False))

    async def _usable(self, record: ModelRecord, artifact: Artifact) -> list[Candidate]:
        """Return the backends that can run the model, the best first, or only the fixed one.

        Raises BackendUnavailable with every backend's reason.
        """
        fixed, by = self._fixed(record)
        if fixed and fixed not in self._registry.paths:
            names = ", ".join(sorted(self._registry.paths))
            raise BackendUnavailable(f"{by} asks for the backend {fixed!r}; there are {names}")
        ranked = [c for c in await self._ranked(artifact, fixed) if fixed in ("", c.backend)]
        usable = [candidate for candidate in ranked if candidate.fit.score > 0]
        if not usable:
            reasons = "; ".join(f"{c.backend}: {c.fit.reason}" for c in ranked)
            raise BackendUnavailable(f"no backend can run this model here. {reasons}")
        return usable

    async def _options(
        self, record: ModelRecord, backend: str, *, models: int, afresh: bool = True
    ) -> LoadOptions:
        """Return the settings of a load beside which `models`, itself included, compute."""
        probes = await self._probers.ask([backend])
        hardware = await self._machine.look(afresh=afresh)
        vendors = probes[backend].gpu_vendors
        return LoadOptions(
            context_length=self._settings.context_length or None,
            slots=self._settings.slots or None,
            threads=threads(hardware.physical_cores, models, background=record.background),
            gpus=tuple(self._left_of(gpu) for gpu in hardware.gpus if gpu.vendor in vendors),
            engine=dict(record.options),
        )

    def _left_of(self, gpu: Gpu) -> Gpu:
        if gpu.free_bytes is None:
            return gpu
        parts = [on_gpus.get(gpu.id, {}) for on_gpus in self._on_gpus.values()]
        taken = sum(sum(part.values()) for part in parts)
        return replace(gpu, free_bytes=max(0, gpu.free_bytes - taken))

    def _estimate(self, backend: str, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        try:
            return self._registry.classes[backend].estimate(artifact, options)
        except BackendError as error:
            raise error_from(error.code, error.message) from error
        except Exception as error:  # a plugin's fault costs itself alone
            raise LoadFailed(f"its estimate failed: {type(error).__name__}: {error}") from error

    async def _load_with(
        self, backend: str, record: ModelRecord, artifact: Artifact, watch: Watch
    ) -> Instance:
        options = await self._options(record, backend, models=1 + watch.busy())
        estimate = self._estimate(backend, artifact, options)
        self._ledger.reserve(record.id, record.unique, estimate.total_bytes)
        self._on_gpus[record.id] = estimate.gpu_parts
        watch.chosen(backend, estimate)
        scratch: Path | None = None
        worker: Worker | None = None
        try:
            started = time.monotonic()
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
            )
            loaded = await worker.load(
                spec, timeout_s=self._settings.load_timeout_s, progress=watch.progress
            )
            instance = Instance(worker, loaded, artifact, scratch)
            measured = await self.measure(instance)
            self._ledger.measured(record.id, measured)
        except BaseException as error:
            if worker is not None:
                await worker.stop("the load was given up")
            if scratch is not None:
                self._store.drop_scratch(scratch)
            self._ledger.release(record.id)
            if isinstance(error, LoadFailed) and worker and (cause := worker.first_complaint()):
                raise LoadFailed(f"{error.message} The engine said: {cause}") from error
            raise
        finally:
            self._on_gpus.pop(record.id, None)
        log.info(
            "model=%s backend=%s pid=%d estimate_bytes=%d measured_bytes=%d seconds=%.2f",
            record.unique,
            backend,
            worker.pid,
            estimate.total_bytes,
            measured,
            time.monotonic() - started,
        )
        return instance

    async def _start_worker(self, backend: str, unique: str) -> tuple[Path, Worker]:
        """Return a worker that runs, and its private folder. Raises LoadFailed."""
        try:
            scratch = self._store.new_scratch()
        except OSError as error:
            raise LoadFailed(f"no folder could be made for its worker: {error}") from error
        try:
            path = self._registry.paths[backend]
            return scratch, await Worker.start(path, name=unique, scratch=scratch)
        except OSError as error:
            self._store.drop_scratch(scratch)
            raise LoadFailed(f"its worker could not be started: {error}") from error

    async def measure(self, instance: Instance) -> int:
        """Return the bytes of RAM that the instance's worker uses now."""
        files = [os.path.realpath(file.path) for file in instance.artifact.files]
        return await asyncio.to_thread(worker_memory, instance.worker.pid, files)

    async def give_back(self, model_id: str, instance: Instance, reason: str) -> None:
        """End the instance's process and return everything that it held."""
        await instance.worker.stop(reason)
        self._store.drop_scratch(instance.scratch)
        self._ledger.release(model_id)
