"""Conversations as turns of the few roles that chat templates know. Pure.

Many templates know a user and an assistant who take turns, and refuse what APIs allow besides: a
system message, a tool's result, two messages of one role in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from backends.contract import BackendError
from backends.tools import spelled_out

Content = str | list[dict[str, Any]]


class Refused(BackendError):
    """A chat template can't express a conversation, and says why."""

    def __init__(self, words: str) -> None:
        super().__init__("invalid_request", f"the chat template refused: {words}")


def join(conversation: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Add a message; what is of the same role as the last one becomes a part of that.

    Results of tools stay apart.
    """
    if conversation and conversation[-1]["role"] == message["role"] != "tool":
        conversation[-1] = _merged(conversation[-1], message)
    else:
        conversation.append(message)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    contents = [message["content"] for message in (first, second) if message["content"]]
    content: Content
    if all(isinstance(each, str) for each in contents):
        content = "\n".join(contents)
    else:
        content = []
        for each in contents:
            content += [{"type": "text", "text": each}] if isinstance(each, str) else each
    merged = {**first, **second, "content": content}
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    return merged | {"tool_calls": calls} if calls else merged


def alternating(
    messages: Iterable[dict[str, Any]], *, system: bool = False
) -> tuple[dict[str, Any], ...]:
    """Return the conversation as turns of the user, who is first, and the assistant.

    Calls of tools become text of the assistant's, their results and what the system says the
    user's. With `system`, what that says before all others stays a message of its own.
    """
    found: list[dict[str, Any]] = []
    for message in spelled_out(tuple(messages), ""):
        role = "assistant" if message["role"] == "assistant" else "user"
        if system and message["role"] == "system" and {m["role"] for m in found} <= {"system"}:
            role = "system"
        elif role == "assistant" and (not found or found[-1]["role"] == "system"):
            found.append({"role": "user", "content": ""})
        join(found, {"role": role, "content": message.get("content") or ""})
    return tuple(found)


def variants(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], ...]]:
    """Yield the conversation as it is, then with ever fewer roles, for templates that refuse it."""
    told: list[tuple[dict[str, Any], ...]] = []
    for variant in (
        tuple(messages),
        alternating(messages, system=True),
        alternating(messages),
    ):
        if variant not in told:
            told.append(variant)
            yield variant


def rendered(
    render: Callable[[Sequence[dict[str, Any]]], str], messages: Sequence[dict[str, Any]]
) -> str:
    """Return what a chat template makes of the first variant that it takes.

    Raises Refused if it takes none.
    """
    refusals: list[Exception] = []
    for variant in variants(messages):
        try:
            return render(variant)
        except Exception as error:  # noqa: BLE001  whatever a template does not like
            refusals.append(error)
    raise Refused(str(refusals[0])) from refusals[0]
