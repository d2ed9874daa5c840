"""The Pieces Model API: what real Pieces clients speak."""

from __future__ import annotations

from aiohttp import web

from daemon.api.pieces import models, progress, wellknown


def routes() -> list[web.RouteDef]:
    """Return the routes of this surface."""
    return [*wellknown.routes(), *progress.routes(), *models.routes()]
