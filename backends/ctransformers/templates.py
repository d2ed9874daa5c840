"""Chat templates, which GGML models get from elsewhere: untrusted, so rendered in a sandbox."""

from __future__ import annotations

from typing import Any, NoReturn

from backends import roles, thinking
from backends.contract import BackendError, ChatRequest


def _refuse(message: str) -> NoReturn:
    """Give templates their `raise_exception`."""
    raise ValueError(message)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its content as one text: old templates know nothing else."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "\n".join(part.get("text", "") for part in content)
    return {**message, "content": content}


class ChatTemplate:
    """A compiled template. Raises BackendError for one that is broken."""

    def __init__(self, source: str) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(thinking.switchable(source))
        except TemplateError as error:
            raise BackendError(
                "load_failed", f"the model's chat template is broken: {error}"
            ) from error

    def render(self, request: ChatRequest) -> str:
        """Return the prompt of a request. Raises BackendError if the template refuses it.

        The engine puts the token that begins a text before it, where the model has one.
        """
        told = thinking.variables(request)
        return roles.rendered(
            lambda messages: self._template.render(
                messages=messages, add_generation_prompt=True, bos_token="", eos_token="", **told
            ),
            [_plain(message) for message in request.messages],
        )
