"""The tools that a request offers to a model, and which of them it has to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from daemon.api.openai.messages import Body
from daemon.errors import InvalidRequest

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class Function(Body):
    """A function that a model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that a model may use."""

    function: Function
    type: Literal["function"] = "function"
    cache_control: Any = None

    def to_backend(self) -> dict[str, Any]:
        """Return the tool without what was not given."""
        fields = msgspec.structs.asdict(self.function)
        kept = {name: value for name, value in fields.items() if value is not None}
        return {"type": "function", "function": kept}


class ChosenFunction(Body):
    """The function to call."""

    name: Name


class ToolChoice(Body, tag_field="type", tag="function"):
    """A call of this function is required."""

    function: ChosenFunction


class AllowedTool(Body):
    """One of the tools that may be called."""

    function: ChosenFunction
    type: Literal["function"] = "function"


class AllowedTools(Body):
    """Only these of the tools may be called, or one of them must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], msgspec.Meta(min_length=1, max_length=128)]


class AllowedToolsChoice(Body, tag_field="type", tag="allowed_tools"):
    """A choice among some of the tools."""

    allowed_tools: AllowedTools


Choice = Literal["auto", "none", "required"] | ToolChoice | AllowedToolsChoice


class Offer(msgspec.Struct, kw_only=True):
    """What of a request's tools backends get. See ChatRequest."""

    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "auto"
    tool_name: str = ""


def offer(tools: Sequence[Tool], choice: Choice | None) -> Offer:
    """Return what a choice leaves of the tools. Raises InvalidRequest."""
    if choice == "none":
        return Offer(tool_choice="none")
    offered = {tool.function.name: tool.to_backend() for tool in tools}
    if isinstance(choice, ToolChoice):
        name = choice.function.name
        _check_known([name], offered)
        return Offer(tools=tuple(offered.values()), tool_choice="function", tool_name=name)
    if isinstance(choice, AllowedToolsChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        _check_known(names, offered)
        allowed = tuple(offered[name] for name in dict.fromkeys(names))
        return Offer(tools=allowed, tool_choice=choice.allowed_tools.mode)
    if choice == "required" and not offered:
        raise InvalidRequest("tool_choice: there are no tools to call", param="tool_choice")
    return Offer(tools=tuple(offered.values()), tool_choice=choice or "auto")


def _check_known(names: Sequence[str], offered: dict[str, Any]) -> None:
    for name in names:
        if name not in offered:
            raise InvalidRequest(
                f"tool_choice: {name!r} is not among the tools", param="tool_choice"
            )
