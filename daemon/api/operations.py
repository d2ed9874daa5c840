"""Health of the daemon, for people and for supervisors."""

from __future__ import annotations

from typing import Literal, TypedDict

from aiohttp import web

from daemon import __version__
from daemon.api.context import services
from daemon.api.operation import operation


class Health(TypedDict):
    """The daemon serves; `id` is this installation's."""

    status: Literal["ok"]
    version: str
    id: str


def routes() -> list[web.RouteDef]:
    """Return the operations routes."""
    return [web.get("/health", health)]


@operation(Health)
async def health(request: web.Request) -> web.Response:
    """Say that the daemon serves, and which one it is."""
    return web.json_response(
        {"status": "ok", "version": __version__, "id": services(request).identity}
    )
