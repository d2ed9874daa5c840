"""Who hears of downloads: clients that watch one model's, and parts of the daemon that hear all."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator

from daemon.downloads.job import ACTIVE, Job, Update

_TELL_LATECOMERS_S = 30.0


class Watcher:
    """What one client has yet to be told, oldest first.

    Progress that was not read yet is replaced by newer progress: a slow reader costs no memory.
    Progress that is none is not told.
    """

    def __init__(self) -> None:
        self._told: Update | None = None
        self._pending: list[Update] = []
        self._more = asyncio.Event()

    def tell(self, update: Update) -> None:
        """Add an update."""
        if self._is_progress(update):
            if update == self._told:
                return
            if self._pending and self._is_progress(self._pending[-1]):
                self._pending.pop()
        self._told = update
        self._pending.append(update)
        self._more.set()

    @staticmethod
    def _is_progress(update: Update) -> bool:
        return update.state in ACTIVE and not update.initial

    async def updates(self) -> AsyncIterator[Update]:
        """Yield updates for ever, across downloads of the same model."""
        while True:
            await self._more.wait()
            self._more.clear()
            pending, self._pending = self._pending, []
            for update in pending:
                yield update


class Audience:
    """All who hear of downloads. Must be used on the event loop's thread."""

    def __init__(self) -> None:
        self._watchers: dict[str, list[Watcher]] = {}
        self._listeners: list[Callable[[Job], None]] = []

    def tell(self, job: Job, *, initial: bool = False) -> None:
        """Tell everybody how a job stands; `initial` is its beginning."""
        for watcher in self._watchers.get(job.model_id, ()):
            watcher.tell(Update(state=job.state, percentage=job.percentage, initial=initial))
        for listener in list(self._listeners):
            listener(job)

    @contextlib.contextmanager
    def watch(self, model_id: str, job: Job | None) -> Iterator[Watcher]:
        """Hear of a model's downloads; `job` is the last one.

        Clients open their socket after they asked for the download; one that is quick has ended by
        then, so its end is told to as many latecomers as there were clients that asked. (One that
        had its socket open before may be told twice: once there, once when it comes back.)
        """
        watcher = Watcher()
        self._watchers.setdefault(model_id, []).append(watcher)
        if job is not None and (job.active or _is_owed(job)):
            job.owed = max(0, job.owed - 1)
            watcher.tell(Update(state=job.state, percentage=job.percentage))
        try:
            yield watcher
        finally:
            self._watchers[model_id].remove(watcher)

    def listen(self, listener: Callable[[Job], None]) -> Callable[[], None]:
        """Call `listener` with every job that changes; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)


def _is_owed(job: Job) -> bool:
    return job.owed > 0 and time.time() - job.ended < _TELL_LATECOMERS_S
