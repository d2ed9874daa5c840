"""Puts the surfaces together behind the gate."""

from __future__ import annotations

from aiohttp import web

from daemon.api import (
    anthropic,
    gate,
    native,
    ollama,
    openai,
    openapi,
    operations,
    pieces,
    streams,
)
from daemon.api.context import SERVICES, Services, tell_reduced
from daemon.api.errors import errors, note_begin

_MAX_BODY_BYTES = 20 * 1024 * 1024  # some photographs; decoding it takes the loop 20 ms

_SURFACES = (pieces, openai, anthropic, ollama, native, operations, openapi)


def routes() -> list[web.RouteDef]:
    """Return the routes of all surfaces."""
    return [route for surface in _SURFACES for route in surface.routes()]


def build(services: Services) -> web.Application:
    """Return the application that serves all surfaces."""
    server = services.config.server
    app = web.Application(
        middlewares=[
            streams.deliver,
            errors,
            gate.gate(server.allowed_hosts, server.allowed_origins),
        ],
        client_max_size=_MAX_BODY_BYTES,
    )
    app.on_response_prepare.append(gate.allow_reading(server.allowed_origins))
    app.on_response_prepare.append(tell_reduced)
    app.on_response_prepare.append(note_begin)
    app[SERVICES] = services
    pieces.keep(app)
    app.add_routes(routes())
    openapi.keep(app, routes())
    return app
