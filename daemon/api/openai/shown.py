"""What chat and completions share of how they are asked and how their answers are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from aiohttp import web

from backends.contract import ChatRequest, CompleteRequest, Done, TokenLogprob
from daemon.api.errors import openai_envelope, read_json
from daemon.api.openai.answers import (
    AnswerTimings,
    Extras,
    LikelyToken,
    SaidToken,
    StreamFailure,
    TextUsage,
)
from daemon.api.openai.types import SEEDS, SamplingBody
from daemon.api.streams import EventStream
from daemon.api.terms import TermsBody
from daemon.errors import InvalidRequest, ModeldError

T = TypeVar("T", ChatRequest, CompleteRequest)
B = TypeVar("B", bound=TermsBody)


async def read_texts(request: web.Request, type_: type[B], field: str) -> B:
    """Return the body of a request whose `field` is texts. Raises InvalidRequest.

    Clients made for models in a cloud may send the ids of tokens instead: of another model's
    vocabulary, so that nothing here could make sense of them.
    """
    try:
        return await read_json(request, type_)
    except InvalidRequest as error:
        if re.search(rf"^{field}\[\d+\]: Expected `str`, got `(int|array)`", error.message):
            raise InvalidRequest(
                f"{field}: tokens are not supported; send texts", param=field
            ) from error
        raise


def stream_of(request: web.Request, body: SamplingBody) -> EventStream | None:
    """Return the stream that is asked for, if one is."""
    return EventStream(request) if body.stream else None


def several(asked: T, count: int | None) -> list[T]:
    """Return the requests for so many choices: with a seed, each has one of its own."""
    seed = asked.sampling.seed
    if seed is None or not count:
        return [asked] * (count or 1)
    samplings = [replace(asked.sampling, seed=(seed + choice) % SEEDS) for choice in range(count)]
    return [replace(asked, sampling=sampling) for sampling in samplings]


def _token(entry: TokenLogprob) -> LikelyToken:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.bytes)}


def said_tokens(entries: Sequence[TokenLogprob]) -> list[SaidToken]:
    """Return the log-probabilities of an answer's tokens."""
    return [
        {**_token(entry), "top_logprobs": [_token(top) for top in entry.top]} for entry in entries
    ]


def usage(dones: Sequence[Done], each: int | None = None) -> TextUsage:
    """Return what a request cost; `each` is how many choices share a prompt, None: all do.

    A prompt that choices share counts once.
    """
    prompts = [done.usage for done in dones[:: each or len(dones)]]
    prompt_tokens = sum(prompt.prompt_tokens for prompt in prompts)
    completion_tokens = sum(done.usage.completion_tokens for done in dones)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(p.cached_tokens for p in prompts)},
    }


def extras(dones: Sequence[Done]) -> Extras:
    """Return what is told beyond what the API has: times, and what was not as asked for."""
    timings: AnswerTimings = {
        "prompt_ms": sum(done.timings.prompt_ms for done in dones),
        "predicted_ms": sum(done.timings.predicted_ms for done in dones),
    }
    notice = next((done.notice for done in dones if done.notice), "")
    return {"timings": timings, "notice": notice} if notice else {"timings": timings}


def failure(error: ModeldError) -> StreamFailure:
    """Return the event of an error after the stream has begun."""
    told: StreamFailure = {"error": openai_envelope(error)["error"]}
    if error.retry_after_s is not None:  # the headers are out: there is no other place
        told["retry_after_s"] = error.retry_after_s
    return told
