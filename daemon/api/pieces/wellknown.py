"""How Pieces clients find the daemon and see that it is well."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

import daemon
from daemon.api.context import services
from daemon.api.operation import operation
from daemon.api.sockets import accept, is_upgrade, push

_HEALTH_EVERY_S = 5.0


def routes() -> list[web.RouteDef]:
    """Return the well-known routes."""
    return [
        web.get("/.well-known/health", health),
        web.get("/.well-known/version", version),
        web.get("/.well-known/installation/path", installation_path),
        web.get("/.well-known/stream/health", stream_health),
    ]


@operation(str)
async def health(request: web.Request) -> web.Response:
    """Answer `ok:<uuid>`, where the uuid is this installation's."""
    return web.Response(text=f"ok:{services(request).identity}")


@operation(str)
async def version(request: web.Request) -> web.Response:
    """Answer the Pieces API version; modeld's own is at /health."""
    return web.Response(text=services(request).config.server.pieces_version)


@operation(str)
async def installation_path(_: web.Request) -> web.Response:
    """Answer where modeld is installed."""
    return web.Response(text=str(Path(daemon.__file__).parent))


@operation(str, frames=str)
async def stream_health(request: web.Request) -> web.StreamResponse:
    """Push `ok` from time to time."""
    if not is_upgrade(request):
        return web.Response(text="ok")
    socket = await accept(request)

    async def send() -> None:
        while True:
            await socket.send_str("ok")
            await asyncio.sleep(_HEALTH_EVERY_S)

    return await push(request, socket, send())
