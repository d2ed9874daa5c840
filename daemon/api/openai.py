"""The OpenAI surface: chat completions and the list of models that can answer."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from aiohttp import web

from backends.contract import Delta, Done
from daemon.api.context import Services, services
from daemon.api.errors import openai_envelope, read_json
from daemon.api.openai_types import ChatBody
from daemon.api.sse import EventStream
from daemon.catalog.record import ModelRecord
from daemon.errors import EngineError, ModeldError


def routes() -> list[web.RouteDef]:
    """Return the OpenAI routes."""
    return [
        web.get("/v1/models", list_models),
        web.get("/v1/models/{model}", show_model),
        web.post("/v1/chat/completions", chat_completions),
    ]


def _model_view(record: ModelRecord) -> dict[str, Any]:
    created = int(datetime.fromisoformat(record.created).timestamp())
    return {"id": record.unique, "object": "model", "created": created, "owned_by": "modeld"}


async def list_models(request: web.Request) -> web.Response:
    """List the models that are on this machine, by unique name."""
    records = services(request).catalog.all()
    data = [_model_view(record) for record in records if record.downloaded]
    return web.json_response({"object": "list", "data": data})


async def show_model(request: web.Request) -> web.Response:
    """Show one model."""
    return web.json_response(
        _model_view(services(request).catalog.get(request.match_info["model"]))
    )


def _usage(done: Done) -> dict[str, Any]:
    usage = done.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _timings(done: Done) -> dict[str, Any]:
    return {"prompt_ms": done.timings.prompt_ms, "predicted_ms": done.timings.predicted_ms}


class Completion:
    """The names that all parts of one answer share."""

    def __init__(self, model: str) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """Return one chunk of a stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        """Return the chunk that tells what the request cost."""
        return self._object("chat.completion.chunk", []) | {"usage": _usage(done)}

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": done.finish_reason,
        }
        answer = self._object("chat.completion", [choice])
        return answer | {"usage": _usage(done), "timings": _timings(done)}


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, at once or as a stream."""
    parts = services(request)
    body = await read_json(request, ChatBody)
    record = parts.catalog.get(body.model)
    if body.stream:
        return await _stream(request, parts, record, body)
    pieces: list[str] = []
    async with parts.models.generate(record, body.to_backend()) as answers:
        async for answer in answers:
            if isinstance(answer, Done):
                _check_ended_by_itself(answer)
                return web.json_response(Completion(record.unique).whole("".join(pieces), answer))
            pieces.append(answer.content)
    raise EngineError("the engine ended the answer without saying why")


def _check_ended_by_itself(done: Done) -> None:
    """Raise EngineError for an answer that something other than its caller cancelled."""
    if done.finish_reason == "cancelled":
        raise EngineError("the request was ended before its answer was complete")


async def _stream(
    request: web.Request, parts: Services, record: ModelRecord, body: ChatBody
) -> web.StreamResponse:
    stream = EventStream(request)
    completion = Completion(record.unique)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    async with contextlib.AsyncExitStack() as stack:

        async def begin() -> tuple[Delta | Done, AsyncIterator[Delta | Done]]:
            answers = await stack.enter_async_context(
                parts.models.generate(record, body.to_backend())
            )
            return await anext(answers), answers

        try:
            first, answers = await stream.first(begin())
            await stream.send(completion.chunk({"role": "assistant", "content": ""}))
            await _send(stream, completion, first, include_usage=include_usage)
            async for answer in answers:
                await _send(stream, completion, answer, include_usage=include_usage)
            await stream.done()
        except ModeldError as error:
            if not stream.begun:
                raise
            await stream.send(openai_envelope(error))
    return stream.response


async def _send(
    stream: EventStream, completion: Completion, answer: Delta | Done, *, include_usage: bool
) -> None:
    if isinstance(answer, Delta):
        await stream.send(completion.chunk({"content": answer.content}))
        return
    _check_ended_by_itself(answer)
    await stream.send(completion.chunk({}, answer.finish_reason) | {"timings": _timings(answer)})
    if include_usage:
        await stream.send(completion.usage_chunk(answer))
