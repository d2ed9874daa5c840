"""Chat completions."""

from __future__ import annotations

import time
import uuid
from typing import Any

from aiohttp import web

from backends.contract import Delta, Done, TokenLogprob
from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.openai.generation import answer, timings, usage
from daemon.api.openai.types import ChatBody


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/v1/chat/completions", chat_completions)]


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, at once or as a stream."""
    body = await read_json(request, ChatBody)
    record = services(request).catalog.get(body.model)
    asked = body.to_backend()
    return await answer(request, record, body, asked, _ChatView(record.unique))


def _token(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.bytes)}


def _logprobs(delta: Delta) -> dict[str, Any]:
    if not delta.logprobs:
        return {}
    content = [
        _token(entry) | {"top_logprobs": [_token(top) for top in entry.top]}
        for entry in delta.logprobs
    ]
    return {"logprobs": {"content": content, "refusal": None}}


class _ChatView:
    """See generation.View."""

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

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **more}
        return self._object("chat.completion.chunk", [choice])

    def begin(self) -> list[dict[str, Any]]:
        """See View."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """See View."""
        said: dict[str, Any] = {}
        if delta.content:
            said["content"] = delta.content
        if delta.reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            said["tool_calls"] = [
                {"index": call.index}
                | ({"id": call.id, "type": "function"} if call.id else {})
                | {
                    "function": ({"name": call.name} if call.name else {})
                    | {"arguments": call.arguments}
                }
                for call in delta.tool_calls
            ]
        return self._chunk(said, **_logprobs(delta))

    def end(self, done: Done) -> dict[str, Any]:
        """See View."""
        return self._chunk({}, done.finish_reason)

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        """See View."""
        return self._object("chat.completion.chunk", []) | {"usage": usage(done.usage)}

    def whole(self, answer: Delta, done: Done) -> dict[str, Any]:
        """See View."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.tool_calls
            ]
        choice = {"index": 0, "message": message, "finish_reason": done.finish_reason}
        whole = self._object("chat.completion", [choice | _logprobs(answer)])
        return whole | {"usage": usage(done.usage), "timings": timings(done)}
