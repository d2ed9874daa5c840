"""The book of download jobs: the last one of each model, how it stands, what the next daemon knows.

Owns every change of a job's state that others must know of: it is kept in the catalog, and told.
"""

from __future__ import annotations

import logging
import time
from itertools import count

from daemon.catalog.database import Catalog
from daemon.catalog.record import KeptDownload, ModelRecord
from daemon.downloads.audience import Audience
from daemon.downloads.job import Job, JobState, Paused, Priority
from daemon.errors import Conflict, ModelNotFound

log = logging.getLogger(__name__)


class Book:
    """All jobs. Must be used on the event loop's thread."""

    def __init__(self, catalog: Catalog) -> None:
        self.audience = Audience()
        self.closing = False
        self._catalog = catalog
        self._jobs: dict[str, Job] = {}
        self._numbers = count()

    def all(self) -> list[Job]:
        """Return the last job of every model that had one."""
        return list(self._jobs.values())

    def get(self, model_id: str) -> Job | None:
        """Return the last job of a model."""
        return self._jobs.get(model_id)

    def active(self, model_id: str) -> Job:
        """Return the job of a model that is not over. Raises Conflict if there is none."""
        job = self._jobs.get(model_id)
        if job is None or not job.active:
            raise Conflict("this model is not being downloaded")
        return job

    def new(self, record: ModelRecord, priority: Priority) -> Job:
        """Return a new job of a model, which is its last one from now on."""
        job = self._jobs[record.id] = Job(
            model_id=record.id,
            unique=record.unique,
            number=next(self._numbers),
            priority=priority,
        )
        return job

    def recall(self) -> None:
        """Take up what an earlier daemon had not finished; what was paused stays so."""
        for kept in self._catalog.downloads():
            try:
                record = self._catalog.get(kept.model_id)
            except ModelNotFound:
                self._catalog.forget_download(kept.model_id)
                continue
            job = self.new(record, Priority(kept.priority))
            job.created, job.paused, job.error = kept.created, Paused(kept.paused), kept.error
            job.done_bytes, job.total_bytes = kept.done_bytes, kept.total_bytes
            job.began = kept.done_bytes > 0

    def drop(self, model_id: str) -> None:
        """Forget the last job of a model, which is over."""
        self._jobs.pop(model_id, None)

    def keep(self, job: Job) -> None:
        """Have the next daemon know of the job."""
        self._catalog.keep_download(
            KeptDownload(
                model_id=job.model_id,
                priority=job.priority,
                created=job.created,
                paused=job.paused,
                error=job.error,
                done_bytes=job.done_bytes,
                total_bytes=job.total_bytes,
            )
        )

    def told(self, job: Job) -> None:
        """Tell everybody of a change that others than watchers care for."""
        self._catalog.changed(job.model_id)
        self.audience.tell(job)

    def wait(self, job: Job, paused: Paused = Paused.NO) -> None:
        """Have a job wait for its turn, or until what has `paused` it is over."""
        job.state, job.paused, job.waiting = JobState.QUEUED, paused, ""
        self.keep(job)
        self.told(job)

    def end(self, job: Job, state: JobState, *, error: str = "", code: str = "") -> None:
        """End a job; one that ends because the daemon does is not over for the next one."""
        job.state, job.error, job.error_code, job.ended = state, error, code, time.time()
        job.paused, job.waiting = Paused.NO, ""
        log.info("model=%s download=%s %s", job.unique, state, error)
        if job.why is JobState.QUEUED and state is JobState.CANCELED:
            self.keep(job)
        else:
            self._catalog.forget_download(job.model_id)
        self.told(job)
