"""What all WebSockets of this surface share: they push, and end with the client or the daemon."""

from __future__ import annotations

import asyncio
import logging
import socket as socket_module
from collections.abc import Coroutine
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from daemon.api.context import services

_HEARTBEAT_S = 30.0
# Some clients answer a close and then never end the connection; a stop must not wait for them.
_CLOSE_S = 1.0
log = logging.getLogger(__name__)


def is_upgrade(request: web.Request) -> bool:
    """Say whether the client asks for a WebSocket; SDKs have a plain GET for each path too."""
    return web.WebSocketResponse().can_prepare(request).ok


async def accept(request: web.Request) -> web.WebSocketResponse:
    """Accept the WebSocket. A client that stops answering pings is dropped."""
    socket = web.WebSocketResponse(
        heartbeat=_HEARTBEAT_S, timeout=_CLOSE_S, compress=False, autoclose=False
    )
    await socket.prepare(request)
    return socket


async def push(
    request: web.Request, socket: web.WebSocketResponse, sending: Coroutine[Any, Any, None]
) -> web.WebSocketResponse:
    """Run `sending` until it ends, the client leaves, or the daemon stops; then close."""
    return await serve(request, socket, sending, _until_closed(socket))


async def serve(
    request: web.Request, socket: web.WebSocketResponse, *work: Coroutine[Any, Any, None]
) -> web.WebSocketResponse:
    """Run `work`, one part of which reads from the socket, until one of its parts ends.

    It also ends when the daemon stops; then close, and say so if it is since something failed.
    """
    tasks = {asyncio.create_task(part) for part in (*work, _until_stopping(request))}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    failures = [error for task in done if (error := task.exception()) is not None]
    code, words = WSCloseCode.OK, b""
    for error in failures:
        if not isinstance(error, ConnectionError):
            log.error("the WebSocket %s failed", request.path, exc_info=error)
            code, words = WSCloseCode.INTERNAL_ERROR, b"modeld failed; its log says why"
    _cork(request)
    await socket.close(code=code, message=words)
    return socket


def _cork(request: web.Request) -> None:
    """Have the last frame and the end of the connection leave together.

    Clients that read in one thread and close in another (websocket-client does) wait 10 s for an
    end which comes after the frame that answers theirs.
    """
    opened = request.transport.get_extra_info("socket") if request.transport else None
    if opened is not None and opened.family != socket_module.AF_UNIX:
        cork = getattr(socket_module, "TCP_CORK", None)  # Linux has it
        if cork is not None:
            opened.setsockopt(socket_module.IPPROTO_TCP, cork, 1)


async def _until_closed(socket: web.WebSocketResponse) -> None:
    """Read what the client sends, which is nothing of interest, until it has gone."""
    async for message in socket:
        if message.type is WSMsgType.ERROR:
            return


async def _until_stopping(request: web.Request) -> None:
    await services(request).stopping.wait()
