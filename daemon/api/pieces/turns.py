"""Turns of conversations: those of one conversation come one after the other, others at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
import weakref
from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from backends.contract import ChatRequest, Delta, Done, Sampling
from backends.roles import joined
from daemon.api.context import services
from daemon.api.pieces import aliases
from daemon.api.pieces.conversations import name_for
from daemon.api.pieces.messages import NO_CONVERSATION
from daemon.api.pieces.questions import (
    Frame,
    Question,
    Turn,
    answered,
    before,
    failed,
    frame,
    prompt,
)
from daemon.catalog.record import ModelRecord
from daemon.chats import Chat
from daemon.errors import (
    ContextLengthExceeded,
    EngineError,
    InsufficientDisk,
    InternalError,
    InvalidRequest,
    ModeldError,
    QueueFull,
)

_SAMPLING = Sampling(temperature=0)
# What of a context the earlier turns may fill once they had to be shortened: an answer needs room.
_FILLED = 0.75
_LINES: web.AppKey[Lines] = web.AppKey("lines")
log = logging.getLogger(__name__)


def keep(app: web.Application) -> None:
    """Have `app` know which turns wait or run."""
    app[_LINES] = Lines()


def asked(messages: Iterable[dict[str, Any]]) -> ChatRequest:
    """Return what a model is asked. Pure."""
    return ChatRequest(messages=tuple(joined(messages)), sampling=_SAMPLING)


class Lines:
    """The turns of all sockets that wait or run, by their conversations."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._running: dict[asyncio.Task[None], str] = {}

    def __len__(self) -> int:
        return len(self._running)

    def of(self, chat_id: str) -> asyncio.Lock:
        """Return the lock that the present turn of a conversation holds; keep it while in use."""
        return self._locks.setdefault(chat_id, asyncio.Lock())

    def enter(self, chat_id: str, work: asyncio.Task[None]) -> None:
        """Take note of a turn until it has ended."""
        self._running[work] = chat_id
        work.add_done_callback(self._running.pop)

    def stop(self, chat_id: str) -> None:
        """End the turns of a conversation, wherever they were asked."""
        for work, key in self._running.items():
            if key == chat_id:
                work.cancel()


