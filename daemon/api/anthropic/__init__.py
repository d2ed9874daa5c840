"""The Anthropic surface: messages, and the counting of their tokens."""

from __future__ import annotations

from aiohttp import web

from daemon.api.anthropic import messages


def routes() -> list[web.RouteDef]:
    """Return the Anthropic routes; the models that can answer are listed by the OpenAI surface."""
    return messages.routes()
