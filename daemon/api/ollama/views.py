"""How Ollama's API shows an answer: whole, or in pieces that end with one that is `done`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from backends.contract import Delta, Done, TokenLogprob, ToolCall
from daemon.api.generation import Piece, joined
from daemon.api.ollama.answers import Call, CallFunction, ChosenLogprob, Logprob, Said, timestamp
from daemon.errors import EngineError, ModeldError

_NS = 1_000_000  # of a millisecond


def _token(entry: TokenLogprob) -> Logprob:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.bytes)}


def _logprobs(entries: Sequence[TokenLogprob]) -> list[ChosenLogprob]:
    return [
        {**_token(entry), "top_logprobs": [_token(top) for top in entry.top]} for entry in entries
    ]


class _View:
    """What both kinds of answers share. See generation.View."""

    def __init__(self, model: str, *, thinks: bool) -> None:
        self._model = model
        self._thinks = thinks
        self._began = time.monotonic()
        self._first: float | None = None
        self._calls: list[Delta] = []

    def _said(self, delta: Delta) -> dict[str, Any]:
        """Return the part of an answer that has its text."""
        raise NotImplementedError

    def _object(self, delta: Delta, *, done: Done | None = None) -> dict[str, Any]:
        shown: dict[str, Any] = {"model": self._model, "created_at": timestamp()}
        shown |= self._said(delta)
        shown["done"] = done is not None
        if delta.logprobs:
            shown["logprobs"] = _logprobs(delta.logprobs)
        return shown | (self._cost(done) if done is not None else {})

    def _cost(self, done: Done) -> dict[str, Any]:
        """Return how the answer ended, and what it cost. Loading is what came before the prompt."""
        now = time.monotonic()
        prompt_ns, said_ns = (
            int(ms * _NS) for ms in (done.timings.prompt_ms, done.timings.predicted_ms)
        )
        first = self._first or now - said_ns / 1e9
        waited_ns = int((first - self._began) * 1e9)
        cost: dict[str, Any] = {
            "done_reason": "length" if done.finish_reason == "length" else "stop",
            "total_duration": int((now - self._began) * 1e9),
            "load_duration": max(0, waited_ns - prompt_ns),
            "prompt_eval_count": done.usage.prompt_tokens,
            "prompt_eval_duration": prompt_ns,
            "eval_count": done.usage.completion_tokens,
            "eval_duration": said_ns,
        }
        return cost | ({"notice": done.notice} if done.notice else {})

    def begin(self) -> list[Piece]:
        """See View."""
        return []

    def piece(self, delta: Delta, _: int, /) -> list[Piece]:
        """See View. A call of a tool is told whole, once all of it is there."""
        self._first = self._first or time.monotonic()
        if delta.tool_calls:
            self._calls.append(delta)
        if not (delta.content or delta.logprobs or (delta.reasoning and self._thinks)):
            return []
        return [
            self._object(
                Delta(content=delta.content, reasoning=delta.reasoning, logprobs=delta.logprobs)
            )
        ]

    def end(self, done: Done, _: int, /) -> list[Piece]:
        """See View."""
        calls = _uncut(joined(self._calls).tool_calls, done)
        shown: list[Piece] = [self._object(Delta(tool_calls=calls))] if calls else []
        return [*shown, self._object(Delta(), done=done)]

    def last(self, _: Sequence[Done], /) -> list[Piece]:
        """See View."""
        return []

    def failure(self, error: ModeldError, /) -> Sequence[Piece]:
        """See View."""
        return [{"error": error.message}]

    def whole(self, answers: Sequence[tuple[Delta, Done]], /) -> Piece:
        """See View."""
        ((said, done),) = answers
        return self._object(replace(said, tool_calls=_uncut(said.tool_calls, done)), done=done)


class ChatView(_View):
    """Answers of POST /api/chat."""

    def _said(self, delta: Delta) -> dict[str, Any]:
        message: Said = {"role": "assistant", "content": delta.content}
        if delta.reasoning and self._thinks:
            message["thinking"] = delta.reasoning
        if delta.tool_calls:
            message["tool_calls"] = [_call(call) for call in delta.tool_calls]
        return {"message": message}


class GenerateView(_View):
    """Answers of POST /api/generate."""

    def _said(self, delta: Delta) -> dict[str, Any]:
        thinking = {"thinking": delta.reasoning} if delta.reasoning and self._thinks else {}
        return {"response": delta.content, **thinking}


def _uncut(calls: tuple[ToolCall, ...], done: Done) -> tuple[ToolCall, ...]:
    """Return the calls without one that the answer's limit has cut short: nobody could make it."""
    if done.finish_reason == "length" and calls:
        try:
            json.loads(calls[-1].arguments or "{}")
        except ValueError:
            return calls[:-1]
    return calls


def _call(call: ToolCall) -> Call:
    """Return a call with its arguments as an object. Raises EngineError if they are none."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise EngineError(f"the model's call of {call.name} has arguments that are no JSON object")
    function: CallFunction = {"index": call.index, "name": call.name, "arguments": arguments}
    return {"id": call.id, "function": function}
