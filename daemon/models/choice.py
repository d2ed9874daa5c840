"""What a load of a model would be: which backend, which settings, how much memory, and what less.

Owns every choice that is made before a load. Starts no worker and books nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from backends.contract import (
    Artifact,
    BackendError,
    Gpu,
    LoadOptions,
    MemoryEstimate,
)
from backends.registry import Candidate, Registry
from daemon.catalog.record import Measurement, ModelRecord
from daemon.config import Models as ModelSettings
from daemon.errors import BackendUnavailable, LoadFailed, ModelNotDownloaded
from daemon.models.correction import corrected
from daemon.models.threads import threads
from daemon.workers.machine import Machine
from daemon.workers.prober import Probers
from daemon.workers.worker import error_from

_PATIENCE_S = 3.0  # for engines that do not answer, once another one has
# Below this a conversation hardly begins; one that needs more has the model loaded anew.
_SHORTEST_CONTEXT = 1024


class Measurements(Protocol):
    """Where it is kept what loads were seen to use."""

    def measurements(self, files: str, backend: str, version: str) -> list[Measurement]:
        """Return what loads of these files by this version of a backend used."""
        ...

    def remember(self, measurement: Measurement) -> None:
        """Keep a measurement, in place of one with the same settings."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The context that a load should have, and the least that will do, in tokens; 0: as usual."""

    context_length: int = 0
    least: int = 0


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
    """What a load of a model would be: its backend and why, its settings and its memory.

    `smaller` are loads that would do for want of memory, the best first. `measured` says whether
    the estimate rests on an earlier load with the same settings.
    """

    backend: str
    reason: str
    options: LoadOptions
    estimate: MemoryEstimate
    smaller: tuple[MemoryEstimate, ...] = ()
    measured: bool = False


def described(record: ModelRecord) -> Artifact:
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


def files_key(artifact: Artifact) -> str:
    """Return a text that is the same for the same bytes of model, whatever they are called."""
    digest = hashlib.sha256()
    for file in artifact.files:
        digest.update(f"{file.role} {file.sha256}\n".encode())
    return digest.hexdigest()[:32]


def settings_key(estimate: MemoryEstimate, options: LoadOptions) -> str:
    """Return a text for the settings that a load's memory depends on."""
    return msgspec.json.encode(
        {
            "context_length": estimate.context_length,
            "slots": estimate.slots,
            "threads": options.threads,
            "gpu_layers": estimate.placement.layers,
            "engine": dict(sorted(options.engine.items())),
        }
    ).decode()


