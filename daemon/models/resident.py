"""The states of one model in memory. Plain data: the manager makes every change."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from backends.contract import Artifact, LoadedModel
from daemon.workers.worker import Worker

_CRASH_WINDOW_S = 60.0
_FREE_CRASHES = 2
_LONGEST_DELAY_S = 30.0


class ModelState(StrEnum):
    """Where a model is. Busy is not a state: it is `in_flight > 0`."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


class Instance:
    """One loaded copy of a model: its worker, and the slots that requests take turns in.

    `passed_over` says why backends that were tried before this one could not load it.
    """

    def __init__(
        self, worker: Worker, loaded: LoadedModel, artifact: Artifact, scratch: Path
    ) -> None:
        self.worker = worker
        self.loaded = loaded
        self.artifact = artifact
        self.scratch = scratch
        self.slots = asyncio.Semaphore(loaded.slots)
        self.passed_over: tuple[str, ...] = ()
        self.running = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def alive(self) -> bool:
        """Whether the worker can still be asked."""
        return not self.worker.ended.done()


@dataclass(slots=True, kw_only=True, eq=False)
class Resident:
    """What is remembered of one model while the daemon runs.

    `in_flight` counts requests that hold the model, waiting ones included; `waiting` those that
    have no slot yet; `unloads` the unloads that were asked for. `crashes` holds the monotonic times
    of recent crashes and failed loads.
    """

    model_id: str
    unique: str
    state: ModelState = ModelState.UNLOADED
    instance: Instance | None = None
    backend: str = ""
    in_flight: int = 0
    waiting: int = 0
    unloads: int = 0
    progress: float = 0.0
    last_error: str = ""
    estimate_bytes: int = 0
    context_length: int = 0
    slots: int = 0
    load_task: asyncio.Task[None] | None = None
    unload_task: asyncio.Task[None] | None = None
    watch_task: asyncio.Task[None] | None = None
    loading_worker: Worker | None = None
    unload_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    crashes: deque[float] = field(default_factory=lambda: deque(maxlen=16))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """A model's state as the APIs show it. Bytes are of RAM."""

    state: ModelState = ModelState.UNLOADED
    backend: str = ""
    worker_pid: int | None = None
    in_flight: int = 0
    waiting: int = 0
    load_progress: float = 0.0
    pinned: bool = False
    estimate_bytes: int = 0
    reserved_bytes: int = 0
    measured_bytes: int = 0
    context_length: int = 0
    slots: int = 0
    last_error: str = ""
    passed_over: tuple[str, ...] = ()


def crash_delay(crashes: Sequence[float], now: float) -> float:
    """Return the seconds to wait before a model that crashed is loaded again. Pure.

    Nothing until the third crash within a minute, then 1, 2, 4 … up to 30 s after the last one.
    """
    recent = [crash for crash in crashes if now - crash < _CRASH_WINDOW_S]
    surplus = len(recent) - _FREE_CRASHES
    if surplus <= 0:
        return 0.0
    delay = min(_LONGEST_DELAY_S, 2.0 ** (surplus - 1))
    return max(0.0, recent[-1] + delay - now)
