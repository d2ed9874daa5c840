"""Renders errors in the form of the surface that the request was made on."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from enum import Enum
from typing import TypedDict, TypeVar, get_args

import msgspec
from aiohttp import web

from daemon.api.gate import Handler
from daemon.errors import BodyTimeout, Forbidden, InternalError, InvalidRequest, ModeldError

_PIECES_PATHS = (
    "/workstream_pattern_engine/",
    "/assets/",
    "/anchors/",
    "/ranges/",
    "/model/",
    "/models",
    "/.well-known/",
    "/connect",
    "/user",
    "/application",
    "/qgpt/",
    "/conversation",
    "/message",
)
_BODY_S = 30.0  # for how long a body may take to come in
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_BEGUN = web.RequestKey("begun", bool)
T = TypeVar("T")
log = logging.getLogger(__name__)


class ErrorFields(TypedDict):
    """An error: `code` for programs, `message` for people, `param` the field at fault."""

    message: str
    type: str
    code: str | None
    param: str | None


class ErrorAnswer(TypedDict):
    """An error in the form of the OpenAI API."""

    error: ErrorFields


def is_pieces(path: str) -> bool:
    """Say whether the path is one of the Pieces API, whose errors are plain text."""
    return path.startswith(_PIECES_PATHS)


def envelope(path: str, error: ModeldError) -> Mapping[str, object]:
    """Return the error in the form of the JSON surface that the path is of."""
    if path.startswith("/api/"):
        return {"error": error.message}
    if path.startswith("/v1/messages"):
        return anthropic_envelope(error)
    return openai_envelope(error)


def anthropic_envelope(error: ModeldError) -> dict[str, object]:
    """Return the error as the Anthropic API shows it."""
    kind = _ANTHROPIC_KINDS.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def openai_envelope(error: ModeldError) -> ErrorAnswer:
    """Return the error as the OpenAI API and the native API show it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "code": error.code,
            "param": error.param,
        }
    }


def _headers(error: ModeldError) -> dict[str, str]:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    return headers


def render(request: web.Request, error: ModeldError) -> web.Response:
    """Return the answer for `error`.

    The Pieces API documents 500 alone for all that can go wrong; only the gate's refusal, which is
    not part of it, keeps its status.
    """
    if is_pieces(request.path):
        status = error.status if isinstance(error, Forbidden) else 500
        return web.Response(status=status, text=error.message, headers=_headers(error))
    body = envelope(request.path, error)
    return web.json_response(body, status=error.status, headers=_headers(error))


def _from_http(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    """Render what aiohttp itself refused: an unknown path, a wrong method, a body too large."""
    if error.status == 404:
        text = f"there is nothing at {request.method} {request.path}"
    elif error.status == 405:
        text = f"{request.path} does not take {request.method}"
    else:
        text = error.text or error.reason
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    if is_pieces(request.path):
        return web.Response(status=error.status, text=text, headers=headers)
    body = envelope(request.path, _Refused(text, error.status))
    return web.json_response(body, status=error.status, headers=headers)


class _Refused(InvalidRequest):
    """What aiohttp refused, with its own status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: every error leaves as an answer in its surface's own form.

    One that comes in the middle of an answer ends the connection, so that the client sees that the
    answer is not whole: another one after it would be read as a part of it.
    """
    try:
        return await handler(request)
    except ConnectionError:
        raise  # the client has gone; aiohttp knows what to do
    except Exception as error:
        if request.get(_BEGUN):
            if request.transport is not None:
                request.transport.abort()
            raise  # aiohttp logs it, and sees that there is nothing to answer any more
        return _answer(request, error)


async def note_begin(request: web.Request, _: web.StreamResponse) -> None:
    """Signal handler: have `errors` know that the answer to a request has begun."""
    request[_BEGUN] = True


def _answer(request: web.Request, error: Exception) -> web.StreamResponse:
    """Return the answer to a request that failed; what is none of ours is logged."""
    if isinstance(error, ModeldError):
        return render(request, error)
    if isinstance(error, web.HTTPException):
        if error.status < 400:
            raise error
        return _from_http(request, error)
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return render(request, InternalError("modeld failed at this request; its log says why"))


def _choices(type_: type, param: str) -> str:
    """Return the words that a field of a struct takes, if it is an enum's."""
    field = next((f for f in msgspec.structs.fields(type_) if f.encode_name == param), None)
    kinds = (field.type, *get_args(field.type)) if field is not None else ()
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return f"; it is one of {', '.join(str(member.value) for member in kind)}"
    return ""


def validation_error(error: msgspec.ValidationError, type_: type | None = None) -> InvalidRequest:
    """Return the error that names the field of a `type_` which msgspec refused."""
    text = str(error)
    path = re.search(r" - at `\$\.?(.*?)`$", text)
    unknown = re.search(r"unknown field `(.*?)`", text)
    parent = path.group(1) if path else ""
    param = ".".join(part for part in (parent, unknown.group(1) if unknown else "") if part)
    words = text[: path.start()] if path else text
    if type_ is not None and text.startswith("Invalid enum value"):
        words += _choices(type_, param)
    # A field that may only be null is one that clients send and nobody here can do.
    unsupported = unknown is not None or words.startswith("Expected `null`, got")
    if unsupported:
        words = f"the field {param!r} is not supported"
    named = param and not unsupported
    return InvalidRequest(f"{param}: {words}" if named else words, param=param)


async def read_json(
    request: web.Request, type_: type[T], *, strict: bool = True, empty: bool = False
) -> T:
    """Return the request's body as a `type_`. Raises InvalidRequest that names what is wrong.

    No body at all is as good as `{}` where it may be `empty`.
    """
    if (request.content_length or 0) > request.client_max_size:  # without reading that much first
        raise web.HTTPRequestEntityTooLarge(request.client_max_size, request.content_length or 0)
    try:
        async with asyncio.timeout(_BODY_S):
            body = await request.read()
    except TimeoutError as error:
        raise BodyTimeout(f"the body did not come within {_BODY_S:.0f} s") from error
    if empty and not body:
        body = b"{}"
    try:
        return msgspec.json.decode(body, type=type_, strict=strict)
    except msgspec.ValidationError as error:
        raise validation_error(error, type_) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


def read_query(request: web.Request, type_: type[T]) -> T:
    """Return the request's query as a `type_`. Raises InvalidRequest that names what is wrong."""
    try:
        return msgspec.convert(dict(request.query), type_, strict=False)
    except msgspec.ValidationError as error:
        raise validation_error(error, type_) from error