class Choice:
    """Settles what loads are to be. What was measured goes before what is computed.

    `taken` is what loads that go on will take of GPUs, in bytes by model id, `Gpu.id` and purpose:
    it is not yet missing from what these say is free.
    """

    def __init__(
        self,
        *,
        settings: ModelSettings,
        registry: Registry,
        probers: Probers,
        machine: Machine,
        measurements: Measurements,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._probers = probers
        self._machine = machine
        self._measurements = measurements
        self.taken: dict[str, dict[str, dict[str, int]]] = {}
        self._about: dict[str, tuple[tuple[Artifact, dict[str, Any]], int]] = {}

    async def explain(self, record: ModelRecord) -> Explanation:
        """Say what each backend makes of the model, and which one a load would take.

        Raises ModelNotDownloaded.
        """
        fixed, by = self._fixed(record)
        ranked = await self._ranked(described(record))
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

    async def plan(
        self, record: ModelRecord, artifact: Artifact, *, context_length: int = 0, slots: int = 0
    ) -> Planned:
        """Say what a load of `artifact`, the files of `record`, would be if nothing else ran.

        0 leaves a setting to modeld. Raises BackendUnavailable, InvalidRequest.
        """
        candidate = (await self.usable(record, artifact))[0]
        options = await self.options(record, candidate.backend, models=1, afresh=False)
        options = replace(
            options,
            context_length=context_length or options.context_length,
            slots=slots or options.slots,
        )
        past = await self._past(candidate.backend, artifact)
        ladder = self._ladder(candidate.backend, artifact, options, Wish(), past)
        return Planned(
            backend=candidate.backend,
            reason=candidate.fit.reason,
            options=options,
            estimate=ladder[0],
            smaller=tuple(ladder[1:]),
            measured=any(
                each.served and each.settings == settings_key(ladder[0], options) for each in past
            ),
        )

    def about(self, record: ModelRecord) -> int:
        """Return about how many bytes of RAM a load would take, 0 if that is not known.

        Asks nobody, so that long listings can have it: as if the first backend that reads the
        format ran it, on the CPU.
        """
        if record.artifact is None:
            return record.ram_bytes
        known = self._about.get(record.id)
        if known is not None and known[0] == (record.artifact, record.options):
            return known[1]
        options = LoadOptions(
            context_length=self._settings.context_length or None,
            slots=self._settings.slots or None,
            threads=self._machine.known.physical_cores,
            engine=dict(record.options),
        )
        size = 0
        for name in self._registry.for_format(record.artifact.format):
            with contextlib.suppress(Exception):  # one that can't is no reason to show nothing
                estimate = self._registry.classes[name].estimate(record.artifact, options)
                size = estimate.total_bytes
                break
        self._about[record.id] = (record.artifact, record.options), size
        return size

    async def _ranked(self, artifact: Artifact, fixed: str = "") -> list[Candidate]:
        names = [fixed] if fixed in self._registry.classes else None
        probes = await self._probers.ask(
            names or self._registry.for_format(artifact.format), patience_s=_PATIENCE_S
        )
        return self._registry.rank(artifact, probes, await self._machine.look(afresh=False))

    async def usable(self, record: ModelRecord, artifact: Artifact) -> list[Candidate]:
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

    async def options(
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
        gone = sum(sum(parts.get(gpu.id, {}).values()) for parts in self.taken.values())
        return replace(gpu, free_bytes=max(0, gpu.free_bytes - gone))

    async def ladder(
        self, backend: str, artifact: Artifact, options: LoadOptions, wish: Wish
    ) -> list[MemoryEstimate]:
        """Return what the model could be loaded with, the best first, for want of memory less.

        First fewer slots, then a shorter context; what `options` fixes stays, and so does the least
        that `wish` needs. Raises ModeldError if it can't be loaded at all.
        """
        return self._ladder(backend, artifact, options, wish, await self._past(backend, artifact))

    def _ladder(
        self,
        backend: str,
        artifact: Artifact,
        options: LoadOptions,
        wish: Wish,
        past: Sequence[Measurement],
    ) -> list[MemoryEstimate]:
        fixed_context, fixed_slots = options.context_length, options.slots
        if wish.context_length:
            longer = max(wish.context_length, fixed_context or 0)
            options = replace(options, context_length=longer)
        best = self._estimate(backend, artifact, options, past)
        steps = [best]
        slots, context_length = best.slots, best.context_length
        least = max(wish.least, fixed_context or min(_SHORTEST_CONTEXT, context_length))
        while True:
            if slots > 1 and fixed_slots is None:
                slots //= 2
            elif context_length > least:
                context_length = max(least, context_length // 2)
            else:
                return steps
            smaller = replace(options, slots=slots, context_length=context_length)
            step = self._estimate(backend, artifact, smaller, past)
            if step.total_bytes < steps[-1].total_bytes:
                steps.append(step)

    def _estimate(
        self,
        backend: str,
        artifact: Artifact,
        options: LoadOptions,
        past: Sequence[Measurement],
    ) -> MemoryEstimate:
        try:
            estimate = self._registry.classes[backend].estimate(artifact, options)
        except BackendError as error:
            raise error_from(error.code, error.message) from error
        except Exception as error:  # a plugin's fault costs itself alone
            raise LoadFailed(f"its estimate failed: {type(error).__name__}: {error}") from error
        return corrected(estimate, settings_key(estimate, options), past)

    async def _past(self, backend: str, artifact: Artifact) -> list[Measurement]:
        """Return what earlier loads of the same files and engine were seen to use."""
        return self._measurements.measurements(
            files_key(artifact), backend, await self.version(backend)
        )

    async def gpu_use(self, pid: int) -> dict[str, int]:
        """Return what a process has of GPUs' own memory now, by `Gpu.id`."""
        return await self._machine.gpu_use(pid)

    async def version(self, backend: str) -> str:
        """Return the version of a backend's engine."""
        return (await self._probers.ask([backend]))[backend].version
