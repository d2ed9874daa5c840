"""Requests that wait or run, and the end of them."""

from __future__ import annotations

from dataclasses import asdict

from aiohttp import web

from daemon.api.context import BASE, services
from daemon.api.native.answers import Requests
from daemon.api.operation import operation
from daemon.errors import RequestNotFound


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.get(f"{BASE}/requests", list_requests),
        web.delete(f"{BASE}/requests/{{request}}", kill),
    ]


@operation(Requests)
async def list_requests(request: web.Request) -> web.Response:
    """List every request that waits or runs, the oldest first."""
    return web.json_response(
        {"requests": [asdict(status) for status in services(request).models.requests()]}
    )


@operation(answers={204: None}, errors=(RequestNotFound,))
async def kill(request: web.Request) -> web.Response:
    """End a request; whoever made it is told."""
    services(request).models.kill(request.match_info["request"])
    return web.Response(status=204)
