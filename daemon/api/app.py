"""Puts the surfaces together behind the gate."""

from __future__ import annotations

from aiohttp import web

from daemon.api import gate, native, openai, operations, pieces
from daemon.api.context import SERVICES, Services
from daemon.api.errors import errors

_MAX_BODY_BYTES = 20 * 1024 * 1024  # some photographs; decoding it takes the loop 20 ms


def build(services: Services) -> web.Application:
    """Return the application that serves all surfaces."""
    server = services.config.server
    app = web.Application(
        middlewares=[errors, gate.gate(server.allowed_hosts, server.allowed_origins)],
        client_max_size=_MAX_BODY_BYTES,
    )
    app.on_response_prepare.append(gate.allow_reading(server.allowed_origins))
    app[SERVICES] = services
    for surface in (pieces, openai, native, operations):
        app.add_routes(surface.routes())
    return app
