"""What an OpenAI-compatible upstream answers, checked and turned into the contract's values. Pure.

Raises BackendError for an answer that is not what it should be: nothing is filled in.
"""

from __future__ import annotations

import base64
import binascii
import struct
import time
from typing import Any, TypeVar

import msgspec

from backends.contract import (
    BackendError,
    Delta,
    Done,
    Embeddings,
    Scores,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)

T = TypeVar("T")
_ENDS = {"length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}
_BAD_ENDS = frozenset({"content_filter", "error", "abort", "cancelled"})
PASSED_ON = "modeld:remote"  # `owned_by` of what a modeld lists, but has from its own upstreams
_CONTEXT_NAMES = "context_length max_model_len context_window max_context_length".split()
_META_NAMES = "n_ctx context_length n_ctx_train".split()


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None

    def to_contract(self) -> Usage:
        details = self.prompt_tokens_details
        prompt = self.prompt_tokens
        # Rerankers tell the total alone, and write nothing.
        return Usage(
            prompt_tokens=(self.total_tokens or 0) if prompt is None else prompt,
            completion_tokens=self.completion_tokens or 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )


class _Token(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[_Token] | None = None

    def to_contract(self) -> TokenLogprob:
        return TokenLogprob(
            token=self.token,
            logprob=self.logprob,
            bytes=tuple(self.bytes or ()),
            top=tuple(token.to_contract() for token in self.top_logprobs or ()),
        )


class _Logprobs(msgspec.Struct):
    """Those of chats have `content`, those of completions the parallel lists."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None

    def to_contract(self) -> tuple[TokenLogprob, ...]:
        if self.content is not None:
            return tuple(token.to_contract() for token in self.content)
        tokens, chosen = self.tokens or [], self.token_logprobs or []
        alternatives = self.top_logprobs or [None] * len(tokens)
        return tuple(
            TokenLogprob(
                token=token,
                logprob=logprob,
                top=tuple(TokenLogprob(token=t, logprob=p) for t, p in (top or {}).items()),
            )
            for token, logprob, top in zip(tokens, chosen, alternatives, strict=False)
            if logprob is not None
        )


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    delta: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # vLLM's: the stop sequence, or the id of a stop token
    logprobs: _Logprobs | None = None

    def to_delta(self) -> Delta:
        message = self.delta or _Message()
        calls = tuple(
            ToolCall(
                index=position if call.index is None else call.index,
                id=call.id or "",
                name=call.function.name or "",
                arguments=call.function.arguments or "",
            )
            for position, call in enumerate(message.tool_calls or ())
        )
        return Delta(
            content=message.content or self.text or "",
            reasoning=message.reasoning_content or message.reasoning or "",
            tool_calls=calls,
            logprobs=self.logprobs.to_contract() if self.logprobs else (),
        )


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


def _convert(value: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise BackendError(
            "engine_error", f"its answer is not what it should be: {error}"
        ) from error


class Reading:
    """One streamed answer: `feed` it chunk after chunk, and ask for the `done` at its end."""

    def __init__(self) -> None:
        self._usage = Usage()
        self._finish_reason = self._stopped_by = ""
        self._announced = False
        self._started = time.monotonic()
        self._first: float | None = None

    def feed(self, chunk: object) -> Delta | None:
        """Return the piece in `chunk`, if there is one; None is the word that this is the end."""
        if chunk is None:
            self._announced = True
            return None
        read = _convert(chunk, _Chunk)
        if read.usage is not None:
            self._usage = read.usage.to_contract()
        if not read.choices:
            return None
        choice = read.choices[0]
        if choice.finish_reason:
            self._finish_reason = choice.finish_reason
            self._stopped_by = choice.stop_reason if isinstance(choice.stop_reason, str) else ""
        delta = choice.to_delta()
        if delta == Delta():
            return None
        if self._first is None:
            self._first = time.monotonic()
        return delta

    def done(self) -> Done:
        """Return how the answer ended.

        Raises BackendError for one that was cut off, since it would look like a shorter answer.
        """
        if not self._finish_reason and not self._announced:
            raise BackendError(
                "engine_error", "it ended its answer in the middle, without a finish_reason"
            )
        if self._finish_reason in _BAD_ENDS:
            raise BackendError(
                "engine_error",
                f"it ended its answer early, with the finish_reason {self._finish_reason!r}",
            )
        now = time.monotonic()
        first = self._first or now
        return Done(
            finish_reason=_ENDS.get(self._finish_reason, "stop"),
            usage=self._usage,
            timings=Timings(
                prompt_ms=(first - self._started) * 1e3, predicted_ms=(now - first) * 1e3
            ),
            stopped_by=self._stopped_by,
        )


class _Embedding(msgspec.Struct):
    index: int
    embedding: str | list[float]

    def vector(self) -> bytes:
        if isinstance(self.embedding, str):
            return base64.b64decode(self.embedding, validate=True)
        return struct.pack(f"<{len(self.embedding)}f", *self.embedding)


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: _Usage | None = None


def embeddings(answer: object, count: int) -> Embeddings:
    """Return the vectors for `count` inputs."""
    read = _convert(answer, _Embeddings)
    _check_indices([entry.index for entry in read.data], count, "vectors for {} inputs")
    try:
        vectors = [e.vector() for e in sorted(read.data, key=lambda e: e.index)]
    except (binascii.Error, struct.error, OverflowError) as error:
        raise BackendError("engine_error", f"one of its vectors is broken: {error}") from error
    sizes = {len(vector) for vector in vectors}
    if len(sizes) != 1 or any(size == 0 or size % 4 for size in sizes):
        raise BackendError("engine_error", f"its vectors have odd sizes: {sorted(sizes)} bytes")
    return Embeddings(
        vectors=tuple(vectors),
        dimensions=sizes.pop() // 4,
        usage=read.usage.to_contract() if read.usage else Usage(),
    )


class _Score(msgspec.Struct):
    index: int
    relevance_score: float


class _Scores(msgspec.Struct):
    results: list[_Score]
    usage: _Usage | None = None


def scores(answer: object, count: int) -> Scores:
    """Return the scores of `count` documents."""
    read = _convert(answer, _Scores)
    _check_indices([entry.index for entry in read.results], count, "scores for {} documents")
    ordered = sorted(read.results, key=lambda entry: entry.index)
    return Scores(
        scores=tuple(entry.relevance_score for entry in ordered),
        usage=read.usage.to_contract() if read.usage else Usage(),
    )


def _check_indices(indices: list[int], count: int, what: str) -> None:
    if sorted(indices) != list(range(count)):
        raise BackendError("engine_error", f"it gave {len(indices)} {what.format(count)}")


class _Listed(msgspec.Struct):
    data: list[dict[str, Any]]


def listed(answer: object) -> dict[str, int]:
    """Return the models of a listing: their ids, and their context lengths in tokens (0: unknown).

    What another modeld only passes on is left out: two that list each other would never end.
    """
    found = {}
    for entry in _convert(answer, _Listed).data:
        model = entry.get("id")
        if isinstance(model, str) and model and entry.get("owned_by") != PASSED_ON:
            found[model] = _context_length(entry)
    return found


def _context_length(entry: dict[str, Any]) -> int:
    """Return what servers call by many names: how many tokens one request may use."""
    meta = entry.get("meta")
    values = [entry.get(name) for name in _CONTEXT_NAMES]
    values += [meta.get(name) for name in _META_NAMES] if isinstance(meta, dict) else []
    return next((value for value in values if type(value) is int and value > 0), 0)
