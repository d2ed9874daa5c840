"""Vectors of texts."""

from __future__ import annotations

import time

import msgspec
from aiohttp import web

from backends.contract import EmbedRequest
from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.ollama.answers import EmbedAnswer, EmbeddingsAnswer
from daemon.api.ollama.chat import for_loading
from daemon.api.ollama.names import named
from daemon.api.ollama.types import EmbedBody, EmbeddingsBody
from daemon.api.openai.vectors import numbers
from daemon.api.operation import JSON, WORK, operation
from daemon.models import ModelState


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/api/embed", embed), web.post("/api/embeddings", embeddings)]


@operation(EmbedAnswer, body=EmbedBody, errors=WORK)
async def embed(request: web.Request) -> web.Response:
    """Turn texts into vectors. No texts at all have the model loaded."""
    body = await read_json(request, EmbedBody)
    record = named(request, body.model)
    began = time.monotonic()
    asked = body.to_backend()
    answer: EmbedAnswer = {
        "model": body.model,
        "embeddings": [],
        "total_duration": 0,
        "load_duration": 0,
        "prompt_eval_count": 0,
    }
    models = services(request).models
    was_there = models.status(record.id).state is ModelState.READY
    for texts in asked:
        found = await models.embed(record, texts, body.terms(record))
        answer["embeddings"] += [numbers(vector) for vector in found.vectors]
        answer["prompt_eval_count"] += found.usage.prompt_tokens
    if not asked:
        await models.load(record, for_loading(request, record, body.terms(record)))
    if not was_there:
        answer["load_duration"] = int(models.status(record.id).load_s * 1e9)
    answer["total_duration"] = int((time.monotonic() - began) * 1e9)
    return web.Response(body=msgspec.json.encode(answer), content_type=JSON)


@operation(EmbeddingsAnswer, body=EmbeddingsBody, errors=WORK)
async def embeddings(request: web.Request) -> web.Response:
    """Turn a text into a vector: the older form of /api/embed."""
    body = await read_json(request, EmbeddingsBody)
    record = named(request, body.model)
    asked = EmbedRequest(inputs=(body.prompt,), truncate=True)
    found = await services(request).models.embed(record, asked, body.terms(record))
    answer: EmbeddingsAnswer = {"embedding": numbers(found.vectors[0])}
    return web.json_response(answer)
