"""The messages of a conversation, as they are asked in the OpenAI API."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """Base of the parts of requests."""


class TextPart(Body, tag_field="type", tag="text", kw_only=True):
    """Text in a message. The last group is what other servers cache by; it has no effect here."""

    text: str

    cache_control: Any = None
    prompt_cache_breakpoint: Any = None


class ImageUrl(Body):
    """Where an image is: in the URL itself (`data:`)."""

    url: str
    detail: str | None = None
    media_type: str | None = None


class ImagePart(Body, tag_field="type", tag="image_url", kw_only=True):
    """An image in a message. See TextPart."""

    image_url: ImageUrl

    cache_control: Any = None
    prompt_cache_breakpoint: Any = None


class CalledFunction(Body):
    """What an assistant called; `arguments` is JSON. A client adds what it made of them."""

    name: str
    arguments: str
    parsed_arguments: Any = None


def whole(arguments: str) -> str:
    """Return the arguments of an earlier call as a JSON object, which templates insist on. Pure.

    A call that was cut short comes back as it was; without this it would spoil all that follows.
    """
    try:
        given = json.loads(arguments or "{}")
    except ValueError:
        given = None
    if isinstance(given, dict):
        return arguments or "{}"
    return json.dumps({"arguments": arguments}, ensure_ascii=False)


class CalledTool(Body):
    """A call in an assistant's message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None

    def to_backend(self) -> dict[str, Any]:
        """Return the call as chat templates want it."""
        function = {"name": self.function.name, "arguments": whole(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Message(Body, kw_only=True):
    """One message of a conversation.

    The last group is what answers carry, from here or elsewhere, or what clients add to them, and
    send back without any need.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | ImagePart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], msgspec.Meta(max_length=128)] | None = None
    tool_call_id: str | None = None

    reasoning_content: str | None = None
    reasoning: Any = None
    reasoning_details: Any = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    parsed: Any = None
    audio: None = None
    function_call: None = None
    cache_control: Any = None
    copilot_cache_control: Any = None
    cot_id: Any = None
    cot_summary: Any = None
    provider_specific_fields: Any = None

    def to_backend(self) -> dict[str, Any]:
        """Return the message as chat templates want it; text alone is one string."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self._content()}
        if self.tool_calls:
            message["tool_calls"] = [call.to_backend() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None and self.role == "tool":
            message["name"] = self.name
        return message

    @property
    def images(self) -> list[str]:
        """The URLs of the images in the message."""
        if not isinstance(self.content, list):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def _content(self) -> Any:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        if not self.images:
            return "".join(part.text for part in self.content if isinstance(part, TextPart))
        return [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image_url", "image_url": {"url": part.image_url.url}}
            for part in self.content
        ]
