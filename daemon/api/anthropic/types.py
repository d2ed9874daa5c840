"""The Anthropic requests that are understood, with bounds; any other field is refused by name.

What is checked here is all that stands between the network and an engine's parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from backends.contract import ChatRequest, Sampling
from daemon.api.anthropic import blocks
from daemon.api.anthropic.blocks import Body, Cacheable, TextBlock
from daemon.api.terms import Effort, TermsBody
from daemon.errors import InvalidRequest

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
# Claude Code begins the system prompt with this line. It is for Anthropic's accounts and another
# one each time: with it, no prompt would ever go on from what is cached of the one before.
_BILLING = "x-anthropic-billing-header:"


class ClientTool(Cacheable, kw_only=True):
    """A tool that the client runs. The last group is accepted and has no effect here."""

    name: _Name
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    defer_loading: Literal[False] | None = None

    strict: bool | None = None  # calls that are required always fit their schema
    eager_input_streaming: bool | None = None
    input_examples: list[Any] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    def to_backend(self) -> dict[str, Any]:
        """Return the tool in the form of the OpenAI API."""
        function = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class AutoChoice(Body, tag_field="type", tag="auto"):
    """The model chooses whether to call a tool."""

    disable_parallel_tool_use: bool = False


class AnyChoice(Body, tag_field="type", tag="any"):
    """A call of one of the tools is required."""

    disable_parallel_tool_use: bool = False


class NamedChoice(Body, tag_field="type", tag="tool"):
    """A call of this tool is required."""

    name: _Name
    disable_parallel_tool_use: bool = False


class NoChoice(Body, tag_field="type", tag="none"):
    """No tool may be called."""


class Thinking(Body):
    """Whether a model thinks before it answers, if it can, and whether that is shown.

    `budget_tokens` has no effect here: how much it thinks is the `effort` of the output_config.
    """

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Body, tag_field="type", tag="json_schema"):
    """JSON that fits a schema."""

    schema: dict[str, Any]


class OutputConfig(Body):
    """The form of the answer, and how much a model that thinks does so."""

    format: JsonFormat | None = None
    effort: Effort | None = None


class ClearThinking(Body, tag_field="type", tag="clear_thinking_20251015"):
    """Leave out what the model thought before; it is never shown that again."""

    keep: Any = None


class ContextManagement(Body):
    """What is to be left out of a long conversation."""

    edits: list[ClearThinking] | None = None


class PromptBody(TermsBody, kw_only=True):
    """What is asked, as it is answered and as it is counted.

    The last group is accepted and has no effect here.
    """

    model: str
    messages: Annotated[
        list[blocks.AnthropicMessage], msgspec.Meta(min_length=1, max_length=10_000)
    ]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ClientTool], msgspec.Meta(max_length=1024)] | None = None
    tool_choice: AutoChoice | AnyChoice | NamedChoice | NoChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    mcp_servers: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None

    cache_control: dict[str, Any] | None = None
    context_management: ContextManagement | None = None
    speed: str | None = None
    user_profile_id: str | None = None

    def chat(self, sampling: Sampling) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        choice = self.tool_choice
        if isinstance(choice, AnyChoice | NamedChoice) and not self.tools:
            raise InvalidRequest("tool_choice: there are no tools to call", param="tool_choice")
        messages = blocks.to_backend(self.messages)
        if system := self._system():
            messages.insert(0, {"role": "system", "content": system})
        tools = () if isinstance(choice, NoChoice) else self.tools or ()
        wanted = "required" if isinstance(choice, AnyChoice) else "auto"
        if isinstance(choice, NamedChoice):
            wanted = "function"
        return ChatRequest(
            messages=tuple(messages),
            tools=tuple(tool.to_backend() for tool in tools),
            tool_choice=wanted,
            tool_name=choice.name if isinstance(choice, NamedChoice) else "",
            parallel_tool_calls=not getattr(choice, "disable_parallel_tool_use", False),
            reasoning_effort=self._effort,
            sampling=sampling,
        )

    @property
    def _effort(self) -> str | None:
        kind = self.thinking.type if self.thinking else ""
        if kind == "disabled":
            return "none"
        if self.output_config and self.output_config.effort:
            return self.output_config.effort.to_backend
        return "medium" if kind == "enabled" else None

    def _system(self) -> str:
        given = self.system or []
        texts = [given] if isinstance(given, str) else [block.text for block in given]
        kept = (_without_billing(text) for text in texts)
        return "\n".join(text for text in kept if text)

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is to fit."""
        wanted = self.output_config.format if self.output_config else None
        wanted = wanted or self.output_format
        return wanted.schema if wanted else None


def _without_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


class CountBody(PromptBody, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    def to_backend(self) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        return self.chat(Sampling(json_schema=self.schema))


class MessagesBody(PromptBody, kw_only=True):
    """Body of POST /v1/messages. The last group is accepted and has no effect here."""

    max_tokens: _Tokens
    stream: bool | None = False
    stop_sequences: Annotated[list[_Stop], msgspec.Meta(max_length=16)] | None = None
    temperature: _Share | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=100_000)] | None = None
    ignore_eos: bool = False
    container: None = None

    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    diagnostics: dict[str, Any] | None = None

    def to_backend(self) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        return self.chat(
            Sampling(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                stop=tuple(self.stop_sequences or ()),
                ignore_eos=self.ignore_eos,
                json_schema=self.schema,
            )
        )
