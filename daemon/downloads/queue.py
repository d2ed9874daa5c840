"""The queue of downloads: which jobs run, and what becomes of each when its fetcher ends.

Owns how many run at once and the bandwidth that they share. How one runs is `fetching`, how jobs
stand is the `book`, and when one goes on that the disk had no room for is `room`.
"""

from __future__ import annotations

import asyncio
import logging

from backends import wire
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.config import Downloads as DownloadSettings
from daemon.downloads import messages
from daemon.downloads.book import Book
from daemon.downloads.fetching import End, Killed, fetch
from daemon.downloads.job import Job, JobState, Paused
from daemon.downloads.room import Room
from daemon.errors import InsufficientDisk
from daemon.store import Store

_MOST_FALLS = 3  # kills of a fetcher in a row, without a byte in between, that are made good
log = logging.getLogger(__name__)


class Queue:
    """Runs the jobs of the book. Must be used on the event loop's thread.

    `memory_bytes` is what models may take here.
    """

    def __init__(
        self,
        settings: DownloadSettings,
        catalog: Catalog,
        store: Store,
        book: Book,
        *,
        memory_bytes: int,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._book = book
        self._memory_bytes = memory_bytes
        self.room = Room(store, book.all, self.resume)
        self.bytes_per_s = settings.bandwidth_bytes_per_s()

    def limit(self, bytes_per_s: int) -> None:
        """Let all that run use so much together from now on; 0 is all there is."""
        self.bytes_per_s = bytes_per_s
        self._share_bandwidth()

    def begin(self) -> None:
        """Begin as many of the jobs that wait as may run."""
        jobs = self._book.all()
        waiting = [
            job
            for job in jobs
            if job.state is JobState.QUEUED and not job.paused and job.task is None
        ]
        running = sum(1 for job in jobs if job.task is not None)
        for job in sorted(waiting, key=lambda job: job.place):
            if self._book.closing or running >= self._settings.max_active:
                return
            running += 1
            job.why, job.ending = None, False
            job.task = asyncio.create_task(self._run(job))

    def resume(self, model_id: str) -> None:
        """Go on with a job that is paused. Raises Conflict if there is none that is not over."""
        job = self._book.active(model_id)
        if isinstance(job.why, Paused):  # its fetcher ends just now: it will begin again at once
            job.why = Paused.NO
        if job.paused:
            job.error, job.error_code = "", ""
            self._book.wait(job)
        self.begin()

    async def interrupt(self, job: Job, why: JobState | Paused) -> None:
        """End the job's fetcher, if it has one, and wait until it is gone.

        What it has brought already is taken over nonetheless. `why` is how the job is to stand
        then; QUEUED ends it for this daemon alone: the next one goes on with it.
        """
        task = job.task
        if task is None or task.done():
            return
        if job.why is None:
            job.why = why
            # Before its first step it would not even end; while it ends, that would be cut short.
            if job.state is not JobState.QUEUED and not job.ending:
                task.cancel()
        elif job.why is not JobState.CANCELED and not self._book.closing:
            job.why = why
        await asyncio.wait([task])

    async def _run(self, job: Job) -> None:
        # None: it was interrupted, perhaps before this began
        last = await self._fetch(job) if job.why is None else None
        job.ending = True
        # Before the end is told: the next download of this model uses the same folder.
        await asyncio.to_thread(self._store.drop_work, job.model_id)
        job.task = None
        await self._settle(job, last)
        job.why = None
        self._share_bandwidth()
        self.begin()

    async def _fetch(self, job: Job) -> End | None:
        """Run a job's fetcher; return its last word, None if it was interrupted."""
        try:
            record = self._catalog.get(job.model_id)
            job.state = JobState.RUNNING
            self._book.audience.tell(job)
            return await fetch(
                job,
                self._order(job, record),
                started=self._share_bandwidth,
                heard=lambda: self._heard(job),
            )
        except asyncio.CancelledError:
            await asyncio.to_thread(self._store.drop_model, job.model_id)
            return None
        except Exception as error:  # whatever it was, the job must end and say so
            log.exception("model=%s download failed", job.unique)
            return wire.Error(code="download_failed", message=str(error))

    async def _settle(self, job: Job, last: End | None) -> None:
        """Have a job stand as its fetcher's `last` word, or what ended that, says."""
        match last:
            case messages.Fetched():
                await self._take_over(job, last)
            case _ if isinstance(job.why, Paused):
                self._book.wait(job, job.why)
            case None:
                self._book.end(job, JobState.CANCELED)
            case _ if job.why is not None:
                self._book.end(job, JobState.CANCELED)
            case wire.Error() if last.code == InsufficientDisk.code:
                self._wait_for_disk(job, last)
            case wire.Error():
                self._book.end(job, JobState.FAILED, error=last.message, code=last.code)
            case Killed():
                self._fallen(job, last)

    def _order(self, job: Job, record: ModelRecord) -> messages.Fetch:
        return messages.Fetch(
            source=record.source,
            work_dir=str(self._store.work_dir(record.id)),
            partials_dir=str(self._store.partials),
            blobs_dir=str(self._store.blobs),
            model_dir=str(self._store.model_dir(record.id)),
            hub_endpoint=self._settings.hub_endpoint,
            offline=self._settings.offline,
            architecture=record.architecture,
            memory_bytes=self._memory_bytes,
            bytes_per_s=self.bytes_per_s,
            began=job.began,
        )

    def _heard(self, job: Job) -> None:
        if job.done_bytes and not job.began:
            job.began = True
            self._book.keep(job)  # the next daemon will be more patient
        self._book.audience.tell(job)

    def _share_bandwidth(self) -> None:
        """Give each fetcher its part of the bandwidth."""
        children = [job.child for job in self._book.all() if job.child is not None]
        share = max(1, self.bytes_per_s // max(1, len(children))) if self.bytes_per_s else 0
        for child in children:
            child.send(messages.Limit(bytes_per_s=share))

    async def _take_over(self, job: Job, message: messages.Fetched) -> None:
        """Record what was brought, and end the job."""
        artifact = message.artifact
        try:
            self._catalog.update(
                job.model_id,
                artifact=artifact,
                revision=message.revision,
                format=artifact.format,
                size_bytes=sum(file.size_bytes for file in artifact.files),
                parameters=artifact.parameters,
                quantization=artifact.quantization,
                context_length=artifact.context_length,
            )
        except Exception as error:  # such as a full disk; the job must end and say so
            log.exception("model=%s download could not be recorded", job.unique)
            self._book.end(job, JobState.FAILED, error=str(error), code="download_failed")
            return
        self._book.end(job, JobState.COMPLETED)
        # Only now: had this daemon ended before, the next one would have gone on from there.
        for key in message.partials:
            await asyncio.to_thread(self._store.drop_partial, key)

    def _wait_for_disk(self, job: Job, error: wire.Error) -> None:
        """Pause a job that the disk has no room for: it goes on once there is some."""
        job.error, job.error_code = error.message, error.code
        log.warning("model=%s download waits for disk: %s", job.unique, error.message)
        self.room.refused(job)
        self._book.wait(job, Paused.DISK)
        self.room.look()

    def _fallen(self, job: Job, end: Killed) -> None:
        """Have a job begin again whose fetcher was killed, unless that was of no use before."""
        job.falls += 1
        if job.falls > _MOST_FALLS:
            self._book.end(job, JobState.FAILED, error=end.words, code="download_failed")
            return
        log.warning("model=%s download: %s", job.unique, end.words)
        job.note = f"{end.words}; it goes on with what is here"
        self._book.wait(job)
