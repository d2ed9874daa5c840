"""Downloads, as the rest of the daemon asks for them: start, pause, cancel, watch.

Owns what may be asked when, and what that means for a job. Which jobs run is the `queue`, how they
stand the `book`. Knows no HTTP and no hub.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager

from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.config import Downloads as DownloadSettings
from daemon.downloads import orphans
from daemon.downloads.audience import Watcher
from daemon.downloads.book import Book
from daemon.downloads.job import Job, JobState, Paused, Priority
from daemon.downloads.orphans import Wanted
from daemon.downloads.queue import Queue
from daemon.errors import Conflict, InvalidRequest, Stopping
from daemon.store import Store, check_unchanged


class Downloads:
    """All jobs, the last one of each model. Must be used on the event loop's thread.

    `memory_bytes` is what models may take here.
    """

    def __init__(
        self, settings: DownloadSettings, catalog: Catalog, store: Store, *, memory_bytes: int = 0
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._book = Book(catalog)
        self._queue = Queue(settings, catalog, store, self._book, memory_bytes=memory_bytes)
        self._barred: set[str] = set()

    def all(self) -> list[Job]:
        """Return the last job of every model that had one."""
        return self._book.all()

    def get(self, model_id: str) -> Job | None:
        """Return the last job of a model."""
        return self._book.get(model_id)

    def active(self, model_id: str) -> bool:
        """Say whether the model is being downloaded, or will be."""
        job = self._book.get(model_id)
        return job is not None and job.active

    @property
    def bytes_per_s(self) -> int:
        """The bandwidth that all downloads together may use; 0 is all there is."""
        return self._queue.bytes_per_s

    def limit(self, bytes_per_s: int) -> None:
        """Let all downloads together use so much from now on; 0 is all there is."""
        self._queue.limit(bytes_per_s)

    def resume_all(self) -> None:
        """Go on with what an earlier daemon had not finished; what was paused stays so."""
        self._book.recall()
        self._queue.begin()
        self._queue.room.look()

    def start(self, record: ModelRecord, priority: Priority = Priority.NORMAL) -> Job:
        """Download the model, or return the job that already does; one that is paused goes on.

        A model that is there already, and whole, gives a job that is completed. Raises
        InvalidRequest for a model without a source or one that an upstream runs, Conflict while
        its files are being removed.
        """
        self._still_open()
        if record.id in self._barred:
            raise Conflict(f"{record.unique} can't be downloaded now: its files are being removed")
        job = self._book.get(record.id)
        if job is not None and job.active:
            job.owed += 1
            self.resume(record.id)
            return job
        _check_source(record)
        job = self._book.new(record, priority)
        job.owed = 1
        self._book.audience.tell(job, initial=True)
        if _is_intact(record):
            self._book.end(job, JobState.COMPLETED)
        else:
            self._book.keep(job)
            self._queue.begin()
            self._catalog.changed(record.id)
        return job

    async def pause(self, model_id: str) -> None:
        """Have a download wait until it is resumed; what is here stays.

        Raises Conflict if there is none, and Stopping.
        """
        self._still_open()
        job = self._book.active(model_id)
        if job.task is not None:
            await self._queue.interrupt(job, Paused.USER)
        else:
            self._book.wait(job, Paused.USER)

    def resume(self, model_id: str) -> None:
        """Go on with a download that is paused. Raises Conflict if there is none."""
        self._queue.resume(model_id)

    def prioritize(self, model_id: str, priority: Priority) -> None:
        """Change a download's place in the queue. Raises Conflict if it has ended."""
        job = self._book.active(model_id)
        job.priority = priority
        self._book.keep(job)
        self._book.told(job)

    async def cancel(self, model_id: str, *, drop: bool = False) -> None:
        """End the model's download if there is one, and wait until it has ended.

        What is here of its files stays for the next download, unless it is to be dropped. Raises
        Stopping.
        """
        self._still_open()
        job = self._book.get(model_id)
        if job is not None:
            await self._queue.interrupt(job, JobState.CANCELED)
            if job.active:
                self._book.end(job, JobState.CANCELED)
        if drop:
            await asyncio.to_thread(orphans.remove_of, self._store, self.wanted(), model_id)

    @contextlib.asynccontextmanager
    async def removing(self, model_id: str) -> AsyncIterator[None]:
        """End the model's download, allow no other one inside, and then forget the last one."""
        self._barred.add(model_id)
        try:
            await self.cancel(model_id, drop=True)
            yield
            self._book.drop(model_id)
        finally:
            self._barred.discard(model_id)
        self._queue.room.look()

    async def close(self) -> None:
        """End all fetchers, and start none any more. The next daemon goes on with what is left."""
        self._book.closing = True
        self._queue.room.close()
        await asyncio.gather(
            *(self._queue.interrupt(job, JobState.QUEUED) for job in self._book.all())
        )

    def _still_open(self) -> None:
        """Raise Stopping if what is asked for now would be forgotten."""
        if self._book.closing:
            raise Stopping

    def watch(self, model_id: str) -> AbstractContextManager[Watcher]:
        """Hear of this model's downloads, from the present state on."""
        return self._book.audience.watch(model_id, self._book.get(model_id))

    def listen(self, listener: Callable[[Job], None]) -> Callable[[], None]:
        """Call `listener` with every job that changes; return what ends that."""
        return self._book.audience.listen(listener)

    def wanted(self) -> Wanted:
        """Return which unfinished files downloads go on with that are not over."""
        active = [job for job in self._book.all() if job.active]
        return Wanted(
            keys={file.key for job in active for file in job.files if file.key},
            models={job.model_id for job in active},
        )


def _check_source(record: ModelRecord) -> None:
    """Raise InvalidRequest for a model that cannot be downloaded."""
    if record.cloud:
        raise InvalidRequest(
            f"{record.unique} runs on an upstream and can be asked as it is: there is nothing "
            "to download"
        )
    if not record.source and not record.downloaded:
        raise InvalidRequest(
            f"{record.unique} has no source to download from: create it with a source, such "
            "as hf:owner/repo, as its unique name, or import its file with "
            f"`modeld import PATH --name {record.unique}`"
        )


def _is_intact(record: ModelRecord) -> bool:
    """Say whether the model's files are here, and still those that were verified."""
    if record.artifact is None:
        return False
    try:
        check_unchanged(record.artifact)
    except Conflict:
        return False
    return True
