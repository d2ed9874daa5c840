"""What the Responses API answers. `timings` and `notice` are modeld's own: see openai.answers."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from daemon.api.openai.answers import AnswerTimings, PromptTokens, SaidToken

Status = Literal["in_progress", "completed", "incomplete"]


class InputTokens(TypedDict):
    """How many tokens a prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class InputDetails(PromptTokens):
    """How many tokens of the prompt were in the cache; writing to it is free, so none are told."""

    cache_write_tokens: int


class OutputDetails(TypedDict):
    """Engines do not count what a model thinks apart: this is 0."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """What a response cost, in tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class OutputPart(TypedDict):
    """A part of an item: text of an answer, with what belongs to it, or of a thought."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: NotRequired[list[Any]]
    logprobs: NotRequired[list[SaidToken]]


class OutputItem(TypedDict):
    """An item of a response: `type` says which of the others it has.

    `message`: role and content; `function_call`: call_id, name and arguments, which are JSON;
    `reasoning`: content, and a summary that is empty.
    """

    id: str
    type: Literal["message", "function_call", "reasoning"]
    status: Status
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[list[OutputPart]]
    summary: NotRequired[list[Any]]
    call_id: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]


class ResponseError(TypedDict):
    """Why there is no response."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why a response ends before its end."""

    reason: Literal["max_output_tokens"]


class Response(TypedDict):
    """A response, and what it was asked for with."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    timings: NotRequired[AnswerTimings]
    notice: NotRequired[str]

    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    user: str | None


class ResponseEvent(TypedDict):
    """One event of a stream; its name is its `type`, which says which of the others it has.

    `response.created`, `.in_progress`, `.completed`, `.incomplete` and `.failed` have the response,
    `.output_item.added` and `.done` the item, `.content_part.added` and `.done` the part,
    `….delta` what is new and `….done` all of it: text, with logprobs for that of an answer, or
    arguments.
    """

    type: str
    sequence_number: int
    response: NotRequired[Response]
    output_index: NotRequired[int]
    item: NotRequired[OutputItem]
    item_id: NotRequired[str]
    content_index: NotRequired[int]
    part: NotRequired[OutputPart]
    delta: NotRequired[str]
    text: NotRequired[str]
    arguments: NotRequired[str]
    logprobs: NotRequired[list[SaidToken]]
