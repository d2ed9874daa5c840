"""The native surface: models with all that modeld knows of them, and what else there is to know."""

from __future__ import annotations

from aiohttp import web

from daemon.api.native import downloads, events, loads, machine, models, requests


def routes() -> list[web.RouteDef]:
    """Return the routes of the native surface."""
    parts = (models, loads, downloads, requests, machine, events)
    return [route for part in parts for route in part.routes()]
