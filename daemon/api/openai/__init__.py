"""The OpenAI surface: chat, responses, completions, embeddings, rerank, and models."""

from __future__ import annotations

from aiohttp import web

from daemon.api.openai import chat, completions, models, responses, vectors


def routes() -> list[web.RouteDef]:
    """Return the OpenAI routes."""
    return [
        *models.routes(),
        *chat.routes(),
        *responses.routes(),
        *completions.routes(),
        *vectors.routes(),
    ]
