"""Conversations in the roles that chat templates know. Pure.

Many templates know a user and an assistant who take turns, and refuse what APIs allow besides: a
system message, a tool's result, two messages of one role in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from backends.contract import BackendError
from backends.tools import spelled_out

Message = dict[str, Any]
Content = str | list[dict[str, Any]]


class Refused(BackendError):
    """A chat template can't express a conversation, and says why."""

    def __init__(self, words: str) -> None:
        super().__init__("invalid_request", f"the chat template refused: {words}")


def joined(messages: Iterable[Message]) -> list[Message]:
    """Return the conversation with what one role says in a row as one message.

    Results of tools stay apart.
    """
    runs: list[list[Message]] = []
    for message in messages:
        if runs and runs[-1][0]["role"] == message["role"] != "tool":
            runs[-1].append(message)
        else:
            runs.append([message])
    return [run[0] if len(run) == 1 else _merged(run) for run in runs]


def _merged(run: list[Message]) -> Message:
    contents = [message["content"] for message in run if message["content"]]
    content: Content
    if all(isinstance(each, str) for each in contents):
        content = "\n".join(contents)
    else:
        content = []
        for each in contents:
            content += [{"type": "text", "text": each}] if isinstance(each, str) else each
    merged = {name: value for message in run for name, value in message.items()}
    calls = [call for message in run for call in message.get("tool_calls", ())]
    return merged | {"content": content} | ({"tool_calls": calls} if calls else {})


def _system_first(messages: Iterable[Message]) -> list[Message]:
    """Return the conversation joined, and what the system says later as the user's."""
    told: list[Message] = []
    begun = False
    for message in messages:
        begun = begun or message["role"] != "system"
        role = "user" if begun and message["role"] == "system" else message["role"]
        told.append({**message, "role": role, "content": message.get("content") or ""})
    return joined(told)


def _in_turns(messages: Iterable[Message], *, system: bool) -> list[Message]:
    """Return the conversation as turns of the user, who is first, and the assistant.

    Calls of tools become text of the assistant's, their results and what the system says the
    user's. With `system`, what that says before all others stays a message of its own.
    """
    told: list[Message] = []
    first = True  # nobody but the system has said anything
    for message in spelled_out(tuple(messages), ""):
        role = "assistant" if message["role"] == "assistant" else "user"
        if system and first and message["role"] == "system":
            role = "system"
        elif first and role == "assistant" and not (told and told[-1]["role"] == "user"):
            told.append({"role": "user", "content": ""})
        first = first and message["role"] == "system"
        told.append({"role": role, "content": message.get("content") or ""})
    return joined(told)


def variants(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the conversation as it is, then with ever fewer roles, for templates that refuse it."""
    told = [list(messages)]
    yield told[0]
    for fewer in (
        _system_first,
        lambda said: _in_turns(said, system=True),
        lambda said: _in_turns(said, system=False),
    ):
        variant = fewer(messages)
        if variant not in told:
            told.append(variant)
            yield variant


def rendered(render: Callable[[list[Message]], str], messages: Sequence[Message]) -> str:
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
