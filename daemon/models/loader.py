"""One load, from a record to a running worker: backend choice, reservation, process, measurement.

Knows nothing of waiting requests or of models' states; the manager decides when to load.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backends.contract import (
    Artifact,
    BackendError,
    Hardware,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
)
from backends.registry import Candidate, Registry
from daemon.catalog.record import ModelRecord
from daemon.config import Models as ModelSettings
from daemon.errors import (
    BackendUnavailable,
    InvalidRequest,
    LoadFailed,
    ModelNotDownloaded,
    WorkerCrashed,
)
from daemon.memory.ledger import Ledger
from daemon.memory.measure import worker_memory
from daemon.models.resident import Instance
from daemon.store import Store, check_unchanged
from daemon.workers.prober import Probers
from daemon.workers.worker import Worker, error_from

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How a load tells what it does: the chosen backend, the worker, and progress from 0 to 1."""

    chosen: Callable[[str, MemoryEstimate], None]
    started: Callable[[Worker], None]
    progress: Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Every backend with its fit for one model, the best first.

    `chosen` is empty if none can run it; `fixed` says who settled the choice, if anybody did.
    """

    candidates: list[Candidate]
    chosen: str
    fixed: str


class Loader:
    """Loads models with the best backend there is, or with the next best if that one fails."""

    def __init__(
        self,
        *,
        settings: ModelSettings,
        registry: Registry,
        probers: Probers,
        hardware: Hardware,
        ledger: Ledger,
        store: Store,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._probers = probers
        self._hardware = hardware
        self._ledger = ledger
        self._store = store

    async def load(self, record: ModelRecord, watch: Watch) -> Instance:
        """Return a loaded instance of the model, its memory booked and measured.

        Raises ModelNotDownloaded, Conflict (files changed), BackendUnavailable,
        InsufficientMemory, LoadFailed, LoadTimeout. Nothing is left behind by a load that fails.
        """
        if record.artifact is None:
            raise ModelNotDownloaded(
                f"{record.unique} is not downloaded: run `modeld pull {record.unique}` first"
            )
        check_unchanged(record.artifact)
        failures = []
        for candidate in await self._usable(record, record.artifact):
            try:
                return await self._load_with(candidate.backend, record, record.artifact, watch)
            except (LoadFailed, WorkerCrashed, InvalidRequest) as error:
                log.warning("model=%s backend=%s %s", record.unique, candidate.backend, error)
                failures.append(f"{candidate.backend}: {error.message}")
        raise LoadFailed(f"{record.unique} could not be loaded. {'; '.join(failures)}")

    async def explain(self, record: ModelRecord) -> Explanation:
        """Say what each backend makes of the model, and which one a load would take.

        Raises ModelNotDownloaded.
        """
        if record.artifact is None:
            raise ModelNotDownloaded(
                f"{record.unique} is not downloaded, so its file can't be looked at: run "
                f"`modeld pull {record.unique}` first"
            )
        fixed, by = self._fixed(record)
        ranked = await self._ranked(record.artifact)
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

    async def _ranked(self, artifact: Artifact) -> list[Candidate]:
        probes = await self._probers.ask(self._registry.for_format(artifact.format))
        return self._registry.rank(artifact, probes, self._hardware)

    async def _usable(self, record: ModelRecord, artifact: Artifact) -> list[Candidate]:
        """Return the backends that can run the model, the best first, or only the fixed one.

        Raises BackendUnavailable with every backend's reason.
        """
        fixed, by = self._fixed(record)
        if fixed and fixed not in self._registry.paths:
            names = ", ".join(sorted(self._registry.paths))
            raise BackendUnavailable(f"{by} asks for the backend {fixed!r}; there are {names}")
        ranked = [c for c in await self._ranked(artifact) if fixed in ("", c.backend)]
        usable = [candidate for candidate in ranked if candidate.fit.score > 0]
        if not usable:
            reasons = "; ".join(f"{c.backend}: {c.fit.reason}" for c in ranked)
            raise BackendUnavailable(f"no backend can run this model here. {reasons}")
        return usable

    def _options(self, record: ModelRecord) -> LoadOptions:
        return LoadOptions(
            context_length=self._settings.context_length or None,
            slots=self._settings.slots or None,
            threads=self._hardware.physical_cores,
            engine=dict(record.options),
        )

    async def _load_with(
        self, backend: str, record: ModelRecord, artifact: Artifact, watch: Watch
    ) -> Instance:
        options = self._options(record)
        try:
            estimate = self._registry.classes[backend].estimate(artifact, options)
        except BackendError as error:
            raise error_from(error.code, error.message) from error
        self._ledger.reserve(record.id, record.unique, estimate.total_bytes)
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
