"""Messages as Ollama's clients send them, and what chat templates get of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec

from daemon.errors import InvalidRequest

# How the base64 of an image begins, by its first bytes.
_KINDS = {"iVBOR": "png", "/9j/": "jpeg", "R0lG": "gif", "UklG": "webp"}


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of the parts of messages."""


class CalledFunction(Body, kw_only=True):
    """What an assistant called. The last group is what answers carry and nobody needs back."""

    name: str
    arguments: dict[str, Any] = {}

    index: int | None = None
    description: str | None = None


class CalledTool(Body, kw_only=True):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str | None = None
    type: str | None = None
    index: int | None = None


class Message(Body, kw_only=True):
    """One message of a conversation. `images` are base64."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Annotated[list[str], msgspec.Meta(max_length=64)] | None = None
    tool_calls: Annotated[list[CalledTool], msgspec.Meta(max_length=128)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None
    thinking: str | None = None


def image_url(image: str) -> str:
    """Return an image in base64 as a data URL. Raises InvalidRequest for no known kind of image."""
    if image.startswith("data:image/"):
        return image
    kind = next((kind for start, kind in _KINDS.items() if image.startswith(start)), None)
    if kind is None:
        raise InvalidRequest(
            "images: an image must be the base64 of a PNG, JPEG, GIF or WebP file", param="images"
        )
    return f"data:image/{kind};base64,{image}"


def to_backend(messages: Iterable[Message]) -> tuple[dict[str, Any], ...]:
    """Return messages as chat templates want them. Raises InvalidRequest.

    Results of tools name no calls here: they are those of the calls before, in their order.
    """
    found: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for number, message in enumerate(messages):
        shown: dict[str, Any] = {"role": message.role, "content": _content(message)}
        if message.tool_calls:
            ids = [
                call.id or f"call_{number}_{index}" for index, call in enumerate(message.tool_calls)
            ]
            open_calls = list(ids)
            shown["tool_calls"] = [
                {
                    "id": key,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.dumps(call.function.arguments, ensure_ascii=False),
                    },
                }
                for key, call in zip(ids, message.tool_calls, strict=True)
            ]
        if message.role == "tool":
            key = message.tool_call_id or (open_calls[0] if open_calls else f"call_{number}")
            if key in open_calls:
                open_calls.remove(key)
            shown["tool_call_id"] = key
            if name := message.tool_name or message.name:
                shown["name"] = name
        found.append(shown)
    return tuple(found)


def _content(message: Message) -> Any:
    text = message.content or ""
    if not message.images:
        return text
    urls = [{"type": "image_url", "image_url": {"url": image_url(i)}} for i in message.images]
    return [*([{"type": "text", "text": text}] if text else []), *urls]
