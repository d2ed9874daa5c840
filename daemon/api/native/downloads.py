"""Downloads: started, listed, paused, cancelled; and what is left of those that are over."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import msgspec
from aiohttp import web

from daemon.api.context import BASE, requested_model, services
from daemon.api.errors import read_json
from daemon.api.native.answers import Bandwidth, Freed, Jobs, JobView, ModelView
from daemon.api.native.view import answer
from daemon.api.operation import NO_MODEL, operation
from daemon.config import parse_size
from daemon.downloads import orphans
from daemon.downloads.job import Job, Priority
from daemon.errors import ConfigError, Conflict, InvalidRequest, ModelNotFound


class Start(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /modeld/v1/models/{model}/download."""

    priority: Priority = Priority.NORMAL


class Cancel(msgspec.Struct, forbid_unknown_fields=True):
    """Body of …/download/cancel. `drop` removes what is here of the files."""

    drop: bool = False


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PATCH /modeld/v1/downloads/{model}."""

    priority: Priority


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PATCH /modeld/v1/downloads. A size a second, such as "5MB"; 0 and "" are no limit."""

    bandwidth_limit: int | str


class Leftovers(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /modeld/v1/downloads/clean. None means all that no download wants."""

    keys: list[str] | None = None


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.post(f"{BASE}/models/{{model}}/download", download),
        web.post(f"{BASE}/models/{{model}}/download/cancel", cancel_download),
        web.post(f"{BASE}/models/{{model}}/download/pause", pause),
        web.post(f"{BASE}/models/{{model}}/download/resume", resume),
        web.get(f"{BASE}/downloads", list_downloads),
        web.patch(f"{BASE}/downloads", set_limits),
        web.post(f"{BASE}/downloads/clean", clean),
        web.get(f"{BASE}/downloads/{{model}}", show),
        web.patch(f"{BASE}/downloads/{{model}}", change),
    ]


@operation(JobView, body=Start, optional_body=True, errors=(*NO_MODEL, Conflict))
async def download(request: web.Request) -> web.Response:
    """Start a model's download, or go on with one that is paused, and answer at once."""
    parts, record = services(request), requested_model(request)
    body = await read_json(request, Start, empty=True)
    return web.json_response(job_view(parts.downloads.start(record, body.priority)))


@operation(ModelView, body=Cancel, optional_body=True, errors=NO_MODEL)
async def cancel_download(request: web.Request) -> web.Response:
    """End a model's download, if there is one, and answer when it has ended."""
    parts, record = services(request), requested_model(request)
    body = await read_json(request, Cancel, empty=True)
    await parts.downloads.cancel(record.id, drop=body.drop)
    return answer(parts, record.id)


@operation(JobView, errors=(*NO_MODEL, Conflict))
async def pause(request: web.Request) -> web.Response:
    """Have a download wait until it is resumed."""
    parts, record = services(request), requested_model(request)
    await parts.downloads.pause(record.id)
    return await show(request)


@operation(JobView, errors=(*NO_MODEL, Conflict))
async def resume(request: web.Request) -> web.Response:
    """Go on with a download that is paused."""
    parts, record = services(request), requested_model(request)
    parts.downloads.resume(record.id)
    return await show(request)


@operation(JobView, body=Change, errors=(*NO_MODEL, Conflict))
async def change(request: web.Request) -> web.Response:
    """Change a download's place in the queue."""
    parts, record = services(request), requested_model(request)
    body = await read_json(request, Change)
    parts.downloads.prioritize(record.id, body.priority)
    return await show(request)


@operation(JobView, errors=NO_MODEL)
async def show(request: web.Request) -> web.Response:
    """Show the last download of a model."""
    parts, record = services(request), requested_model(request)
    job = parts.downloads.get(record.id)
    if job is None:
        raise ModelNotFound(f"{record.unique} has not been downloaded since modeld started")
    return web.json_response(job_view(job))


@operation(Jobs)
async def list_downloads(request: web.Request) -> web.Response:
    """List the last download of every model that had one, and all unfinished files."""
    parts = services(request)
    left = await asyncio.to_thread(orphans.find, parts.store, parts.downloads.wanted())
    return web.json_response(
        {
            "downloads": [job_view(job) for job in parts.downloads.all()],
            "bandwidth_limit": parts.downloads.bytes_per_s,
            "partials": [asdict(leftover) for leftover in left],
        }
    )


@operation(Bandwidth, body=Limits)
async def set_limits(request: web.Request) -> web.Response:
    """Change the bandwidth that all downloads together may use, also of those that run."""
    body = await read_json(request, Limits)
    try:
        limit = parse_size(body.bandwidth_limit or 0, "bandwidth_limit")
    except ConfigError as error:
        raise InvalidRequest(error.message, param="bandwidth_limit") from error
    services(request).downloads.limit(limit)
    return web.json_response({"bandwidth_limit": limit})


@operation(Freed, body=Leftovers, optional_body=True)
async def clean(request: web.Request) -> web.Response:
    """Remove unfinished files that no download goes on with."""
    parts = services(request)
    body = await read_json(request, Leftovers, empty=True)
    wanted = parts.downloads.wanted()
    freed = await asyncio.to_thread(orphans.remove, parts.store, wanted, body.keys)
    return web.json_response({"freed_bytes": freed})


def job_view(job: Job) -> JobView:
    """Return what the native surface shows of a download. Sizes in bytes, times in seconds."""
    return {
        "model": job.model_id,
        "unique": job.unique,
        "state": job.state,
        "paused": job.paused or None,
        "priority": job.priority,
        "done_bytes": job.done_bytes,
        "total_bytes": job.total_bytes,
        "percentage": job.percentage,
        "bytes_per_s": int(job.rate.bytes_per_s) if job.child is not None else 0,
        "eta_s": job.eta_s,
        "files": [
            {"name": file.name, "done_bytes": file.done_bytes, "total_bytes": file.total_bytes}
            for file in job.files
        ],
        "waiting": job.waiting or None,
        "note": job.note or None,
        "error": {"code": job.error_code, "message": job.error} if job.error else None,
        "created": job.created,
    }
