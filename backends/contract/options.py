"""Settings that a user may pass on to an engine: an allow-list with bounds, checked by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.contract.errors import BackendError


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting: what it does, and the values that it takes.

    `kind` is `choice` (one of `choices`), `integer`, `number` or `boolean`. `minimum` and `maximum`
    are bounds of a number, both included.
    """

    help: str
    kind: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    def takes(self, value: object) -> bool:
        """Say whether `value` is one that this option takes."""
        if self.kind == "boolean":
            return isinstance(value, bool)
        if self.kind == "choice":
            return value in self.choices
        kinds = int if self.kind == "integer" else (int, float)
        return (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
        )

    def expected(self) -> str:
        """Say, for a person, which values this option takes."""
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}"
        bounds = []
        if self.minimum is not None:
            bounds.append(f"at least {self.minimum:g}")
        if self.maximum is not None:
            bounds.append(f"at most {self.maximum:g}")
        words = {"boolean": "true or false", "integer": "an integer", "number": "a number"}
        return " of ".join(
            [words[self.kind], " and ".join(bounds)] if bounds else [words[self.kind]]
        )


def check_options(
    backend: str, table: Mapping[str, Option], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `given` as a dict. Raises BackendError that names the first wrong option."""
    for name, value in given.items():
        if name not in table:
            known = ", ".join(sorted(table)) or "none"
            raise BackendError(
                "invalid_request", f"{backend} has no option {name!r}; it has: {known}"
            )
        if not table[name].takes(value):
            raise BackendError(
                "invalid_request",
                f"option {name} of {backend} is {value!r}, but must be {table[name].expected()}",
            )
    return dict(given)
