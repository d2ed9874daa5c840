"""What a backend answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool, or a piece of one.

    Pieces of one call share their `index`; its first has `id` and `name`. `arguments` is JSON once
    the pieces are joined.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token that was chosen, with its natural log-probability and its likeliest alternatives.

    `bytes` are the token's own: a character may be spread over several tokens.
    """

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer: whole characters, never part of a stop sequence.

    `reasoning` is what a model thinks before it answers, where its engine can tell that apart.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request. `cached_tokens` of the prompt were already in the KV cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Milliseconds spent reading the prompt and writing the answer."""

    prompt_ms: float = 0.0
    predicted_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a generation ended: `stop`, `length`, `tool_calls` or `cancelled`, and what it cost.

    `stopped_by` is the stop sequence that ended it; empty if none did, or the engine does not tell.
    `notice` says, for a person, what was not as it was asked for.
    """

    finish_reason: str
    usage: Usage = Usage()
    timings: Timings = Timings()
    stopped_by: str = ""
    notice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """A vector for each input, in their order: `dimensions` little-endian float32 numbers."""

    vectors: tuple[bytes, ...]
    dimensions: int
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How well each document answers the query, in their order: the higher, the better."""

    scores: tuple[float, ...]
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """For each input, in their order, the score of every label, from 0 to 1."""

    labels: tuple[dict[str, float], ...]
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many tokens the prompt of a chat has: what `Usage.prompt_tokens` of its answer is."""

    tokens: int


Answer = Delta | Done | Embeddings | Scores | Classes | Count
