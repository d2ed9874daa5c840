"""How the Responses API shows an answer: as items, whole or event by event."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from backends.contract import Delta, Done, ToolCall
from daemon.api.generation import Piece
from daemon.api.openai.answers import SaidToken
from daemon.api.openai.responses.answers import (
    OutputItem,
    OutputPart,
    Response,
    ResponseEvent,
    ResponseUsage,
    Status,
)
from daemon.api.openai.responses.types import ResponseBody
from daemon.api.openai.shown import extras, said_tokens
from daemon.errors import ModeldError

_Kind = Literal["message", "function_call", "reasoning"]
_DELTAS: dict[_Kind, str] = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
_FAILURES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponseView:
    """See generation.View."""

    def __init__(self, model: str, body: ResponseBody) -> None:
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._body = body
        self._sequence = -1
        self._output: list[OutputItem] = []
        # Of the last item, while it is not whole: its type, the number of its call, what it has.
        self._open: tuple[_Kind, int] | None = None
        self._said: list[str] = []
        self._logprobs: list[SaidToken] = []

    def _event(self, kind: str) -> ResponseEvent:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence}

    def _of_response(self, kind: str, response: Response) -> ResponseEvent:
        return {**self._event(kind), "response": response}

    def _of_item(self, kind: str) -> ResponseEvent:
        """Return an event that has the last item as it is now."""
        item = self._output[-1].copy()
        return {**self._event(kind), "output_index": len(self._output) - 1, "item": item}

    def _in_item(self, kind: str) -> ResponseEvent:
        """Return an event of something in the last item."""
        item = self._output[-1]
        event: ResponseEvent = {
            **self._event(kind),
            "output_index": len(self._output) - 1,
            "item_id": item["id"],
        }
        if item["type"] != "function_call":
            event["content_index"] = 0
        return event

    def begin(self) -> Sequence[Piece]:
        """See View."""
        kinds = ("response.created", "response.in_progress")
        return [self._of_response(kind, self._response("in_progress")) for kind in kinds]

    def piece(self, delta: Delta, choice: int, /) -> Sequence[Piece]:
        """See View."""
        events: list[ResponseEvent] = []
        if delta.reasoning:
            events += self._more("reasoning", delta.reasoning)
        if delta.content or delta.logprobs:
            events += self._more("message", delta.content)
            tokens = said_tokens(delta.logprobs)
            self._logprobs += tokens
            events[-1]["logprobs"] = tokens
        for call in delta.tool_calls:
            events += self._more("function_call", call.arguments, call)
        return events

    def _more(self, kind: _Kind, said: str, call: ToolCall | None = None) -> list[ResponseEvent]:
        """Return the events of what comes to an item, which begins with it if it has not begun."""
        number = call.index if call else 0
        events: list[ResponseEvent] = []
        if self._open != (kind, number):
            events += self._closed("completed")
            self._open = (kind, number)
            self._output.append(_item(kind, call))
            events.append(self._of_item("response.output_item.added"))
            if kind != "function_call":
                added = self._in_item("response.content_part.added")
                events.append({**added, "part": self._part(kind, "")})
        if said or kind == "message":
            self._said.append(said)
            events.append({**self._in_item(f"{_DELTAS[kind]}.delta"), "delta": said})
        return events

    def _part(self, kind: _Kind, text: str) -> OutputPart:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": [*self._logprobs],
        }

    def _closed(self, status: Status) -> list[ResponseEvent]:
        """Return the events that end the last item, if it has not ended."""
        if self._open is None:
            return []
        kind, _ = self._open
        item, said = self._output[-1], "".join(self._said)
        done = self._in_item(f"{_DELTAS[kind]}.done")
        if kind == "function_call":
            item["arguments"] = said
            events: list[ResponseEvent] = [{**done, "arguments": said}]
        else:
            part = self._part(kind, said)
            item["content"] = [part]
            done["text"] = said
            if kind == "message":
                done["logprobs"] = [*self._logprobs]
            events = [done, {**self._in_item("response.content_part.done"), "part": part}]
        item["status"] = status
        events.append(self._of_item("response.output_item.done"))
        self._open, self._said, self._logprobs = None, [], []
        return events

    def end(self, done: Done, choice: int, /) -> Sequence[Piece]:
        """See View."""
        status = _status(done)
        events = self._closed(status)
        response = self._response(status, done)
        return [*events, self._of_response(f"response.{status}", response)]

    def last(self, dones: Sequence[Done], /) -> Sequence[Piece]:
        """See View."""
        return []

    def failure(self, error: ModeldError, /) -> Sequence[Piece]:
        """See View. A response that failed was created, and what was said of it stays in it."""
        events: list[Piece] = [*(self.begin() if self._sequence < 0 else ())]
        events += self._closed("incomplete")
        response = self._response("failed")
        code = _FAILURES.get(error.status, "server_error")
        response["error"] = {"code": code, "message": error.message}
        return [*events, self._of_response("response.failed", response)]

    def whole(self, answers: Sequence[tuple[Delta, Done]], /) -> Piece:
        """See View."""
        ((said, done),) = answers
        self.piece(said, 0)
        status = _status(done)
        self._closed(status)
        return self._response(status, done)

    def _response(self, status: Literal[Status, "failed"], done: Done | None = None) -> Response:
        body = self._body
        text = body.text.format if body.text else None
        response: Response = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": [*self._output],
            "usage": _usage(done) if done else None,
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": _shown(body.reasoning or {}),
            "service_tier": "default",
            "store": False,
            "temperature": body.temperature,
            "text": {"format": _shown(text) if text else {"type": "text"}},
            "tool_choice": _shown(body.tool_choice or "auto"),
            "tools": _shown(body.tools or []),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if done:
            told = extras([done])
            response["timings"] = told["timings"]
            if "notice" in told:
                response["notice"] = told["notice"]
        return response


def _shown(asked: Any) -> Any:
    """Return a part of the request as JSON has it."""
    return msgspec.to_builtins(asked)


def _status(done: Done) -> Status:
    return "incomplete" if done.finish_reason == "length" else "completed"


def _item(kind: _Kind, call: ToolCall | None) -> OutputItem:
    key = uuid.uuid4().hex
    if call is not None:
        return {
            "id": f"fc_{key}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id or f"call_{key}",
            "name": call.name,
            "arguments": "",
        }
    if kind == "reasoning":
        return {
            "id": f"rs_{key}",
            "type": "reasoning",
            "status": "in_progress",
            "summary": [],
            "content": [],
        }
    return {
        "id": f"msg_{key}",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def _usage(done: Done) -> ResponseUsage:
    usage = done.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
