"""What a route takes and answers, written beside its handler: `/openapi.json` is made of this.

The types are those that check requests and build answers, so that the description stays true.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from daemon.errors import (
    BackendUnavailable,
    BodyTimeout,
    Conflict,
    EngineError,
    InsufficientMemory,
    InvalidRequest,
    LoadTimeout,
    ModeldError,
    ModelNotFound,
    QueueFull,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
H = TypeVar("H", bound=Handler)
JSON, SSE, NDJSON, TEXT = (
    "application/json",
    "text/event-stream",
    "application/x-ndjson",
    "text/plain",
)
# What can go wrong wherever a model is asked for, and wherever it is made to work.
NO_MODEL: tuple[type[ModeldError], ...] = (ModelNotFound,)
WORK: tuple[type[ModeldError], ...] = (
    ModelNotFound,
    Conflict,
    QueueFull,
    BackendUnavailable,
    EngineError,
    InsufficientMemory,
    LoadTimeout,
)
_WITH_BODY: tuple[type[ModeldError], ...] = (InvalidRequest, BodyTimeout)
_KEY = "__modeld_operation__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route's description.

    `answers` are the types of what succeeds, by status; None: no body, `str`: plain text. `stream`
    is the type of the pieces of an answer that is sent in pieces, as `stream_type`, or a tuple of
    their types; `last` is what ends a stream of events, if that is no piece. `errors` are those
    that it may answer with, besides the gate's. `frames` is the type of what comes over a
    WebSocket, where one may be opened, and `sent` that of what clients send.
    """

    body: Any = None
    optional_body: bool = False
    query: Any = None
    answers: Mapping[int, Any] = field(default_factory=dict)
    stream: Any = None
    stream_type: str = SSE
    last: str = ""
    errors: tuple[type[ModeldError], ...] = ()
    frames: Any = None
    sent: Any = None


def operation(
    answer: Any = None,
    *,
    body: Any = None,
    optional_body: bool = False,
    query: Any = None,
    answers: Mapping[int, Any] | None = None,
    stream: Any = None,
    stream_type: str = SSE,
    last: str = "",
    errors: tuple[type[ModeldError], ...] = (),
    frames: Any = None,
    sent: Any = None,
) -> Callable[[H], H]:
    """Describe a handler: see Operation. `answer` is short for `answers={200: answer}`."""
    if body is not None:
        errors = (*_WITH_BODY, *errors)
    elif query is not None:
        errors = (InvalidRequest, *errors)
    described = Operation(
        body=body,
        optional_body=optional_body,
        query=query,
        answers={200: answer} if answers is None else answers,
        stream=stream,
        stream_type=stream_type,
        last=last,
        errors=errors,
        frames=frames,
        sent=sent,
    )

    def describe(handler: H) -> H:
        setattr(handler, _KEY, described)
        return handler

    return describe


def described(handler: object) -> Operation | None:
    """Return a handler's description."""
    return getattr(handler, _KEY, None)
