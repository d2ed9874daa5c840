"""The progress of downloads and the changes of models, pushed over WebSockets.

Progress frames: nothing while idle; INITIALIZED to sockets that are open when a download starts,
then IN-PROGRESS; the present percentage at once to one that opens during it; never going back and
below 100 until the model can be loaded; and always one terminal frame.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from daemon.api.context import Services, requested_model, services
from daemon.api.pieces.sockets import accept, is_upgrade, push
from daemon.downloads.jobs import JobState, Update

_STATUSES = {
    JobState.QUEUED: "IN-PROGRESS",
    JobState.RUNNING: "IN-PROGRESS",
    JobState.VERIFYING: "IN-PROGRESS",
    JobState.COMPLETED: "COMPLETED",
    JobState.FAILED: "FAILED",
    JobState.CANCELED: "CANCELED",
}


def routes() -> list[web.RouteDef]:
    """Return the routes that push."""
    return [
        web.get("/model/{model}/download/progress", download_progress),
        web.get("/models/stream/identifiers", identifiers),
    ]


def frame(update: Update) -> dict[str, Any]:
    """Return the progress frame for `update`."""
    status = "INITIALIZED" if update.initial else _STATUSES[update.state]
    return {"status": status, "percentage": update.percentage}


async def download_progress(request: web.Request) -> web.StreamResponse:
    """Push a model's download progress; a plain GET gets the present state once."""
    parts, record = services(request), requested_model(request)
    if not is_upgrade(request):
        return web.json_response(_present(request, record.id, downloaded=record.downloaded))
    socket = await accept(request)
    with parts.downloads.watch(record.id) as watcher:

        async def send() -> None:
            async for update in watcher.updates():
                await socket.send_json(frame(update))

        return await push(request, socket, send())


def _present(request: web.Request, model_id: str, *, downloaded: bool) -> dict[str, Any]:
    for job in services(request).downloads.all():
        if job.model_id == model_id:
            return frame(Update(state=job.state, percentage=job.percentage))
    return {"status": "COMPLETED", "percentage": 100.0} if downloaded else {"status": "UNKNOWN"}


async def identifiers(request: web.Request) -> web.StreamResponse:
    """Push every model's id, then the ids of those that change or are deleted."""
    parts = services(request)
    if not is_upgrade(request):
        return web.json_response(_every(parts))
    socket = await accept(request)
    changes: dict[str, bool] = {}
    more = asyncio.Event()

    def changed(model_id: str, *, deleted: bool) -> None:
        changes[model_id] = deleted  # a slow reader gets each model once
        more.set()

    async def send() -> None:
        await socket.send_json(every)  # no change is lost: listening began in the same step
        while True:
            await more.wait()
            more.clear()
            batch = [_identifier(key, deleted=gone) for key, gone in changes.items()]
            changes.clear()
            await socket.send_json({"iterable": batch})

    every, end = _every(parts), parts.catalog.listen(changed)
    try:
        return await push(request, socket, send())
    finally:
        end()


def _every(parts: Services) -> dict[str, Any]:
    return {"iterable": [{"model": {"id": record.id}} for record in parts.catalog.all()]}


def _identifier(model_id: str, *, deleted: bool) -> dict[str, Any]:
    identifier: dict[str, Any] = {"model": {"id": model_id}}
    return identifier | {"deleted": True} if deleted else identifier
