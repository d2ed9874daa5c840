"""Server-sent events whose headers wait for the first delta, so that early failures keep a status.

A client that waits long for that (while a model loads) gets the headers and comments; what fails
after that is an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

T = TypeVar("T")
_PATIENCE_S = 3.0
_COMMENT = b": still waiting for the model\n\n"


class EventStream:
    """One answer of type text/event-stream."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )

    @property
    def begun(self) -> bool:
        """Whether the headers are out and a failure has to be an event."""
        return self.response.prepared

    async def first(self, coming: Awaitable[T]) -> T:
        """Wait for `coming`; keep the client waiting with comments if it takes over 3 s."""
        task = asyncio.ensure_future(coming)
        try:
            while not (await asyncio.wait([task], timeout=_PATIENCE_S))[0]:
                await self._write(_COMMENT)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    async def send(self, data: Any) -> None:
        """Send one event with `data` as JSON."""
        await self._write(b"data: " + msgspec.json.encode(data) + b"\n\n")

    async def done(self) -> None:
        """Send the event that ends a stream which went well."""
        await self._write(b"data: [DONE]\n\n")

    async def _write(self, data: bytes) -> None:
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write(data)
