"""What the OpenAI surface answers.

`timings` and `notice` are modeld's own: milliseconds, and what was not as it was asked for.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from daemon.api.errors import ErrorFields


class OpenAIModel(TypedDict):
    """A model that can answer; `created` is in seconds since the epoch.

    The last group is what the Anthropic API tells of a model at the same address.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str

    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]


class OpenAIModelList(TypedDict):
    """The models that can answer; the last group is the Anthropic API's: this is the one page."""

    object: Literal["list"]
    data: list[OpenAIModel]

    has_more: bool
    first_id: str | None
    last_id: str | None


class PromptTokens(TypedDict):
    """How many tokens of the prompt were in the cache from before."""

    cached_tokens: int


class TextUsage(TypedDict):
    """What an answer cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class VectorUsage(TypedDict):
    """What vectors or scores cost, in tokens."""

    prompt_tokens: int
    total_tokens: int


class AnswerTimings(TypedDict):
    """Milliseconds spent reading prompts and writing answers."""

    prompt_ms: float
    predicted_ms: float


class Extras(TypedDict):
    """What is told beyond what the API has."""

    timings: AnswerTimings
    notice: NotRequired[str]


class StreamFailure(TypedDict):
    """An error after the stream has begun; with `retry_after_s`, the request may succeed later."""

    error: ErrorFields
    retry_after_s: NotRequired[int]


class LikelyToken(TypedDict):
    """A token and its natural log-probability; `bytes` are those of its UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class SaidToken(LikelyToken):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(TypedDict):
    """The log-probabilities of an answer's tokens."""

    content: list[SaidToken]
    refusal: None


class FunctionCall(TypedDict):
    """A call; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCallAnswer(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict):
    """What the model said; `content` is null if it only called tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallAnswer]]


class ChatChoice(TypedDict):
    """One answer; `finish_reason` is `stop`, `length` or `tool_calls`."""

    index: int
    message: AssistantMessage
    finish_reason: str
    logprobs: ChatLogprobs | None


class ChatCompletion(Extras):
    """A whole answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TextUsage


class FunctionCallPiece(TypedDict):
    """A piece of a call: the first has the `name`."""

    name: NotRequired[str]
    arguments: str


class ToolCallPiece(TypedDict):
    """A piece of a call of a tool: those of one call share `index`, the first has the `id`."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallPiece


class ChatDelta(TypedDict, total=False):
    """What is new; a choice's first piece has the `role`, its last has nothing."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallPiece]


class ChatChunkChoice(TypedDict):
    """A piece of one choice; the last has a `finish_reason`."""

    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: NotRequired[ChatLogprobs]


class ChatChunk(TypedDict):
    """A piece of an answer to a conversation; that with the `usage` comes last, if it is wanted."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[TextUsage]
    timings: NotRequired[AnswerTimings]
    notice: NotRequired[str]


class TextLogprobs(TypedDict):
    """The log-probabilities of a text's tokens; each begins at so many characters of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    """One text, or a piece of it; `finish_reason` is `stop` or `length`, null before the end."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class TextCompletion(Extras):
    """A text that goes on from another, whole."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TextUsage


class TextChunk(TypedDict):
    """A piece of a text; that with the `usage` comes last, if it is wanted."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[TextUsage]
    timings: NotRequired[AnswerTimings]
    notice: NotRequired[str]


class Embedding(TypedDict):
    """The vector of one text: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    """The vectors of all texts, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: VectorUsage


class RankedText(TypedDict):
    """A document's text."""

    text: str


class RerankResult(TypedDict):
    """How well the document of this `index` answers the query."""

    index: int
    relevance_score: float
    document: NotRequired[RankedText]


class RerankResults(TypedDict):
    """The documents, the best first."""

    object: Literal["list"]
    model: str
    results: list[RerankResult]
    usage: VectorUsage
