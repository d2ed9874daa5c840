"""The states of one model in memory. Plain data: the manager makes every change."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from backends.contract import Artifact, LoadedModel, LoadOptions, MemoryEstimate
from daemon.catalog.record import ModelRecord
from daemon.errors import ModeldError
from daemon.models.conversations import Shelf
from daemon.models.turns import LOAD, Queue, Ticket
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


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(slots=True, kw_only=True, eq=False)
class Instance:
    """One loaded copy of a model: its worker, and the requests that run in its slots.

    `reduced` says, for a person, what it was loaded with less of for want of memory. `passed_over`
    says why backends that were tried before this one could not load it. `shelf` is where its
    conversations are kept, if anywhere. `served` counts the requests that have ended, and `quiet`
    is set while none runs; `idle_since` and `measured_at`, when its memory was last measured, are
    on the loop's clock. `explicit`: it was loaded for its own sake. `keep_alive_s` is what the last
    request that said so wants; None if none did.
    """

    worker: Worker
    loaded: LoadedModel
    artifact: Artifact
    scratch: Path
    backend: str
    options: LoadOptions
    estimate: MemoryEstimate
    load_s: float
    shelf: Shelf | None = None
    reduced: str = ""
    passed_over: tuple[str, ...] = ()
    running: set[Ticket] = field(default_factory=set)
    quiet: asyncio.Event = field(default_factory=_set_event)
    served: int = 0
    idle_since: float = 0.0
    measured_at: float = 0.0
    explicit: bool = False
    keep_alive_s: float | None = None

    @property
    def alive(self) -> bool:
        """Whether the worker can still be asked."""
        return not self.worker.ended.done()

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return len(self.running) < self.loaded.slots

    @property
    def context_length(self) -> int:
        """The context that it was to be loaded with, which some engines can't give in full."""
        return max(self.loaded.context_length, self.estimate.context_length)


@dataclass(slots=True, kw_only=True, eq=False)
class Resident:
    """What is remembered of one model while the daemon runs. Times are the event loop's.

    `unique`, `pinned` and `keep_alive` are those of its record.
    `queue` has the requests that wait; `between` counts those that are neither there nor running.
    `drain_before` is the number of a ticket of another model that waits for this one's memory:
    later ones than that do not run before it. `pardoned` are answers that take so long that this is
    not heeded as long as one of them runs. `wish` is the context that the next load should have, 0
    for the usual one; `needs` the least that the load which goes on was begun for. `carried` is
    what of an instance the next one takes over when it is loaded anew. `deadline` is when the
    present state must have ended. `given_up` is why a load that goes on is not wanted any more.
    `crashes` holds the times of recent crashes and failed loads.
    """

    model_id: str
    unique: str
    state: ModelState = ModelState.UNLOADED
    queue: Queue = field(default_factory=Queue)
    between: int = 0
    instance: Instance | None = None
    backend: str = ""
    progress: float = 0.0
    last_error: str = ""
    estimate_bytes: int = 0
    context_length: int = 0
    slots: int = 0
    drain_before: int | None = None
    pardoned: set[Ticket] = field(default_factory=set)
    pardon: asyncio.TimerHandle | None = None
    wish: int = 0
    needs: int = 0
    carried: tuple[bool, float | None] = (False, None)
    pinned: bool = False
    keep_alive: str = ""
    expiry: asyncio.TimerHandle | None = None
    deadline: float = math.inf
    load_s: float = 1.0
    load_task: asyncio.Task[None] | None = None
    unload_task: asyncio.Task[None] | None = None
    watch_task: asyncio.Task[None] | None = None
    loading_worker: Worker | None = None
    given_up: ModeldError | None = None
    unload_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    crashes: deque[float] = field(default_factory=lambda: deque(maxlen=16))

    def follow(self, record: ModelRecord) -> None:
        """Take over what is kept of the model's record."""
        self.unique, self.pinned, self.keep_alive = record.unique, record.pinned, record.keep_alive

    @property
    def running(self) -> int:
        """How many requests the engine works on."""
        return len(self.instance.running) if self.instance is not None else 0

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        return self.between + sum(1 for ticket in self.queue if ticket.kind != LOAD)

    @property
    def in_flight(self) -> int:
        """How many requests hold the model."""
        return self.running + self.waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """A model's state as the APIs show it. Bytes are of RAM.

    `load_s` is how long its load took. `unloads_in_s` is how long it stays if nobody asks it
    anything; None: until it has to make room.
    `waits_for` says what a load waits for, if it does.
    """

    state: ModelState = ModelState.UNLOADED
    backend: str = ""
    worker_pid: int | None = None
    in_flight: int = 0
    waiting: int = 0
    load_progress: float = 0.0
    load_s: float = 0.0
    estimate_bytes: int = 0
    reserved_bytes: int = 0
    measured_bytes: int = 0
    context_length: int = 0
    slots: int = 0
    unloads_in_s: float | None = None
    waits_for: str = ""
    reduced: str = ""
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
