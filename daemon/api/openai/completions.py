"""Completions: bare text in, more of it out; with a suffix, what goes in between."""

from __future__ import annotations

import time
import uuid
from typing import Any

from aiohttp import web

from backends.contract import Delta, Done, TokenLogprob
from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.openai.generation import answer, timings, usage
from daemon.api.openai.types import CompletionBody


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/v1/completions", completions)]


async def completions(request: web.Request) -> web.StreamResponse:
    """Go on from a text, at once or as a stream."""
    body = await read_json(request, CompletionBody)
    record = services(request).catalog.get(body.model)
    return await answer(request, record, body, body.to_backend(), _TextView(record.unique))


class _TextView:
    """See generation.View."""

    def __init__(self, model: str) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._offset = 0  # characters of the answer that are out

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, delta: Delta, finish_reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(delta.logprobs)
        return self._object(
            [
                {
                    "text": delta.content,
                    "index": 0,
                    "logprobs": logprobs,
                    "finish_reason": finish_reason,
                }
            ]
        )

    def _logprobs(self, entries: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        """Return the log-probabilities in the form that this older API has for them."""
        if not entries:
            return None
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry.token)
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    def begin(self) -> list[dict[str, Any]]:
        """See View."""
        return []

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """See View."""
        return self._choice(delta, None)

    def end(self, done: Done) -> dict[str, Any]:
        """See View."""
        return self._choice(Delta(), done.finish_reason)

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        """See View."""
        return self._object([]) | {"usage": usage(done.usage)}

    def whole(self, answer: Delta, done: Done) -> dict[str, Any]:
        """See View."""
        whole = self._choice(answer, done.finish_reason)
        return whole | {"usage": usage(done.usage), "timings": timings(done)}
