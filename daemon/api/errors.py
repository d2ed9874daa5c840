"""Renders errors in the form of the surface that the request was made on."""

from __future__ import annotations

import logging
import re
from typing import TypeVar

import msgspec
from aiohttp import web

from daemon.api.gate import Handler
from daemon.errors import Forbidden, InternalError, InvalidRequest, ModeldError

_PIECES_PATHS = ("/model/", "/models", "/.well-known/")
T = TypeVar("T")
log = logging.getLogger(__name__)


def is_pieces(path: str) -> bool:
    """Say whether the path is one of the Pieces API, whose errors are plain text."""
    return path.startswith(_PIECES_PATHS)


def openai_envelope(error: ModeldError) -> dict[str, object]:
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
    return web.json_response(openai_envelope(error), status=error.status, headers=_headers(error))


def _from_http(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    """Render what aiohttp itself refused: an unknown path, a wrong method, a body too large."""
    if error.status == 404:
        text = f"there is nothing at {request.method} {request.path}"
    elif error.status == 405:
        text = f"{request.path} does not take {request.method}"
    else:
        text = error.text or error.reason
    if is_pieces(request.path):
        return web.Response(status=error.status, text=text)
    envelope = {"message": text, "type": "invalid_request_error", "code": None, "param": None}
    return web.json_response({"error": envelope}, status=error.status)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: every error leaves as an answer in its surface's own form."""
    try:
        return await handler(request)
    except ModeldError as error:
        return render(request, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _from_http(request, error)
    except ConnectionError:
        raise  # the client has gone; aiohttp knows what to do
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return render(request, InternalError("modeld failed at this request; its log says why"))


def validation_error(error: msgspec.ValidationError) -> InvalidRequest:
    """Return the error that names the field which msgspec refused."""
    text = str(error)
    path = re.search(r" - at `\$\.?(.*?)`$", text)
    unknown = re.search(r"unknown field `(.*?)`", text)
    parent = path.group(1) if path else ""
    param = ".".join(part for part in (parent, unknown.group(1) if unknown else "") if part)
    words = text[: path.start()] if path else text
    if unknown:
        words = f"the field {param!r} is not supported"
    return InvalidRequest(f"{param}: {words}" if param and not unknown else words, param=param)


async def read_json(request: web.Request, type_: type[T], *, strict: bool = True) -> T:
    """Return the request's body as a `type_`. Raises InvalidRequest that names what is wrong."""
    body = await request.read()
    try:
        return msgspec.json.decode(body, type=type_, strict=strict)
    except msgspec.ValidationError as error:
        raise validation_error(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
