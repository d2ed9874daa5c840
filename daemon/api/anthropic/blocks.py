"""Content blocks of the Anthropic API, and the messages that they become for a backend.

A message of theirs may be several of a backend's: results of tools are messages of their own there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from backends.roles import Content, joined
from daemon.errors import InvalidRequest


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """Base of the parts of requests."""


class Cacheable(Body, kw_only=True):
    """Base of what may be marked as worth caching: every prompt is cached here."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Cacheable, tag_field="type", tag="text"):
    """Text. `citations` is what answers carry and nobody needs back."""

    text: str
    citations: list[Any] | None = None


class Base64Source(Body, tag_field="type", tag="base64"):
    """An image in the request itself."""

    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str

    def data_url(self) -> str:
        """Return it as a data URL."""
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(Body, tag_field="type", tag="url"):
    """An image in a URL, which must be a data URL."""

    url: str

    def data_url(self) -> str:
        """Return it as a data URL. Raises InvalidRequest for one that would have to be fetched."""
        if not self.url.startswith("data:image/"):
            raise InvalidRequest(
                "source.url: images are not fetched: send the image itself, as a base64 source",
                param="source.url",
            )
        return self.url


class ImageBlock(Cacheable, tag_field="type", tag="image"):
    """An image."""

    source: Base64Source | UrlSource


class ToolUseBlock(Cacheable, tag_field="type", tag="tool_use"):
    """A call of a tool. The last group is what answers carry and nobody needs back."""

    id: str
    name: str
    input: dict[str, Any]

    caller: dict[str, Any] | None = None
    toolset_name: None = None


class ToolResultBlock(Cacheable, tag_field="type", tag="tool_result"):
    """What a tool that was called has answered."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock] | None = None
    is_error: bool | None = None
    toolset_name: None = None


class ThinkingBlock(Body, tag_field="type", tag="thinking"):
    """What the model thought for an earlier answer: it is not shown that again."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Body, tag_field="type", tag="redacted_thinking"):
    """The same, unreadable."""

    data: str


Block = (
    TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock
)
_ROLES: dict[type[Body], tuple[str, ...]] = {
    ImageBlock: ("user",),
    ToolUseBlock: ("assistant",),
    ToolResultBlock: ("user",),
    ThinkingBlock: ("assistant",),
    RedactedThinkingBlock: ("assistant",),
}


class AnthropicMessage(Body):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def blocks(self) -> Sequence[Block]:
        """Return the content as blocks. Raises InvalidRequest for one that the role can't have."""
        if isinstance(self.content, str):
            return [TextBlock(text=self.content)]
        for block in self.content:
            if self.role not in _ROLES.get(type(block), (self.role,)):
                kind = block.__struct_config__.tag
                raise InvalidRequest(
                    f"messages: a message of the {self.role} can't have a {kind} block",
                    param="messages",
                )
        return self.content


def to_backend(messages: Iterable[AnthropicMessage]) -> list[dict[str, Any]]:
    """Return messages as chat templates want them: those of one role in a row are one message.

    Raises InvalidRequest for a conversation that does not end with the user, or has a block where
    it can't be.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the tools that were called, by the ids of the calls
    last = ""
    for message in messages:
        found += _parts(message, names)
        last = message.role
    if last == "assistant":
        raise InvalidRequest(
            "messages: the last one is the assistant's, but answers do not go on from a text that "
            "is given (prefill): end with a message of the user",
            param="messages",
        )
    return joined(found)


def _parts(message: AnthropicMessage, names: dict[str, str]) -> Iterable[dict[str, Any]]:
    """Yield the messages that one is for a backend."""
    said: list[TextBlock | ImageBlock] = []
    calls: list[dict[str, Any]] = []
    blocks = message.blocks()
    for block in blocks:
        match block:
            case TextBlock() | ImageBlock():
                said.append(block)
            case ToolUseBlock():
                names[block.id] = block.name
                calls.append(_call(block))
            case ToolResultBlock():
                if said:
                    yield {"role": message.role, "content": _content(said)}
                    said = []
                yield _result(block, names)
            case _:
                pass
    if calls:
        yield {"role": message.role, "content": _content(said), "tool_calls": calls}
    elif said or not blocks:
        yield {"role": message.role, "content": _content(said)}


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    function = {"name": block.name, "arguments": arguments}
    return {"id": block.id, "type": "function", "function": function}


def _result(block: ToolResultBlock, names: dict[str, str]) -> dict[str, Any]:
    content = block.content or ""
    shown = [TextBlock(text=content)] if isinstance(content, str) else [*content]
    if block.is_error:  # templates have no other way to tell
        shown.insert(0, TextBlock(text="The tool failed:"))
    message = {"role": "tool", "tool_call_id": block.tool_use_id, "content": _content(shown)}
    if block.tool_use_id in names:
        message["name"] = names[block.tool_use_id]
    return message


def _content(blocks: Sequence[TextBlock | ImageBlock]) -> Content:
    """Return text as one string, a line for each block; with images, as a list of parts."""
    if not any(isinstance(block, ImageBlock) for block in blocks):
        return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
    return [
        {"type": "text", "text": block.text}
        if isinstance(block, TextBlock)
        else {"type": "image_url", "image_url": {"url": block.source.data_url()}}
        for block in blocks
    ]
