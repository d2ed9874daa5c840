"""The progress of downloads and the changes of models, pushed over WebSockets.

Progress frames: nothing while idle; INITIALIZED to sockets that are open when a download starts,
then IN-PROGRESS; the present percentage at once to one that opens during it; never going back and
below 100 until the model can be loaded; and always one terminal frame.
"""

from __future__ import annotations

from typing import Literal

from aiohttp import web

from daemon.api.context import services
from daemon.api.operation import operation
from daemon.api.pieces import aliases
from daemon.api.pieces.answers import Frame
from daemon.api.pieces.identifiers import Identifiers, push_identifiers
from daemon.api.sockets import accept, is_upgrade, push
from daemon.downloads.job import JobState, Update

_Status = Literal["IN-PROGRESS", "COMPLETED", "FAILED", "CANCELED"]
_STATUSES: dict[JobState, _Status] = {
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


def frame(update: Update) -> Frame:
    """Return the progress frame for `update`."""
    status = "INITIALIZED" if update.initial else _STATUSES[update.state]
    return {"status": status, "percentage": update.percentage}


@operation(Frame, frames=Frame)
async def download_progress(request: web.Request) -> web.StreamResponse:
    """Push a model's download progress; a plain GET gets the present state once."""
    parts, record = services(request), aliases.meant(request, request.match_info["model"])
    if not is_upgrade(request):
        return web.json_response(_present(request, record.id, downloaded=record.downloaded))
    socket = await accept(request)
    with parts.downloads.watch(record.id) as watcher:

        async def send() -> None:
            async for update in watcher.updates():
                await socket.send_json(frame(update))

        return await push(request, socket, send())


def _present(request: web.Request, model_id: str, *, downloaded: bool) -> Frame:
    for job in services(request).downloads.all():
        if job.model_id == model_id:
            return frame(Update(state=job.state, percentage=job.percentage))
    return {"status": "COMPLETED", "percentage": 100.0} if downloaded else {"status": "UNKNOWN"}


@operation(Identifiers, frames=Identifiers)
async def identifiers(request: web.Request) -> web.StreamResponse:
    """Push every model's id, then the ids of those that change or are deleted."""
    catalog = services(request).catalog
    every = [record.id for record in catalog.all()]
    return await push_identifiers(request, "model", every, catalog.listen)
