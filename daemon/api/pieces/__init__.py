"""The Pieces API: what real Pieces clients speak."""

from __future__ import annotations

from aiohttp import web

from daemon.api.pieces import (
    accounts,
    chat,
    conversations,
    identifiers,
    models,
    progress,
    turns,
    wellknown,
)


def routes() -> list[web.RouteDef]:
    """Return the routes of this surface."""
    parts = (wellknown, progress, models, accounts, chat, conversations, identifiers)
    return [route for part in parts for route in part.routes()]


def keep(app: web.Application) -> None:
    """Have `app` keep what this surface has to know of its clients."""
    accounts.keep(app)
    turns.keep(app)
