"""Completions: bare text in, more of it out; with a suffix, what goes in between."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from aiohttp import web

from backends.contract import Delta, Done, TokenLogprob
from daemon.api.context import asked_model
from daemon.api.generation import answer
from daemon.api.openai.answers import (
    StreamFailure,
    TextChoice,
    TextChunk,
    TextCompletion,
    TextLogprobs,
)
from daemon.api.openai.shown import extras, failure, read_texts, several, stream_of, usage
from daemon.api.openai.types import CompletionBody
from daemon.api.operation import WORK, operation
from daemon.api.streams import DONE
from daemon.errors import ModeldError


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/v1/completions", completions)]


@operation(
    TextCompletion, body=CompletionBody, stream=(TextChunk, StreamFailure), last=DONE, errors=WORK
)
async def completions(request: web.Request) -> web.StreamResponse:
    """Go on from a text, at once or as a stream."""
    body = await read_texts(request, CompletionBody, "prompt")
    record = asked_model(request, body.model)
    view = _TextView(record.unique, include_usage=body.include_usage, each=body.n or 1)
    asked = [choice for each in body.to_backend() for choice in several(each, body.n)]
    stream = stream_of(request, body)
    return await answer(request, record, asked, body.terms(), view=view, stream=stream)


class _TextView:
    """See generation.View. All parts of an answer share an id; a prompt has `each` choices."""

    def __init__(self, model: str, *, include_usage: bool, each: int) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._include_usage = include_usage
        self._each = each
        self._offsets: dict[int, int] = {}  # characters of each choice that are out

    def _chunk(self, *choices: TextChoice) -> TextChunk:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": list(choices),
        }

    def _choice(self, delta: Delta, index: int, finish_reason: str | None) -> TextChoice:
        return {
            "text": delta.content,
            "index": index,
            "logprobs": self._logprobs(delta.logprobs, index),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, entries: tuple[TokenLogprob, ...], index: int) -> TextLogprobs | None:
        """Return the log-probabilities in the form that this older API has for them."""
        if not entries:
            return None
        offsets = []
        offset = self._offsets.get(index, 0)
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.token)
        self._offsets[index] = offset
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    def begin(self) -> list[TextChunk]:
        """See View."""
        return []

    def piece(self, delta: Delta, choice: int, /) -> list[TextChunk]:
        """See View."""
        return [self._chunk(self._choice(delta, choice, None))]

    def end(self, done: Done, choice: int, /) -> list[TextChunk]:
        """See View."""
        last = self._chunk(self._choice(Delta(), choice, done.finish_reason))
        return [{**last, **extras([done])}]

    def last(self, dones: Sequence[Done], /) -> list[TextChunk]:
        """See View."""
        if not self._include_usage:
            return []
        return [{**self._chunk(), "usage": usage(dones, self._each)}]

    def failure(self, error: ModeldError, /) -> Sequence[StreamFailure]:
        """See View."""
        return [failure(error)]

    def whole(self, answers: Sequence[tuple[Delta, Done]], /) -> TextCompletion:
        """See View."""
        choices = [
            self._choice(said, index, done.finish_reason)
            for index, (said, done) in enumerate(answers)
        ]
        dones = [done for _, done in answers]
        spent = usage(dones, self._each)
        return {**self._chunk(*choices), "usage": spent, **extras(dones)}
