"""How the Anthropic API shows an answer: blocks of a message, whole or piece by piece."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from backends.contract import Delta, Done, ToolCall
from daemon.api.anthropic.types import MessagesBody
from daemon.api.errors import anthropic_envelope
from daemon.api.generation import Piece
from daemon.errors import EngineError, ModeldError

_UNSIGNED = "unsigned"  # clients give it back; nobody here looks at it


class MessageUsage(TypedDict):
    """Tokens of one message. The prompt is those that were read and those that were cached."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class AnswerBlock(TypedDict):
    """A part of an answer: `type` says which of the others it has.

    `text`: text; `thinking`: thinking and signature; `tool_use`: id, name and input.
    """

    type: Literal["text", "thinking", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


class MessageAnswer(TypedDict):
    """A whole message. `notice` says, for a person, what was not as it was asked for."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    notice: NotRequired[str]


class BlockDelta(TypedDict):
    """What comes to a block, by its `type`, or how the message ended."""

    type: NotRequired[
        Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]
    ]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    partial_json: NotRequired[str]
    stop_reason: NotRequired[str]
    stop_sequence: NotRequired[str | None]


class MessageFailure(TypedDict):
    """What went wrong after the stream had begun."""

    type: str
    message: str


class MessageEvent(TypedDict):
    """One event of a stream; its name is its `type`, which says which of the others it has.

    `message_start`: message; `content_block_start`: index and content_block; `content_block_delta`:
    index and delta; `content_block_stop`: index; `message_delta`: delta, usage and, if there is
    one, the notice; `error`: error; `ping` and `message_stop`: nothing.
    """

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
    message: NotRequired[MessageAnswer]
    index: NotRequired[int]
    content_block: NotRequired[AnswerBlock]
    delta: NotRequired[BlockDelta]
    usage: NotRequired[MessageUsage]
    error: NotRequired[MessageFailure]
    notice: NotRequired[str]


class TokenCount(TypedDict):
    """How many tokens a prompt has."""

    input_tokens: int


class MessageView:
    """See generation.View."""

    def __init__(self, model: str, body: MessagesBody) -> None:
        self._model = model
        self._max_tokens = body.max_tokens
        thinking = body.thinking
        self._thinks = thinking is None or thinking.type != "disabled"
        self._omits = thinking is not None and thinking.display == "omitted"
        self._index = -1
        self._open: tuple[str, int] | None = None  # the block's type, and the number of a call
        self._called = False

    def _message(self, content: list[AnswerBlock], done: Done | None = None) -> MessageAnswer:
        message: MessageAnswer = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._stop_reason(done) if done else None,
            "stop_sequence": (done.stopped_by or None) if done else None,
            "usage": _usage(done or Done(finish_reason="")),
        }
        if done and done.notice:
            message["notice"] = done.notice
        return message

    def _stop_reason(self, done: Done) -> str:
        if self._called and done.finish_reason != "length":
            return "tool_use"
        if done.finish_reason == "length":
            whole = done.usage.completion_tokens >= self._max_tokens
            return "max_tokens" if whole else "model_context_window_exceeded"
        return "stop_sequence" if done.stopped_by else "end_turn"

    def begin(self) -> Sequence[Piece]:
        """See View. What the prompt cost is not known yet: the message's end tells it."""
        events: list[MessageEvent] = [
            {"type": "message_start", "message": self._message([])},
            {"type": "ping"},
        ]
        return events

    def piece(self, delta: Delta, choice: int, /) -> Sequence[Piece]:
        """See View."""
        events: list[MessageEvent] = []
        if delta.reasoning and self._thinks:
            thinking = "" if self._omits else delta.reasoning
            events += self._opened(
                "thinking", {"type": "thinking", "thinking": "", "signature": ""}
            )
            if thinking:
                events.append(self._change({"type": "thinking_delta", "thinking": thinking}))
        if delta.content:
            events += self._opened("text", {"type": "text", "text": ""})
            events.append(self._change({"type": "text_delta", "text": delta.content}))
        for call in delta.tool_calls:
            self._called = True
            events += self._opened("tool_use", _call(call, {}), call.index)
            if call.arguments:
                change: BlockDelta = {"type": "input_json_delta", "partial_json": call.arguments}
                events.append(self._change(change))
        return events

    def _opened(self, kind: str, block: AnswerBlock, number: int = 0) -> Iterable[MessageEvent]:
        """Return what begins a block, if it is not the one that has begun already."""
        if self._open == (kind, number):
            return []
        events = self._closed()
        self._open = (kind, number)
        self._index += 1
        started: MessageEvent = {
            "type": "content_block_start",
            "index": self._index,
            "content_block": block,
        }
        return [*events, started]

    def _closed(self) -> list[MessageEvent]:
        events: list[MessageEvent] = []
        if self._open is not None:
            if self._open[0] == "thinking":
                signed: BlockDelta = {"type": "signature_delta", "signature": _UNSIGNED}
                events.append(self._change(signed))
            events.append({"type": "content_block_stop", "index": self._index})
        self._open = None
        return events

    def _change(self, change: BlockDelta) -> MessageEvent:
        return {"type": "content_block_delta", "index": self._index, "delta": change}

    def end(self, done: Done, choice: int, /) -> Sequence[Piece]:
        """See View."""
        ended: MessageEvent = {
            "type": "message_delta",
            "delta": {
                "stop_reason": self._stop_reason(done),
                "stop_sequence": done.stopped_by or None,
            },
            "usage": _usage(done),
        }
        if done.notice:
            ended["notice"] = done.notice
        return [*self._closed(), ended]

    def last(self, dones: Sequence[Done], /) -> Sequence[Piece]:
        """See View."""
        stop: MessageEvent = {"type": "message_stop"}
        return [stop]

    def failure(self, error: ModeldError, /) -> Sequence[Piece]:
        """See View."""
        return [anthropic_envelope(error)]

    def whole(self, answers: Sequence[tuple[Delta, Done]], /) -> Piece:
        """See View. Raises EngineError for a call whose arguments are no JSON object."""
        ((said, done),) = answers
        content: list[AnswerBlock] = []
        if said.reasoning and self._thinks:
            thinking = "" if self._omits else said.reasoning
            content.append({"type": "thinking", "thinking": thinking, "signature": _UNSIGNED})
        if said.content:
            content.append({"type": "text", "text": said.content})
        for call in said.tool_calls:
            self._called = True
            content.append(_call(call, _input(call, cut=done.finish_reason == "length")))
        return self._message(content, done)


def _call(call: ToolCall, given: dict[str, Any]) -> AnswerBlock:
    key = call.id or f"toolu_{uuid.uuid4().hex}"
    return {"type": "tool_use", "id": key, "name": call.name, "input": given}


def _input(call: ToolCall, *, cut: bool) -> dict[str, Any]:
    """Return a call's arguments; none of a call that was cut short."""
    try:
        given = json.loads(call.arguments or "{}")
    except ValueError:
        given = None
    if isinstance(given, dict):
        return given
    if cut:
        return {}
    raise EngineError(f"the model called {call.name} with arguments that are no JSON object")


def _usage(done: Done) -> MessageUsage:
    usage = done.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }
