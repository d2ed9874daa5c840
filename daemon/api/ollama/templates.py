"""Prompt templates as Ollama has them, in the part of Go's template language that they need. Pure.

That is text with `{{ .System }}`, `{{ .Prompt }}`, `{{ .Suffix }}` and `{{ .Response }}`, and `if`,
`else if`, `else` and `end` on them, with `and`, `or` and `not`; `{{-` and `-}}` take off the white
space beside them (pkg.go.dev/text/template). What follows `.Response` is of no prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from daemon.errors import InvalidRequest

FIELDS = (".System", ".Prompt", ".Suffix", ".Response")
_ACTION = re.compile(r"\{\{(-\s)?\s*(/\*.*?\*/|[^{}]*?)\s*(\s-)?\}\}", re.DOTALL)


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"template: {why}; it may have {', '.join(FIELDS)}, with if, else and end on them",
        param="template",
    )


@dataclass(slots=True)
class _Branches:
    """An `if` that is open. `outer`: what is around it is written; `now`: so is its branch."""

    outer: bool
    now: bool
    taken: bool
    closed: bool = False


class _Rendering:
    """A prompt in the making: what is written so far, and the branches that are open."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values
        self._open: list[_Branches] = []
        self._text: list[str] = []

    @property
    def _written(self) -> bool:
        return not self._open or self._open[-1].now

    def write(self, text: str) -> None:
        """Add text, if its branch is written."""
        if self._written:
            self._text.append(text)

    def begin(self, condition: list[str]) -> None:
        """Open an `if`."""
        outer, holds = self._written, self._holds(condition)
        self._open.append(_Branches(outer=outer, now=outer and holds, taken=holds))

    def turn(self, condition: list[str] | None = None) -> None:
        """Go on with the next branch of an `if`: its last one, if that has no condition."""
        if not self._open or self._open[-1].closed:
            raise _refused("an else belongs to no if")
        branches = self._open[-1]
        holds = condition is None or self._holds(condition)
        branches.now = branches.outer and holds and not branches.taken
        branches.taken = branches.taken or holds
        branches.closed = condition is None

    def end(self) -> None:
        """Close an `if`."""
        if not self._open:
            raise _refused("an end belongs to no if")
        self._open.pop()

    def field(self, name: str) -> bool:
        """Write the value of a field; say whether the prompt ends with that."""
        value = self._value(name)
        self.write(value)
        return name == ".Response" and self._written

    def text(self) -> str:
        """Return what is written."""
        return "".join(self._text)

    def whole(self) -> str:
        """Return what is written, of a template that has been read to its end."""
        if self._open:
            raise _refused("an if has no end")
        return self.text()

    def _holds(self, condition: list[str]) -> bool:
        match condition:
            case ["not", field]:
                return not self._value(field)
            case ["and" | "or" as function, _, _, *_]:
                values = [self._value(field) for field in condition[1:]]
                return all(values) if function == "and" else any(values)
            case [field]:
                return bool(self._value(field))
            case _:
                raise _refused(f"the condition {' '.join(condition)!r} is not understood")

    def _value(self, field: str) -> str:
        if field not in FIELDS:
            raise _refused(f"{field!r} is not understood")
        return self._values.get(field[1:], "")


def render(template: str, values: Mapping[str, str]) -> str:
    """Return the prompt that a template makes of `values`: System, Prompt and Suffix.

    Raises InvalidRequest for what is not understood.
    """
    made = _Rendering(values)
    at, trims = 0, False
    for action in _ACTION.finditer(template):
        made.write(_trimmed(template[at : action.start()], left=trims, right=bool(action[1])))
        at, trims = action.end(), bool(action[3])
        match action[2].split():
            case ["if", *condition]:
                made.begin(condition)
            case ["else", "if", *condition]:
                made.turn(condition)
            case ["else"]:
                made.turn()
            case ["end"]:
                made.end()
            case [comment, *_] if comment.startswith("/*"):
                pass
            case [field]:
                if made.field(field):
                    return made.text()
            case _:
                raise _refused(f"{action[0]} is not understood")
    if "{{" in template[at:]:
        raise _refused("a {{ is not closed")
    made.write(_trimmed(template[at:], left=trims, right=False))
    return made.whole()


def _trimmed(text: str, *, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text