class Turns:
    """The turns of one socket."""

    def __init__(self, request: web.Request, socket: web.WebSocketResponse) -> None:
        self._request = request
        self._socket = socket
        self._parts = services(request)
        self._lines = request.config_dict[_LINES]
        self._works: set[asyncio.Task[None]] = set()
        self._tellers: set[asyncio.Task[None]] = set()

    async def read(self) -> None:
        """Take what the client sends until it leaves."""
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                continue
            try:
                turn = msgspec.json.decode(message.data, type=Turn, strict=False)
                self._take(turn)
            except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
                refusal = InvalidRequest(f"not understood: {error}")
                await self._socket.send_json(failed("", "", refusal))
            except ModeldError as error:
                refused = failed(turn.request or "", turn.conversation or "", error)
                await self._socket.send_json(refused)

    async def close(self) -> None:
        """End all turns: nobody hears of them any more."""
        tasks = [*self._works, *self._tellers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, turn: Turn) -> None:
        """Begin a turn, or stop some. Raises ModeldError."""
        if turn.reset:
            for work in self._works:
                work.cancel()
            return
        if turn.stop:
            self._lines.stop(turn.conversation or "")
            return
        question = turn.question or turn.relevance
        if question is None:
            raise InvalidRequest("neither a question nor a relevance")
        if len(self._lines) >= self._parts.config.models.queue_limit:
            raise QueueFull(f"{len(self._lines)} questions wait already ([models] queue_limit)")
        aliases.chosen(self._request, question.model)  # or there would be an empty conversation
        chat = self._chat(turn, question)
        key = turn.request or str(uuid.uuid4())
        work = asyncio.create_task(self._work(key, chat, question))
        self._lines.enter(chat.id, work)
        # Another task tells how it ended: one that is cancelled at once does not even begin.
        teller = asyncio.create_task(self._tell(key, chat.id, work))
        for task, tasks in ((work, self._works), (teller, self._tellers)):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def _chat(self, turn: Turn, question: Question) -> Chat:
        """Return the conversation of a turn, a new one if none is named. Raises InvalidRequest."""
        if not turn.conversation:
            return self._parts.chats.create(name_for(question.query))
        chat = self._parts.chats.get(turn.conversation)
        if chat is None:
            raise InvalidRequest(NO_CONVERSATION)
        return chat

    async def _tell(self, key: str, chat_id: str, work: asyncio.Task[None]) -> None:
        """Say how a turn ended."""
        await asyncio.wait([work])
        end: Frame = frame(key, chat_id, "STOPPED" if work.cancelled() else "COMPLETED")
        error = None if work.cancelled() else work.exception()
        if isinstance(error, ConnectionError):
            return  # nobody is there to hear it
        if isinstance(error, ModeldError):
            end = failed(key, chat_id, error)
        elif error is not None:
            log.error("a turn of a conversation failed", exc_info=error)
            end = failed(key, chat_id, InternalError("modeld failed; its log says why"))
        with contextlib.suppress(ConnectionError):
            await self._socket.send_json(end)

    async def _work(self, key: str, chat: Chat, question: Question) -> None:
        """Answer a turn once those before it have ended, and keep both. Raises ModeldError."""
        async with self._lines.of(chat.id):
            chats = self._parts.chats
            if chats.get(chat.id) is None:  # it was deleted while this turn waited
                raise InvalidRequest(NO_CONVERSATION)
            text = prompt(question)
            history = before(question, chats, chat.id)
            record = aliases.chosen(self._request, question.model)
            question_kept = chats.say(chat.id, "user", text, record.id)
            said: list[str] = []
            try:
                history.append({"role": "user", "content": text})
                await self._generate(key, chat, record, history, said)
            finally:
                if said:  # what was said is kept, also if that is not all
                    chats.say(chat.id, "assistant", "".join(said), record.id)
                elif question_kept and chats.get(chat.id):
                    # Without an answer it would become a part of the next question.
                    with contextlib.suppress(InsufficientDisk):
                        chats.unsay(question_kept)

    async def _generate(
        self,
        key: str,
        chat: Chat,
        record: ModelRecord,
        history: list[dict[str, Any]],
        said: list[str],
    ) -> None:
        """Send an answer piece by piece. A context that is too short loses the oldest turns."""
        while True:
            try:
                async with self._parts.models.generate(record, asked(history)) as answers:
                    async for piece in answers:
                        if isinstance(piece, Done):
                            if piece.finish_reason == "cancelled":
                                raise EngineError("the request was ended before its answer was")
                            return
                        await self._send(key, chat.id, piece, said)
            except ContextLengthExceeded as error:
                if len(history) <= 1 or said:
                    raise
                history = shorter(history, error.tokens, self._context_length(record))
            else:
                raise EngineError("the engine ended the answer without saying why")

    def _context_length(self, record: ModelRecord) -> int:
        return self._parts.models.status(record.id).context_length or 0

    async def _send(self, key: str, chat_id: str, piece: Delta, said: list[str]) -> None:
        if not piece.content:
            return
        said.append(piece.content)
        part = frame(key, chat_id, "IN-PROGRESS")
        part["question"] = answered(piece.content)
        await self._socket.send_json(part)


def shorter(
    history: list[dict[str, Any]], tokens: int | None, context_length: int
) -> list[dict[str, Any]]:
    """Return a conversation without its oldest turn, or without more; the last message stays. Pure.

    If it is known how many tokens it has, and how many it may have, then so many turns are left out
    as seem to be too many: one at a time would take a while for a long conversation.
    """
    too_long = sum(len(message["content"]) for message in history)
    wanted = too_long
    if tokens and 0 < context_length < tokens:
        wanted = int(too_long * context_length * _FILLED / tokens)
    rest, length = history, too_long
    while len(rest) > 1 and (rest is history or length > wanted or rest[0]["role"] != "user"):
        length -= len(rest[0]["content"])
        rest = rest[1:]
    return rest
