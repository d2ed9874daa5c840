"""Chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from aiohttp import web

from backends.contract import Delta, Done, ToolCall
from daemon.api.context import asked_model
from daemon.api.errors import read_json
from daemon.api.generation import answer
from daemon.api.openai.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FunctionCallPiece,
    StreamFailure,
    ToolCallPiece,
)
from daemon.api.openai.shown import extras, failure, said_tokens, several, stream_of, usage
from daemon.api.openai.types import ChatBody
from daemon.api.operation import WORK, operation
from daemon.api.streams import DONE
from daemon.errors import ModeldError


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/v1/chat/completions", chat_completions)]


@operation(ChatCompletion, body=ChatBody, stream=(ChatChunk, StreamFailure), last=DONE, errors=WORK)
async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, at once or as a stream."""
    body = await read_json(request, ChatBody)
    record = asked_model(request, body.model)
    view = _ChatView(record.unique, include_usage=body.include_usage)
    asked = several(body.to_backend(), body.n)
    stream = stream_of(request, body)
    return await answer(request, record, asked, body.terms(), view=view, stream=stream)


def _logprobs(delta: Delta) -> ChatLogprobs | None:
    if not delta.logprobs:
        return None
    return {"content": said_tokens(delta.logprobs), "refusal": None}


def _call_piece(call: ToolCall) -> ToolCallPiece:
    function: FunctionCallPiece = {"arguments": call.arguments}
    if call.name:
        function["name"] = call.name
    piece: ToolCallPiece = {"index": call.index, "function": function}
    if call.id:
        piece["id"] = call.id
        piece["type"] = "function"
    return piece


class _ChatView:
    """See generation.View. All parts of an answer share an id."""

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._include_usage = include_usage
        self._begun: set[int] = set()

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": list(choices),
        }

    def begin(self) -> list[ChatChunk]:
        """See View."""
        return []

    def _role(self, choice: int) -> list[ChatChunk]:
        if choice in self._begun:
            return []
        self._begun.add(choice)
        delta: ChatDelta = {"role": "assistant", "content": ""}
        return [self._chunk({"index": choice, "delta": delta, "finish_reason": None})]

    def piece(self, delta: Delta, choice: int, /) -> list[ChatChunk]:
        """See View."""
        said: ChatDelta = {}
        if delta.content:
            said["content"] = delta.content
        if delta.reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            said["tool_calls"] = [_call_piece(call) for call in delta.tool_calls]
        new: ChatChunkChoice = {"index": choice, "delta": said, "finish_reason": None}
        if logprobs := _logprobs(delta):
            new["logprobs"] = logprobs
        return [*self._role(choice), self._chunk(new)]

    def end(self, done: Done, choice: int, /) -> list[ChatChunk]:
        """See View."""
        last = self._chunk({"index": choice, "delta": {}, "finish_reason": done.finish_reason})
        return [*self._role(choice), {**last, **extras([done])}]

    def last(self, dones: Sequence[Done], /) -> list[ChatChunk]:
        """See View."""
        return [{**self._chunk(), "usage": usage(dones)}] if self._include_usage else []

    def failure(self, error: ModeldError, /) -> Sequence[StreamFailure]:
        """See View."""
        return [failure(error)]

    def whole(self, answers: Sequence[tuple[Delta, Done]], /) -> ChatCompletion:
        """See View."""
        choices: list[ChatChoice] = [
            {
                "index": index,
                "message": _message(said),
                "finish_reason": done.finish_reason,
                "logprobs": _logprobs(said),
            }
            for index, (said, done) in enumerate(answers)
        ]
        dones = [done for _, done in answers]
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage(dones),
            **extras(dones),
        }


def _message(said: Delta) -> AssistantMessage:
    message: AssistantMessage = {"role": "assistant", "content": said.content, "refusal": None}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.tool_calls:
        message["content"] = said.content or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in said.tool_calls
        ]
    return message
