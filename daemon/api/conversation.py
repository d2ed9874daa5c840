"""Conversations as chat templates want them. Pure.

Many templates refuse two messages of one role in a row, which other APIs allow.
"""

from __future__ import annotations

from typing import Any

Content = str | list[dict[str, Any]]


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
