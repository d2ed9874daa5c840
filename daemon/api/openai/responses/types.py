"""The requests of the Responses API that are understood, with bounds; see openai.types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from backends.contract import ChatRequest, Sampling
from daemon.api.openai.messages import Body
from daemon.api.openai.responses import items
from daemon.api.openai.tools import (
    AllowedTool,
    AllowedTools,
    AllowedToolsChoice,
    Choice,
    ChosenFunction,
    Function,
    Name,
    Tool,
    ToolChoice,
    offer,
)
from daemon.api.openai.types import JsonObjectFormat, TextFormat
from daemon.api.terms import Effort, TermsBody
from daemon.errors import InvalidRequest

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_LOGPROBS = "message.output_text.logprobs"
# What would have to be kept from one request to the next, and what is to be done instead.
_KEPT: Mapping[str, str] = {
    "previous_response_id": "send the whole conversation as `input`",
    "conversation": "send the whole conversation as `input`",
    "background": "leave it out and wait for the answer, or have it streamed",
    "prompt": "send its text as `instructions` and `input`",
}


class FunctionTool(Body, tag_field="type", tag="function", kw_only=True):
    """A function that a model may call. The last group is accepted and has no effect here."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    defer_loading: Literal[False] | None = None

    strict: bool | None = None  # calls that are required always fit their schema
    output_schema: dict[str, Any] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    def as_in_chats(self) -> Tool:
        """Return it as the chat completions have it."""
        return Tool(Function(self.name, self.description, self.parameters, self.strict))


class NamedTool(Body):
    """A function by its name."""

    name: Name
    type: Literal["function"] = "function"


class FunctionChoice(Body, tag_field="type", tag="function"):
    """A call of this function is required."""

    name: Name


class AllowedChoice(Body, tag_field="type", tag="allowed_tools"):
    """A choice among some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], msgspec.Meta(min_length=1, max_length=128)]


ResponseChoice = Literal["auto", "none", "required"] | FunctionChoice | AllowedChoice


class SchemaFormat(Body, tag_field="type", tag="json_schema", kw_only=True):
    """JSON that fits a schema; it is always kept to, `strict` or not."""

    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    """The form of the text. `verbosity` has no effect here."""

    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None
    verbosity: str | None = None


class Reasoning(Body, omit_defaults=True):
    """How much to think. The last group is accepted and has no effect: thoughts are told whole."""

    effort: Effort | None = None

    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: str | None = None
    mode: str | None = None


class StreamConfig(Body):
    """What a stream has besides the answer: nothing here."""

    include_obfuscation: bool = False


class CountBody(TermsBody, kw_only=True):
    """Body of POST /v1/responses/input_tokens: what is asked, as it is answered and counted."""

    model: str
    input: str | Annotated[list[items.InputItem], msgspec.Meta(min_length=1, max_length=10_000)]
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: ResponseChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None

    def to_backend(self) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        return self._chat(Sampling(json_schema=self._schema()))

    def _chat(self, sampling: Sampling) -> ChatRequest:
        for field, advice in _KEPT.items():
            if getattr(self, field, None):
                raise InvalidRequest(
                    f"{field}: nothing is kept here between requests: {advice}", param=field
                )
        given = self.input
        if isinstance(given, str):
            given = [items.InputItem(role="user", content=given)]
        if self.instructions:
            first = items.InputItem(role="system", content=self.instructions)
            messages = items.to_backend([first, *given])
        else:
            messages = items.to_backend(given)
        if not messages:
            raise InvalidRequest("input: there is no message in it", param="input")
        effort = self.reasoning.effort if self.reasoning else None
        offered = offer([tool.as_in_chats() for tool in self.tools or ()], self._choice())
        return ChatRequest(
            messages=tuple(messages),
            tools=offered.tools,
            tool_choice=offered.tool_choice,
            tool_name=offered.tool_name,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            reasoning_effort=effort and effort.to_backend,
            sampling=sampling,
        )

    def _choice(self) -> Choice | None:
        match self.tool_choice:
            case FunctionChoice(name=name):
                return ToolChoice(ChosenFunction(name))
            case AllowedChoice(mode=mode, tools=tools):
                allowed = [AllowedTool(ChosenFunction(tool.name)) for tool in tools]
                return AllowedToolsChoice(AllowedTools(mode, allowed))
            case choice:
                return choice

    def _schema(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if isinstance(wanted, SchemaFormat):
            return wanted.schema
        return {} if isinstance(wanted, JsonObjectFormat) else None


class ResponseBody(CountBody, kw_only=True):
    """Body of POST /v1/responses. The last group is accepted and has no effect here."""

    stream: bool | None = False
    max_output_tokens: _Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    ignore_eos: bool = False
    background: bool | None = None
    prompt: dict[str, Any] | None = None

    store: bool | None = None
    metadata: dict[str, str] | None = None
    stream_options: StreamConfig | None = None
    max_tool_calls: int | None = None  # of tools that the API's own servers run
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    client_metadata: dict[str, Any] | None = None

    def to_backend(self) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        wants_logprobs = self.top_logprobs is not None or _LOGPROBS in (self.include or ())
        return self._chat(
            Sampling(
                max_tokens=self.max_output_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                ignore_eos=self.ignore_eos,
                logprobs=(self.top_logprobs or 0) if wants_logprobs else None,
                json_schema=self._schema(),
            )
        )
