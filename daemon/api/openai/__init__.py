"""The OpenAI surface: chat, completions, embeddings, rerank, and the models that can answer."""

from __future__ import annotations

from aiohttp import web

from daemon.api.openai import chat, completions, models, vectors


def routes() -> list[web.RouteDef]:
    """Return the OpenAI routes."""
    return [*models.routes(), *chat.routes(), *completions.routes(), *vectors.routes()]
