"""The native stream of events as clients read it: over a WebSocket, or line by line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientResponse

PATH = "/modeld/v1/events"


async def of_socket(socket: Any) -> AsyncIterator[dict[str, Any]]:
    """Give the events of a WebSocket."""
    async for message in socket:
        yield json.loads(message.data)


async def of_lines(response: ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Give server-sent events; each must have its type for a name."""
    name = ""
    async for line in response.content:
        if line.startswith(b"event: "):
            name = line.removeprefix(b"event: ").decode().strip()
        if line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            assert event["type"] == name
            yield event
