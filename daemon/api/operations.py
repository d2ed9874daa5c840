"""Health of the daemon, for people and for supervisors."""

from __future__ import annotations

from aiohttp import web

from daemon import __version__
from daemon.api.context import services


def routes() -> list[web.RouteDef]:
    """Return the operations routes."""
    return [web.get("/health", health)]


async def health(request: web.Request) -> web.Response:
    """Say that the daemon serves, and which one it is."""
    return web.json_response(
        {"status": "ok", "version": __version__, "id": services(request).identity}
    )
