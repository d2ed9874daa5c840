"""What the Ollama surface answers. Times are RFC 3339, durations nanoseconds, sizes bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal, NotRequired, TypedDict


def timestamp(when: datetime | None = None) -> str:
    """Return a time, or now, as Ollama writes it."""
    shown = (when or datetime.now(UTC)).isoformat(timespec="microseconds")
    return shown.replace("+00:00", "Z")


class Details(TypedDict):
    """What kind of model it is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(TypedDict):
    """A model that can answer."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(TypedDict):
    """All models that can answer."""

    models: list[Tag]


class Running(TypedDict):
    """A model in memory, of `size` bytes of RAM and GPU memory, until `expires_at`."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class AllRunning(TypedDict):
    """All models in memory."""

    models: list[Running]


class Shown(TypedDict):
    """What is known of a model."""

    modelfile: str
    parameters: str
    template: str
    license: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(TypedDict):
    """The version of Ollama's API that is spoken here."""

    version: str


class Status(TypedDict):
    """How a pull goes on: of a file, where `digest` says which; or what went wrong with it."""

    status: NotRequired[str]
    digest: NotRequired[str]
    total: NotRequired[int]
    completed: NotRequired[int]
    error: NotRequired[str]


class CallFunction(TypedDict):
    """What a model calls."""

    index: int
    name: str
    arguments: dict[str, Any]


class Call(TypedDict):
    """A call of a tool."""

    id: str
    function: CallFunction


class Said(TypedDict):
    """A message of the model, or a piece of one."""

    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[Call]]


class Logprob(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(Logprob):
    """A token of the answer, and its likeliest alternatives."""

    top_logprobs: list[Logprob]


class Cost(TypedDict):
    """How an answer ended, and what it cost."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[str]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]
    logprobs: NotRequired[list[ChosenLogprob]]
    notice: NotRequired[str]


class Failure(TypedDict):
    """What ends a stream that failed."""

    error: str


class ChatAnswer(Cost):
    """An answer, or a piece of one."""

    message: Said


class GenerateAnswer(Cost):
    """An answer, or a piece of one."""

    response: str
    thinking: NotRequired[str]


class EmbedAnswer(TypedDict):
    """A vector for each input."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingsAnswer(TypedDict):
    """The vector of the input."""

    embedding: list[float]
