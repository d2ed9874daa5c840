"""What chat and completions share: one answer, whole or as a stream, and what it cost."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from aiohttp import web

from backends.contract import (
    ChatRequest,
    CompleteRequest,
    Delta,
    Done,
    TokenLogprob,
    ToolCall,
    Usage,
)
from daemon.api.context import services
from daemon.api.errors import openai_envelope
from daemon.api.openai.types import SamplingBody
from daemon.api.sse import EventStream
from daemon.catalog.record import ModelRecord
from daemon.errors import EngineError, ModeldError


class View(Protocol):
    """How one kind of answer is shown. All its parts share an id."""

    def begin(self) -> list[dict[str, Any]]:
        """Return the chunks before the first delta."""
        ...

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return the chunk for a piece of the answer."""
        ...

    def end(self, done: Done) -> dict[str, Any]:
        """Return the chunk that ends the answer."""
        ...

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        """Return the chunk that tells what the request cost."""
        ...

    def whole(self, answer: Delta, done: Done) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        ...


def usage(spent: Usage) -> dict[str, Any]:
    """Return what a request cost."""
    return {
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "total_tokens": spent.prompt_tokens + spent.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": spent.cached_tokens},
    }


def timings(done: Done) -> dict[str, Any]:
    """Return how long a request took."""
    return {"prompt_ms": done.timings.prompt_ms, "predicted_ms": done.timings.predicted_ms}


async def answer(
    request: web.Request,
    record: ModelRecord,
    body: SamplingBody,
    asked: ChatRequest | CompleteRequest,
    view: View,
) -> web.StreamResponse:
    """Answer a request for text, at once or as a stream. Raises ModeldError."""
    if body.stream:
        return await _stream(request, record, body, asked, view)
    pieces: list[Delta] = []
    async with services(request).models.generate(record, asked) as answers:
        async for piece in answers:
            if isinstance(piece, Done):
                _check_ended_by_itself(piece)
                return web.json_response(view.whole(joined(pieces), piece))
            pieces.append(piece)
    raise EngineError("the engine ended the answer without saying why")


def joined(pieces: list[Delta]) -> Delta:
    """Return the pieces of an answer as one."""
    calls: dict[int, list[ToolCall]] = {}
    logprobs: list[TokenLogprob] = []
    for piece in pieces:
        logprobs += piece.logprobs
        for call in piece.tool_calls:
            calls.setdefault(call.index, []).append(call)
    return Delta(
        content="".join(piece.content for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        tool_calls=tuple(
            ToolCall(
                index=index,
                id=parts[0].id,
                name=parts[0].name,
                arguments="".join(part.arguments for part in parts),
            )
            for index, parts in sorted(calls.items())
        ),
        logprobs=tuple(logprobs),
    )


def _check_ended_by_itself(done: Done) -> None:
    """Raise EngineError for an answer that something other than its caller cancelled."""
    if done.finish_reason == "cancelled":
        raise EngineError("the request was ended before its answer was complete")


async def _stream(
    request: web.Request,
    record: ModelRecord,
    body: SamplingBody,
    asked: ChatRequest | CompleteRequest,
    view: View,
) -> web.StreamResponse:
    stream = EventStream(request)
    models = services(request).models
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    async with contextlib.AsyncExitStack() as stack:

        async def begin() -> tuple[Delta | Done, AsyncIterator[Delta | Done]]:
            answers = await stack.enter_async_context(models.generate(record, asked))
            return await anext(answers), answers

        try:
            first, answers = await stream.first(begin())
            for chunk in view.begin():
                await stream.send(chunk)
            await _send(stream, view, first, include_usage=include_usage)
            async for piece in answers:
                await _send(stream, view, piece, include_usage=include_usage)
            await stream.done()
        except ModeldError as error:
            if not stream.begun:
                raise
            await stream.send(openai_envelope(error))
    return stream.response


async def _send(
    stream: EventStream, view: View, piece: Delta | Done, *, include_usage: bool
) -> None:
    if isinstance(piece, Delta):
        await stream.send(view.chunk(piece))
        return
    _check_ended_by_itself(piece)
    await stream.send(view.end(piece) | {"timings": timings(piece)})
    if include_usage:
        await stream.send(view.usage_chunk(piece))
