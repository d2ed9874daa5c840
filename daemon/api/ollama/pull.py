"""Pulls: a download, told line by line. It is the daemon's: a client that leaves ends nothing."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator

from aiohttp import web

from daemon.api.adding import new_model
from daemon.api.context import Services, services
from daemon.api.errors import read_json
from daemon.api.ollama.answers import Status
from daemon.api.ollama.names import resolve, source_of
from daemon.api.ollama.types import PullBody
from daemon.api.operation import NDJSON, NO_MODEL, operation
from daemon.api.streams import LineStream
from daemon.catalog.record import ModelRecord
from daemon.downloads.job import Job, JobState
from daemon.errors import Conflict, DownloadFailed, ModelNotFound
from daemon.sources import is_source, name_for, parse

_LOOK_S = 0.1  # ten lines a second of one file are enough
_SILENCE_S = 5.0  # after which what is known is said again


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/api/pull", pull)]


@operation(
    Status,
    body=PullBody,
    stream=Status,
    stream_type=NDJSON,
    errors=(*NO_MODEL, Conflict, DownloadFailed),
)
async def pull(request: web.Request) -> web.StreamResponse:
    """Download a model of the catalog or of a source, and tell how that goes on."""
    body = await read_json(request, PullBody)
    parts = services(request)
    job = parts.downloads.start(_record(parts, body.asked))
    stream = LineStream(request)
    async for status in _statuses(parts, job):
        if body.stream is not False:
            await stream.send(status)
        elif "error" in status:
            raise DownloadFailed(status["error"])
    if body.stream is not False:
        return stream.response
    done: Status = {"status": "success"}
    return web.json_response(done)


def _record(parts: Services, name: str) -> ModelRecord:
    """Return the model that is to be pulled; what names a source is added. Raises ModelNotFound."""
    source = source_of(name)
    if is_source(source):
        unique = name_for(parse(source))
        known = parts.catalog.find(unique)
        if known is not None and known.source == source:
            return known
        return new_model(parts, source, unique)
    try:
        return resolve(parts.catalog, name)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"pull model manifest: file does not exist: {error.message}; any other model is pulled "
            "by its source, such as hf.co/owner/repo:Q4_K_M"
        ) from error


async def _statuses(parts: Services, job: Job) -> AsyncIterator[Status]:
    """Yield what happens to a download until it has ended."""
    changed = asyncio.Event()
    end = parts.downloads.listen(lambda other: changed.set() if other is job else None)
    told: dict[str, int] = {}
    waiting = ""
    spoke = time.monotonic()
    try:
        yield {"status": "pulling manifest"}
        while job.active:
            changed.clear()
            if time.monotonic() - spoke >= _SILENCE_S:
                told.clear()
            for status in _files(job, told):
                spoke = time.monotonic()
                yield status
            reason = job.error or job.waiting
            if reason and reason != waiting:
                yield {"status": f"waiting: {reason}"}
            waiting = reason
            if not job.active:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SILENCE_S):
                    await changed.wait()
                await asyncio.sleep(_LOOK_S)
    finally:
        end()
    if job.state is JobState.COMPLETED:
        for status in _files(job, told):
            yield status
        for text in ("verifying sha256 digest", "writing manifest", "success"):
            yield {"status": text}
    else:
        yield {"error": job.error or f"the download of {job.unique} was canceled"}


def _files(job: Job, told: dict[str, int]) -> list[Status]:
    """Return a status for each file that got on; `told` is what was said of each, and is kept."""
    statuses: list[Status] = []
    for file in job.files:
        if told.get(file.name, -1) >= file.done_bytes:
            continue
        told[file.name] = file.done_bytes
        is_hash = re.fullmatch(r"[0-9a-f]{64}", file.key) is not None
        status: Status = {"status": f"pulling {file.key[:12] if is_hash else file.name}"}
        if is_hash:
            status["digest"] = f"sha256:{file.key}"
        else:
            status["digest"] = file.name
        if file.total_bytes:
            status["total"] = file.total_bytes
        if file.done_bytes:
            status["completed"] = file.done_bytes
        statuses.append(status)
    return statuses
