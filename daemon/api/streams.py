"""Answers in pieces. Headers wait for the first piece, so that early failures keep their status.

A client that waits long for that (while a model loads) gets the headers and, where its protocol
allows that, comments; what fails after that is a piece too. A client that stops reading is left,
as it is by answers that are whole.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from daemon.api.gate import Handler

T = TypeVar("T")
_PATIENCE_S = 3.0
_ROOM_BYTES = 16 * 1024  # what a connection takes at once that nothing waits on
DONE = "[DONE]"  # what OpenAI ends its streams with
STALLED_S = 30.0  # for how long a client may read nothing of what waits for it


@web.middleware
async def deliver(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: an answer that its client does not read is left, as a stream is."""
    response = await handler(request)
    transport = request.transport
    if not isinstance(response, web.Response) or response.prepared or transport is None:
        return response
    size = len(response.body) if isinstance(response.body, bytes | bytearray) else _ROOM_BYTES
    if size < _ROOM_BYTES and not transport.get_write_buffer_size():
        return response  # aiohttp sends it, and nothing waits
    sending = asyncio.ensure_future(_send(request, response))
    try:
        left = -1
        while not (await asyncio.wait([sending], timeout=STALLED_S))[0]:
            if transport.get_write_buffer_size() == left:
                transport.abort()
                break
            left = transport.get_write_buffer_size()
        with contextlib.suppress(ConnectionError):  # aiohttp sees that nobody is there
            await sending
    finally:
        sending.cancel()
    return response


async def _send(request: web.Request, response: web.Response) -> None:
    await response.prepare(request)
    await response.write_eof()


class Stream:
    """Base of the answers that go out in pieces of JSON."""

    content_type = ""
    comment = b""  # what keeps a client waiting

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={"Content-Type": self.content_type, "Cache-Control": "no-cache"}
        )

    @property
    def begun(self) -> bool:
        """Whether the headers are out and a failure has to be a piece."""
        return self.response.prepared

    async def first(self, coming: Awaitable[T]) -> T:
        """Wait for `coming`; keep the client waiting with comments if it takes over 3 s."""
        task = asyncio.ensure_future(coming)
        try:
            while not (await asyncio.wait([task], timeout=_PATIENCE_S))[0]:
                if self.comment:
                    await self.write(self.comment)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    def encode(self, data: Mapping[str, Any]) -> bytes:
        """Return one piece as it is sent."""
        raise NotImplementedError

    async def send(self, *pieces: Mapping[str, Any]) -> None:
        """Send pieces, one after the other."""
        for data in pieces:
            await self.write(self.encode(data))

    async def done(self) -> None:
        """Send what ends a stream that went well."""

    async def write(self, data: bytes) -> None:
        """Send bytes. Raises ConnectionResetError once the client has stopped reading."""
        if not self.response.prepared:
            await self.response.prepare(self._request)
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        # The usual case needs no clock, which would cost half as much as all else about a token.
        if len(data) < _ROOM_BYTES and not transport.get_write_buffer_size():
            await self.response.write(data)
            return
        try:
            async with asyncio.timeout(STALLED_S):
                await self.response.write(data)
        except TimeoutError:
            transport.abort()
            raise ConnectionResetError("the client does not read its answer") from None


class EventStream(Stream):
    """Server-sent events: `data` alone, and DONE as the last."""

    content_type = "text/event-stream"
    comment = b": still waiting for the model\n\n"

    def encode(self, data: Mapping[str, Any]) -> bytes:
        """See Stream."""
        return b"data: " + msgspec.json.encode(data) + b"\n\n"

    async def done(self) -> None:
        """See Stream."""
        await self.write(f"data: {DONE}\n\n".encode())


class NamedEventStream(Stream):
    """Server-sent events that are named by the `type` of their data."""

    content_type = "text/event-stream"
    comment = EventStream.comment

    def encode(self, data: Mapping[str, Any]) -> bytes:
        """See Stream."""
        name = str(data["type"]).encode()
        return b"event: " + name + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


class LineStream(Stream):
    """A JSON object a line. Its clients take nothing else: they are kept waiting without a word."""

    content_type = "application/x-ndjson"

    def encode(self, data: Mapping[str, Any]) -> bytes:
        """See Stream."""
        return msgspec.json.encode(data) + b"\n"
