"""Download jobs: one fetcher child each, started, watched, cancelled, and told about.

Owns the jobs' states and who hears of them. Knows no HTTP and no hub: the fetcher does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from backends import wire
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.config import Downloads as DownloadSettings
from daemon.downloads import messages
from daemon.errors import Conflict, InvalidRequest
from daemon.store import Store, check_unchanged
from daemon.workers.child import Child, describe_exit
from daemon.workers.environment import for_fetcher

_TELL_LATECOMERS_S = 30.0
log = logging.getLogger(__name__)


class JobState(StrEnum):
    """Where a download is."""

    QUEUED = "queued"
    RUNNING = "running"
    VERIFYING = "verifying"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"


ACTIVE = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.VERIFYING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a watcher is told: `percentage` is below 100 until the model can be loaded."""

    state: JobState
    percentage: float
    initial: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One download of one model. Times are in seconds since the epoch.

    `owed` counts the clients that asked for it and have not opened a socket to hear of it since.
    """

    model_id: str
    unique: str
    state: JobState = JobState.QUEUED
    done_bytes: int = 0
    total_bytes: int = 0
    error: str = ""
    error_code: str = ""
    started: float = field(default_factory=time.time)
    ended: float = 0.0
    owed: int = 0
    task: asyncio.Task[None] | None = None
    canceling: bool = False

    @property
    def active(self) -> bool:
        """Whether it still goes on."""
        return self.state in ACTIVE

    @property
    def percentage(self) -> float:
        """How much is here, from 0 to 100; 100 only when all is verified and in place."""
        if self.state is JobState.COMPLETED:
            return 100.0
        share = self.done_bytes / self.total_bytes if self.total_bytes else 0.0
        return round(min(99.9, 100 * share), 2)


class Watcher:
    """What one client has yet to be told, oldest first.

    Progress that was not read yet is replaced by newer progress: a slow reader costs no memory.
    """

    def __init__(self) -> None:
        self._pending: list[Update] = []
        self._more = asyncio.Event()

    def tell(self, update: Update) -> None:
        """Add an update."""
        if self._pending and self._is_progress(update) and self._is_progress(self._pending[-1]):
            self._pending.pop()
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


class Downloads:
    """All jobs, the last one of each model. Must be used on the event loop's thread."""

    def __init__(self, settings: DownloadSettings, catalog: Catalog, store: Store) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._jobs: dict[str, Job] = {}
        self._watchers: dict[str, list[Watcher]] = {}
        self._barred: set[str] = set()
        self._closing = False
        self._places = asyncio.Semaphore(settings.max_active)

    def all(self) -> list[Job]:
        """Return the last job of every model that had one."""
        return list(self._jobs.values())

    def active(self, model_id: str) -> bool:
        """Say whether the model is being downloaded."""
        job = self._jobs.get(model_id)
        return job is not None and job.active

    def start(self, record: ModelRecord) -> Job:
        """Download the model, or return the job that already does.

        A model that is there already, and whole, gives a job that is completed. Raises
        InvalidRequest for a model without a source or one that an upstream runs, Conflict while
        its files are being removed.
        """
        if self._closing or record.id in self._barred:
            reason = "modeld is stopping" if self._closing else "its files are being removed"
            raise Conflict(f"{record.unique} can't be downloaded now: {reason}")
        job = self._jobs.get(record.id)
        if job is not None and job.active:
            job.owed += 1
            return job
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
        job = self._jobs[record.id] = Job(model_id=record.id, unique=record.unique, owed=1)
        self._tell(job, initial=True)
        if _is_intact(record):
            self._end(job, JobState.COMPLETED)
        else:
            job.task = asyncio.create_task(self._run(job, record))
            self._catalog.changed(record.id)
        return job

    async def cancel(self, model_id: str) -> None:
        """End the model's download if there is one, and wait until it has ended."""
        job = self._jobs.get(model_id)
        if job is not None and job.task is not None and job.active:
            if not job.canceling:  # a second cancel would cut the first one's cleaning short
                job.canceling = True
                job.task.cancel()
            await asyncio.wait([job.task])
            if job.active:  # it was ended before its first step, and could not say so itself
                self._end(job, JobState.CANCELED)

    @contextlib.asynccontextmanager
    async def removing(self, model_id: str) -> AsyncIterator[None]:
        """End the model's download, allow no other one inside, and then forget the last one."""
        self._barred.add(model_id)
        try:
            await self.cancel(model_id)
            yield
            self._jobs.pop(model_id, None)
        finally:
            self._barred.discard(model_id)

    async def close(self) -> None:
        """End all downloads, and start none any more."""
        self._closing = True
        await asyncio.gather(*(self.cancel(model_id) for model_id in list(self._jobs)))

    @contextlib.contextmanager
    def watch(self, model_id: str) -> Iterator[Watcher]:
        """Hear of this model's downloads, from the present state on.

        Clients open their socket after they asked for the download; one that is quick has ended by
        then, so its end is told to as many latecomers as there were clients that asked. (One that
        had its socket open before may be told twice: once there, once when it comes back.)
        """
        watcher = Watcher()
        self._watchers.setdefault(model_id, []).append(watcher)
        job = self._jobs.get(model_id)
        if job is not None and (job.active or self._is_owed(job)):
            job.owed = max(0, job.owed - 1)
            watcher.tell(Update(state=job.state, percentage=job.percentage))
        try:
            yield watcher
        finally:
            self._watchers[model_id].remove(watcher)

    @staticmethod
    def _is_owed(job: Job) -> bool:
        return job.owed > 0 and time.time() - job.ended < _TELL_LATECOMERS_S

    def _tell(self, job: Job, *, initial: bool = False) -> None:
        for watcher in self._watchers.get(job.model_id, ()):
            watcher.tell(Update(state=job.state, percentage=job.percentage, initial=initial))

    def _end(self, job: Job, state: JobState, *, error: str = "", code: str = "") -> None:
        job.state, job.error, job.error_code, job.ended = state, error, code, time.time()
        log.info("model=%s download=%s %s", job.unique, state, error)
        self._catalog.changed(job.model_id)
        self._tell(job)

    async def _run(self, job: Job, record: ModelRecord) -> None:
        last: messages.Fetched | wire.Error | None = None  # None: it was cancelled
        try:
            async with self._places:
                job.state = JobState.RUNNING
                last = await self._fetch(job, record)
        except asyncio.CancelledError:
            await asyncio.to_thread(self._store.drop_model, job.model_id)
        except Exception as error:  # whatever it was, the job must end and say so
            log.exception("model=%s download failed", job.unique)
            last = wire.Error(code="download_failed", message=str(error))
        # Before the end is told: the next download of this model uses the same folder.
        await asyncio.to_thread(self._store.drop_partial, job.model_id)
        match last:
            case messages.Fetched():
                self._take_over(job, last)
            case wire.Error():
                self._end(job, JobState.FAILED, error=last.message, code=last.code)
            case None:
                self._end(job, JobState.CANCELED)

    async def _fetch(self, job: Job, record: ModelRecord) -> messages.Fetched | wire.Error:
        """Run a fetcher to its end and return its last word."""
        child = await Child.start(
            ["-m", "daemon.downloads.fetcher"],
            union=messages.FromFetcher,
            name=f"fetcher:{record.unique}",
            environment=for_fetcher(os.environ),
        )
        try:
            child.send(
                messages.Fetch(
                    source=record.source,
                    partial_dir=str(self._store.partial_dir(record.id)),
                    blobs_dir=str(self._store.blobs),
                    model_dir=str(self._store.model_dir(record.id)),
                    hub_endpoint=self._settings.hub_endpoint,
                    offline=self._settings.offline,
                    architecture=record.architecture,
                )
            )
            async for message in child.messages():
                match message:
                    case messages.Fetched() | wire.Error():
                        return message
                    case messages.Progress():
                        self._progress(job, message)
            status = await asyncio.shield(child.exited)
            words = f"its process ended with {describe_exit(status)}: {child.last_line()}"
            return wire.Error(code="download_failed", message=words)
        finally:
            child.kill()
            await asyncio.shield(child.exited)

    def _progress(self, job: Job, message: messages.Progress) -> None:
        job.done_bytes = max(job.done_bytes, message.done_bytes)
        job.total_bytes = message.total_bytes
        if message.verifying:
            job.state = JobState.VERIFYING
        self._tell(job)

    def _take_over(self, job: Job, message: messages.Fetched) -> None:
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
            self._end(job, JobState.FAILED, error=str(error), code="download_failed")
        else:
            self._end(job, JobState.COMPLETED)


def _is_intact(record: ModelRecord) -> bool:
    """Say whether the model's files are here, and still those that were verified."""
    if record.artifact is None:
        return False
    try:
        check_unchanged(record.artifact)
    except Conflict:
        return False
    return True
