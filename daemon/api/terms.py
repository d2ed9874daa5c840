"""What any request may say besides what it asks, on all surfaces."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from daemon.config import parse_duration
from daemon.errors import ConfigError, InvalidRequest
from daemon.models import Priority, Terms

ContextLength = Annotated[int, msgspec.Meta(ge=1, le=2**24)]


class Effort(StrEnum):
    """How much a model is to think before it answers, in the words of all APIs."""

    NONE = "none"
    MINIMAL = "minimal"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    XHIGH = "xhigh"
    MAX = "max"

    @property
    def to_backend(self) -> str:
        """The word that backends know for it: chat templates know nothing beyond high."""
        return "high" if self in (Effort.XHIGH, Effort.MAX) else self.value


class TermsBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of requests that hold a model.

    `keep_alive` is how long the model stays in memory afterwards, as Ollama has it: seconds or
    "5m"; 0 unloads it, less than 0 keeps it. `ttl` is LM Studio's word for it, in seconds.
    `context_length` is the least that the model must be loaded with, in tokens.
    """

    keep_alive: int | float | str | None = None
    ttl: Annotated[int, msgspec.Meta(ge=0, le=10**9)] | None = None
    context_length: ContextLength | None = None
    priority: Priority | None = None

    def terms(self) -> Terms:
        """Return what is said. Raises InvalidRequest."""
        keep_alive_s = None if self.ttl is None else float(self.ttl)
        if self.keep_alive is not None:
            keep_alive_s = duration(self.keep_alive, "keep_alive")
        return Terms(
            keep_alive_s=keep_alive_s,
            context_length=self.context_length,
            priority=self.priority or Priority.INTERACTIVE,
        )


def duration(value: float | str, field: str) -> float:
    """Return seconds, `math.inf` for ever. Raises InvalidRequest that names the field."""
    try:
        return parse_duration(value, field)
    except ConfigError as error:
        raise InvalidRequest(error.message, param=field) from error
