"""Chat and generate: an answer in pieces, unless it is asked for as a whole."""

from __future__ import annotations

from dataclasses import replace

from aiohttp import web

from backends import thinking
from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.generation import Asked, View, answer
from daemon.api.ollama.answers import ChatAnswer, Failure, GenerateAnswer, timestamp
from daemon.api.ollama.models import chat_template
from daemon.api.ollama.names import named
from daemon.api.ollama.types import ChatBody, GenerateBody, Generating
from daemon.api.ollama.views import ChatView, GenerateView
from daemon.api.operation import NDJSON, WORK, operation
from daemon.api.streams import LineStream
from daemon.catalog.record import ModelRecord
from daemon.config import parse_duration
from daemon.errors import InvalidRequest
from daemon.models import Terms


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/api/chat", chat), web.post("/api/generate", generate)]


@operation(
    ChatAnswer,
    body=ChatBody,
    stream=(ChatAnswer, Failure),
    stream_type=NDJSON,
    errors=WORK,
)
async def chat(request: web.Request) -> web.StreamResponse:
    """Answer a conversation; without messages, load the model or unload it."""
    body = await read_json(request, ChatBody)
    record = named(request, body.model)
    if not body.messages:
        reason = await _moved(request, record, body)
        done: ChatAnswer = {
            "model": body.model,
            "created_at": timestamp(),
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": reason,
        }
        return web.json_response(done)
    view = ChatView(body.model, thinks=body.effort != "none")
    return await _answered(request, record, body, body.to_backend(), view)


@operation(
    GenerateAnswer,
    body=GenerateBody,
    stream=(GenerateAnswer, Failure),
    stream_type=NDJSON,
    errors=WORK,
)
async def generate(request: web.Request) -> web.StreamResponse:
    """Answer a prompt; without one, load the model or unload it."""
    body = await read_json(request, GenerateBody)
    record = named(request, body.model)
    if not body.prompt and not body.suffix:
        done: GenerateAnswer = {
            "model": body.model,
            "created_at": timestamp(),
            "response": "",
            "done": True,
            "done_reason": await _moved(request, record, body),
        }
        return web.json_response(done)
    view = GenerateView(body.model, thinks=body.effort != "none")
    return await _answered(request, record, body, body.to_backend(), view)


def for_loading(request: web.Request, record: ModelRecord, terms: Terms) -> Terms:
    """Return the terms of a load that is not to stay for ever: Ollama's leaves after a while."""
    if terms.keep_alive_s is not None:
        return terms
    kept = parse_duration(record.keep_alive, "keep_alive") if record.keep_alive else None
    settings = services(request).config.models
    return replace(terms, keep_alive_s=settings.keep_alive_s() if kept is None else kept)


async def _moved(request: web.Request, record: ModelRecord, body: Generating) -> str:
    """Load the model, or have it leave once it is idle, and say which."""
    models = services(request).models
    if body.unloads:
        await models.leave(record.id)  # without a word to others that it is answering
        return "unload"
    await models.load(record, for_loading(request, record, body.terms(record)))
    return "load"


def _can_think(record: ModelRecord) -> bool:
    """Say whether a model can think; of one that an upstream runs, that is not known here."""
    template = chat_template(record)
    return not template or thinking.can_think(template)


async def _answered(
    request: web.Request, record: ModelRecord, body: Generating, asked: Asked, view: View
) -> web.StreamResponse:
    if body.effort not in (None, "none") and not _can_think(record):
        raise InvalidRequest(
            f"think: {record.unique} does not think before it answers: leave it out", param="think"
        )
    stream = LineStream(request) if body.streams else None
    return await answer(request, record, [asked], body.terms(record), view=view, stream=stream)
