"""Bounds for the grammars and JSON schemas that an answer may be held to. Pure.

Engines write a repetition out, and parse brackets by calling themselves: both can take a process
down.
"""

from __future__ import annotations

from typing import Any

from backends.contract import BackendError

MAX_NESTING = 200
_REPEATS = ("minLength", "maxLength", "minItems", "maxItems")


def nesting(grammar: str) -> int:
    """Return how deep the brackets of a GBNF grammar are nested; those in literals count too."""
    depth = deepest = 0
    for character in grammar:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def check_repeats(schema: dict[str, Any], most: int) -> None:
    """Raise BackendError for a schema that asks for more than `most` of anything."""
    pending: list[Any] = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            for key in _REPEATS:
                number = value.get(key)
                if isinstance(number, int | float) and number > most:
                    raise BackendError(
                        "invalid_request",
                        f"the json_schema has a {key} of {number}, but at most {most} is taken: "
                        "leave it out or make it smaller",
                    )
