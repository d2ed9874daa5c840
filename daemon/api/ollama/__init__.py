"""The Ollama surface: chat, generate, vectors, models and pulls as Ollama's clients know them."""

from __future__ import annotations

from aiohttp import web

from daemon.api.ollama import changes, chat, models, pull, vectors


def routes() -> list[web.RouteDef]:
    """Return the Ollama routes."""
    parts = (models, changes, pull, chat, vectors)
    return [route for part in parts for route in part.routes()]
