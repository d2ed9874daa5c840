"""Downloads that the disk had no room for: when to go on with them.

Owns how much room each needs, and how often to look; pauses and resumes nothing itself.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterable

from daemon.downloads.job import Job, Paused
from daemon.downloads.publish import DISK_MARGIN_BYTES
from daemon.downloads.unfinished import missing_bytes
from daemon.store import Store

_LOOK_S = 5.0
_MOST_S = 300.0


class Room:
    """Looks whether there is room for those of the jobs that wait for some, and calls `go_on`."""

    def __init__(
        self, store: Store, jobs: Callable[[], Iterable[Job]], go_on: Callable[[str], None]
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._go_on = go_on
        self._timer: asyncio.TimerHandle | None = None

    def refused(self, job: Job) -> None:
        """Take note that there was no room for a job.

        What is free is not always what may be taken (quotas, reserves): one that is refused again
        and again, without getting on, waits longer each time.
        """
        job.not_before = time.monotonic() + min(_MOST_S, _LOOK_S * 2**job.refusals)
        job.refusals += 1

    def look(self) -> None:
        """Have those go on that there is room for now; look again in a while if any are left."""
        self.close()
        free = shutil.disk_usage(self._store.root).free
        waiting = [job for job in self._jobs() if job.active and job.paused is Paused.DISK]
        for job in sorted(waiting, key=lambda job: job.place):
            needed = self._needed(job)
            if free >= needed and time.monotonic() >= job.not_before:
                free -= needed
                self._go_on(job.model_id)
        if waiting:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self.look)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _needed(self, job: Job) -> int:
        """Return the free bytes that the rest of a job takes, as far as that is known."""
        needed = DISK_MARGIN_BYTES
        for file in job.files:
            if not file.key:  # no unfinished file was kept
                needed += file.total_bytes
            elif file.done_bytes < file.total_bytes:
                needed += missing_bytes(self._store.partials / file.key, file.total_bytes)
        return needed
