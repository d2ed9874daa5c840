"""One download of one model: its state, and how far it is."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum

from msgspec import structs

from daemon.downloads.messages import FileProgress, Progress
from daemon.workers.child import Child

_RATE_S = 5.0  # over about so long the rate is an average


class JobState(StrEnum):
    """Where a download is."""

    QUEUED = "queued"
    RUNNING = "running"
    VERIFYING = "verifying"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"


class Paused(StrEnum):
    """Why a queued download does not begin: somebody paused it, or the disk is full."""

    NO = ""
    USER = "user"
    DISK = "disk"


class Priority(StrEnum):
    """Which of the downloads that wait begins first; those of one priority by age."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


ACTIVE = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.VERIFYING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a watcher is told: `percentage` is below 100 until the model can be loaded."""

    state: JobState
    percentage: float
    initial: bool = False


class Rate:
    """Bytes a second, an average that forgets. `clock` is in seconds."""

    def __init__(self) -> None:
        self._seen: tuple[float, int] | None = None
        self.bytes_per_s = 0.0

    def see(self, done_bytes: int, now: float) -> None:
        """Take note of what is here. What was here before the first time is not counted."""
        if self._seen is None:
            if done_bytes:
                self._seen = now, done_bytes
            return
        then, before = self._seen
        if (passed_s := now - then) < 0.1:
            return
        share = min(1.0, passed_s / _RATE_S) if self.bytes_per_s else 1.0
        self.bytes_per_s += share * ((done_bytes - before) / passed_s - self.bytes_per_s)
        self._seen = now, done_bytes


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One download of one model. Times are in seconds since the epoch.

    `owed` counts the clients that asked for it and have not opened a socket to hear of it since.
    `why` is what ends its fetcher before its time (QUEUED: this daemon ends), and `ending` is
    whether that is too late: what it brought is being taken over. `began` is whether anything was
    ever here of it. `refusals` counts how often in a row the disk had no room for it, and
    `not_before` is when to look again, in seconds of time.monotonic; `falls` counts how often in a
    row its fetcher was killed.
    `waiting` is what it waits for, in words, `note` what happened that a person should know.
    """

    model_id: str
    unique: str
    number: int
    priority: Priority = Priority.NORMAL
    state: JobState = JobState.QUEUED
    paused: Paused = Paused.NO
    done_bytes: int = 0
    total_bytes: int = 0
    files: tuple[FileProgress, ...] = ()
    waiting: str = ""
    note: str = ""
    error: str = ""
    error_code: str = ""
    created: float = field(default_factory=time.time)
    ended: float = 0.0
    owed: int = 0
    task: asyncio.Task[None] | None = None
    child: Child | None = None
    why: JobState | Paused | None = None
    ending: bool = False
    began: bool = False
    refusals: int = 0
    not_before: float = 0.0
    falls: int = 0
    rate: Rate = field(default_factory=Rate)
    shown_percentage: float = 0.0

    @property
    def active(self) -> bool:
        """Whether it still goes on, or will."""
        return self.state in ACTIVE

    @property
    def percentage(self) -> float:
        """How much is here, from 0 to 100; 100 only when all is verified and in place."""
        if self.state is JobState.COMPLETED:
            return 100.0
        share = self.done_bytes / self.total_bytes if self.total_bytes else 0.0
        self.shown_percentage = max(self.shown_percentage, round(min(99.9, 100 * share), 2))
        return self.shown_percentage

    @property
    def eta_s(self) -> float | None:
        """How long it will take at this rate, in seconds; None if nobody knows."""
        rate = self.rate.bytes_per_s
        if self.state is not JobState.RUNNING or not self.total_bytes or rate < 1:
            return None
        return max(0.0, (self.total_bytes - self.done_bytes) / rate)

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among those that wait; the least begins first."""
        return list(Priority).index(self.priority), self.number

    def see(self, message: Progress) -> None:
        """Take note of what its fetcher says."""
        if message.done_bytes > self.done_bytes:
            self.done_bytes = message.done_bytes
            self.refusals = self.falls = 0  # it gets on
        self.total_bytes = message.total_bytes
        if message.files:  # or else it does not know yet which there are
            before = {file.name: file.done_bytes for file in self.files}
            self.files = tuple(_no_less(file, before.get(file.name, 0)) for file in message.files)
        self.waiting = message.waiting
        self.note = message.note or self.note
        self.rate.see(self.done_bytes, time.monotonic())
        if message.verifying:
            self.state = JobState.VERIFYING


def _no_less(file: FileProgress, done_bytes: int) -> FileProgress:
    """Return how far a file is, which is no less than it was: an earlier fetcher had more of it."""
    most = file.total_bytes or done_bytes
    return structs.replace(file, done_bytes=max(file.done_bytes, min(done_bytes, most)))
