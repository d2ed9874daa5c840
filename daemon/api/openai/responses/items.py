"""Items of a conversation in the Responses API, and the messages that they become for a backend.

An item is one message, one call, or one result of a call: what one role says in a row is one
message for a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from backends.roles import Content, joined
from daemon.api.openai.messages import Body, whole
from daemon.errors import InvalidRequest


class InputText(Body, tag_field="type", tag="input_text", kw_only=True):
    """Text. The last field is accepted and has no effect here."""

    text: str

    prompt_cache_breakpoint: Any = None


class InputImage(Body, tag_field="type", tag="input_image", kw_only=True):
    """An image: in its URL itself (`data:`). The last group has no effect here."""

    image_url: str
    file_id: None = None

    detail: str | None = None
    prompt_cache_breakpoint: Any = None


class OutputText(Body, tag_field="type", tag="output_text", kw_only=True):
    """Text of an earlier answer. The last group is what nobody needs back."""

    text: str

    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None


class Refusal(Body, tag_field="type", tag="refusal"):
    """What another model said instead of an answer."""

    refusal: str


class ReasoningText(Body, tag_field="type", tag="reasoning_text"):
    """What a model thought before an earlier answer."""

    text: str


Part = InputText | InputImage | OutputText | Refusal | ReasoningText


class InputItem(Body, kw_only=True):
    """One item: `type` says which of the others it has.

    `message`: role and content; `function_call`: call_id, name and arguments, which are JSON;
    `function_call_output`: call_id and output; `reasoning`: what a model thought, which it is not
    shown again. The last group is what answers carry and nobody needs back.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputText | InputImage] | None = None

    id: str | None = None
    status: str | None = None
    phase: str | None = None
    summary: Any = None
    encrypted_content: Any = None
    parsed_arguments: Any = None
    namespace: str | None = None
    caller: Any = None

    def needs(self, *fields: str, at: int) -> None:
        """Raise InvalidRequest if it lacks one of the fields that its type has."""
        for field in fields:
            if getattr(self, field) is None:
                param = f"input[{at}].{field}"
                raise InvalidRequest(f"{param}: a {self.type} has to have it", param=param)


def to_backend(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Return items as messages for chat templates. Raises InvalidRequest."""
    found: list[dict[str, Any]] = []
    names: dict[str | None, str] = {}  # of the functions that were called, by the ids of the calls
    for at, item in enumerate(items):
        match item.type:
            case "message":
                item.needs("role", "content", at=at)
                role = "system" if item.role == "developer" else item.role
                found.append({"role": role, "content": _content(item.content, at)})
            case "function_call":
                item.needs("call_id", "name", "arguments", at=at)
                names[item.call_id] = str(item.name)
                found.append({"role": "assistant", "content": "", "tool_calls": [_call(item)]})
            case "function_call_output":
                item.needs("call_id", "output", at=at)
                content = _content(item.output, at)
                result = {"role": "tool", "tool_call_id": item.call_id, "content": content}
                if item.call_id in names:
                    result["name"] = names[item.call_id]
                found.append(result)
            case "reasoning":
                pass
    return joined(found)


def _call(item: InputItem) -> dict[str, Any]:
    function = {"name": item.name, "arguments": whole(item.arguments or "")}
    return {"id": item.call_id, "type": "function", "function": function}


def _content(given: str | Sequence[Part] | None, at: int) -> Content:
    """Return text as one string; with images, as a list of parts. Raises InvalidRequest."""
    if given is None or isinstance(given, str):
        return given or ""
    if not any(isinstance(part, InputImage) for part in given):
        return "".join(_text(part) for part in given)
    parts: list[dict[str, Any]] = []
    for part in given:
        if isinstance(part, InputImage):
            # An engine would fetch any other URL itself, for whoever asks it to.
            if not part.image_url.startswith("data:image/"):
                raise InvalidRequest(
                    f"input[{at}]: an image_url must be a data URL (data:image/png;base64,…)",
                    param=f"input[{at}]",
                )
            parts.append({"type": "image_url", "image_url": {"url": part.image_url}})
        else:
            parts.append({"type": "text", "text": _text(part)})
    return parts


def _text(part: Part) -> str:
    match part:
        case InputText() | OutputText():
            return part.text
        case Refusal():
            return part.refusal
        case _:
            return ""
