"""One answer of a model, whole or in pieces: what the surfaces that generate text share.

A request may ask for several choices: each is a request of its own to the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from aiohttp import web

from backends.contract import (
    ChatRequest,
    CompleteRequest,
    Delta,
    Done,
    TokenLogprob,
    ToolCall,
)
from daemon.api.context import NOTICE, services
from daemon.api.streams import Stream
from daemon.catalog.record import ModelRecord
from daemon.errors import EngineError, ModeldError
from daemon.models import Terms

Asked = ChatRequest | CompleteRequest
Piece = Mapping[str, Any]


class View(Protocol):
    """How a surface shows an answer: as a stream of pieces, or whole."""

    def begin(self) -> Sequence[Piece]:
        """Return what comes before the first piece."""
        ...

    def piece(self, delta: Delta, choice: int, /) -> Sequence[Piece]:
        """Return what is sent for a piece of a choice."""
        ...

    def end(self, done: Done, choice: int, /) -> Sequence[Piece]:
        """Return what ends a choice."""
        ...

    def last(self, dones: Sequence[Done], /) -> Sequence[Piece]:
        """Return what comes once all choices have ended; `dones` are in their order."""
        ...

    def failure(self, error: ModeldError, /) -> Sequence[Piece]:
        """Return what tells of an error once the headers are out, perhaps before `begin`."""
        ...

    def whole(self, answers: Sequence[tuple[Delta, Done]], /) -> Piece:
        """Return the answer, with all its choices, to a request that does not stream."""
        ...


async def answer(
    request: web.Request,
    record: ModelRecord,
    asked: Sequence[Asked],
    terms: Terms,
    *,
    view: View,
    stream: Stream | None = None,
) -> web.StreamResponse:
    """Answer a request for text, each of `asked` a choice of it. Raises ModeldError."""
    if stream is not None:
        return await _stream(request, record, asked, terms, view=view, stream=stream)
    answers = await gathered(request, record, asked, terms)
    notice = next((done.notice for _, done in answers if done.notice), "")
    return web.json_response(view.whole(answers), headers={NOTICE: notice} if notice else {})


async def gathered(
    request: web.Request, record: ModelRecord, asked: Sequence[Asked], terms: Terms
) -> list[tuple[Delta, Done]]:
    """Return the whole answer to each of `asked`. Raises ModeldError."""
    pieces: list[list[Delta]] = [[] for _ in asked]
    dones: dict[int, Done] = {}
    async with _choices(request, record, asked, terms) as coming:
        async for choice, piece in coming:
            if isinstance(piece, Done):
                dones[choice] = _ended_by_itself(piece)
            else:
                pieces[choice].append(piece)
    ends = _all_of(dones, asked)
    return [(joined(said), done) for said, done in zip(pieces, ends, strict=True)]


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


def _all_of(dones: Mapping[int, Done], asked: Sequence[Asked]) -> list[Done]:
    """Return the ends of all choices, in their order. Raises EngineError if one is missing."""
    if len(dones) < len(asked):
        raise EngineError("the engine ended the answer without saying why")
    return [dones[choice] for choice in range(len(asked))]


def _ended_by_itself(done: Done) -> Done:
    """Raise EngineError for an answer that something other than its caller cancelled."""
    if done.finish_reason == "cancelled":
        raise EngineError("the request was ended before its answer was complete")
    return done


async def _stream(
    request: web.Request,
    record: ModelRecord,
    asked: Sequence[Asked],
    terms: Terms,
    *,
    view: View,
    stream: Stream,
) -> web.StreamResponse:
    dones: dict[int, Done] = {}
    async with contextlib.AsyncExitStack() as stack:

        async def begin() -> tuple[
            tuple[int, Delta | Done], AsyncIterator[tuple[int, Delta | Done]]
        ]:
            coming = await stack.enter_async_context(_choices(request, record, asked, terms))
            return await anext(coming), coming

        async def show(choice: int, piece: Delta | Done) -> None:
            if isinstance(piece, Done):
                dones[choice] = _ended_by_itself(piece)
                shown = view.end(piece, choice)
            else:
                shown = view.piece(piece, choice)
            await stream.send(*shown)

        try:
            first, coming = await stream.first(begin())
            await stream.send(*view.begin())
            await show(*first)
            async for choice, piece in coming:
                await show(choice, piece)
            await stream.send(*view.last(_all_of(dones, asked)))
            await stream.done()
        except ModeldError as error:
            if not stream.begun:
                raise
            await stream.send(*view.failure(error))
    return stream.response


@contextlib.asynccontextmanager
async def _choices(
    request: web.Request, record: ModelRecord, asked: Sequence[Asked], terms: Terms
) -> AsyncIterator[AsyncIterator[tuple[int, Delta | Done]]]:
    """Give the pieces of all choices as they come, each with the number of its choice.

    One that fails ends the others. Raises ModeldError; so do the pieces.
    """
    models = services(request).models
    async with contextlib.AsyncExitStack() as stack:
        if len(asked) == 1:
            yield _numbered(
                await stack.enter_async_context(models.generate(record, asked[0], terms))
            )
            return
        pieces: asyncio.Queue[tuple[int, Delta | Done] | ModeldError | None] = asyncio.Queue()

        async def run(choice: int) -> None:
            async with models.generate(record, asked[choice], terms) as answers:
                async for piece in answers:
                    pieces.put_nowait((choice, piece))

        async def run_all() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for choice in range(len(asked)):
                        group.create_task(run(choice))
            except* ModeldError as errors:
                for error in errors.exceptions:
                    if isinstance(error, ModeldError):
                        pieces.put_nowait(error)
            finally:
                pieces.put_nowait(None)

        task = asyncio.create_task(run_all())
        try:
            yield _until_none(pieces)
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])


async def _numbered(
    answers: AsyncIterator[Delta | Done],
) -> AsyncIterator[tuple[int, Delta | Done]]:
    async for piece in answers:
        yield 0, piece


async def _until_none(
    pieces: asyncio.Queue[tuple[int, Delta | Done] | ModeldError | None],
) -> AsyncIterator[tuple[int, Delta | Done]]:
    while (piece := await pieces.get()) is not None:
        if isinstance(piece, ModeldError):
            raise piece
        yield piece
