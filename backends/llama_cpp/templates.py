"""From messages to the text of a prompt, by a model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backends import images, roles, thinking
from backends.contract import BackendError, ChatRequest

_PROBE = "which form of content does this template read"


class ChatTemplate:
    """A chat template, in the sandbox that llama-cpp-python has for them.

    `image_marker` stands for an image in the text. Raises BackendError("load_failed") for a
    template that can't be compiled.
    """

    def __init__(self, template: str, *, bos: str, eos: str, image_marker: str = "") -> None:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            self._format = Jinja2ChatFormatter(
                template=thinking.switchable(template), bos_token=bos, eos_token=eos
            )
        except Exception as error:
            raise BackendError(
                "load_failed", f"the model's chat template cannot be compiled: {error}"
            ) from error
        self._image_marker = image_marker
        self._typed = self._reads_parts_only()

    def _reads_parts_only(self) -> bool:
        """Say whether the template leaves out content that is a string and not a list of parts."""

        def shows(content: Any) -> bool:
            try:
                return _PROBE in self._render([{"role": "user", "content": content}])
            except Exception:  # noqa: BLE001  whatever a template does not like
                return False

        return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])

    def _render(self, messages: list[dict[str, Any]], **told: Any) -> str:
        return str(self._format(messages=messages, **told).prompt)

    def prompt(
        self, request: ChatRequest, messages: Sequence[dict[str, Any]]
    ) -> tuple[str, list[bytes]]:
        """Return the prompt's text, with `messages` for the request's, and the images in it.

        Raises BackendError("invalid_request").
        """
        images.check(messages)
        found: list[bytes] = []
        plain = [self._flattened(message, found) for message in messages]
        told = thinking.variables(request)
        text = roles.rendered(lambda messages: self._render(messages, **told), plain)
        if found and text.count(self._image_marker) != len(found):
            raise BackendError("invalid_request", "this model's chat template drops images")
        return text, found

    def _flattened(self, message: dict[str, Any], found: list[bytes]) -> dict[str, Any]:
        """Return the message with its content as one text; its images are added to `found`."""
        content = message.get("content")
        if isinstance(content, list):
            content = self._joined(content, found)
        if self._typed and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        return message | {"content": content} if "content" in message else message

    def _joined(self, parts: list[dict[str, Any]], found: list[bytes]) -> str:
        """Join parts as llama.cpp's server does: a line each, and markers for images between."""
        text, after_image = "", False
        for part in parts:
            if part.get("type") == "text":
                text += ("" if after_image or not text else "\n") + str(part.get("text", ""))
                after_image = False
            elif part.get("type") == "image_url" and self._image_marker:
                found.append(images.data_of(part))
                text += self._image_marker
                after_image = True
            else:
                raise BackendError(
                    "invalid_request", f"this model can't read content of type {part.get('type')!r}"
                )
        return text
