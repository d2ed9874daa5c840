"""What a loaded model can be asked. Names and meanings are those of the OpenAI API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from backends.contract.model import Task

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when generation ends; None is the engine's default.

    Names and meanings are those of the OpenAI API and of llama.cpp: `temperature` 0 is greedy.
    `max_tokens` None runs to the end of the context. `whole`: a prompt that does not leave room for
    so many is refused as one that is too long is, and the error's `tokens` are those of both.
    `ignore_eos` goes on past end-of-sequence.

    `logprobs` asks for the log-probability of every token of the answer, and of so many
    alternatives to it; some engines tell one for a whole character that is spread over tokens.
    `logit_bias` adds to the logits of tokens by their ids. `json_schema` (`{}`: any JSON object)
    and `grammar` (GBNF, as llama.cpp defines it) leave only the tokens that fit.
    """

    max_tokens: int | None = None
    whole: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    json_schema: dict[str, Any] | None = field(default=None, hash=False)
    grammar: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """Messages in the form of OpenAI's chat completions: each has `role` and `content`.

    `content` is text or, for a model with vision, a list of parts: `{"type": "text", "text": …}`
    and `{"type": "image_url", "image_url": {"url": "data:image/…;base64,…"}}`. Messages may also
    carry `tool_calls` and `tool_call_id`.

    `tools` are functions that the model may call. `tool_choice` is `auto`, `none`, `required`, or
    `function` for the one that `tool_name` names.

    `reasoning_effort` is how much a model that thinks before it answers is to think: one of
    REASONING_EFFORTS, None if that is left to its chat template. Others take no notice.
    """

    messages: tuple[dict[str, Any], ...]
    sampling: Sampling = Sampling()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "auto"
    tool_name: str = ""
    parallel_tool_calls: bool = False
    reasoning_effort: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteRequest:
    """Text to go on from, as it is; with a `suffix`, text to fill in between the two (infill)."""

    prompt: str
    suffix: str | None = None
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Texts to turn into a vector each.

    `dimensions` keeps only so many leading elements, for models that were trained for that; what is
    kept has length 1 again. A text that is too long is an error, or cut with `truncate`.
    """

    inputs: tuple[str, ...]
    dimensions: int | None = None
    truncate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """Documents to score by how well each answers `query`. `truncate` cuts those too long."""

    query: str
    documents: tuple[str, ...]
    truncate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRequest:
    """Texts to label. `truncate` cuts those that are too long."""

    inputs: tuple[str, ...]
    truncate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CountRequest:
    """A chat whose prompt is to be counted, not answered."""

    chat: ChatRequest


Request = (
    ChatRequest | CompleteRequest | EmbedRequest | RerankRequest | ClassifyRequest | CountRequest
)


def needed_task(request: Request) -> Task:
    """Return the task that a model must offer to be asked this."""
    match request:
        case ChatRequest():
            return Task.VISION if _has_image(request) else Task.CHAT
        case CompleteRequest():
            return Task.COMPLETE if request.suffix is None else Task.INFILL
        case EmbedRequest():
            return Task.EMBED
        case RerankRequest():
            return Task.RERANK
        case ClassifyRequest():
            return Task.CLASSIFY
        case CountRequest():
            return needed_task(request.chat)


def _has_image(request: ChatRequest) -> bool:
    return any(
        part.get("type") == "image_url"
        for message in request.messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
