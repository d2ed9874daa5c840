"""An OpenAI-compatible upstream on a local port that plays faults, on raw sockets.

Each POST is answered by the next step of `plan`, and then by a whole answer. What was asked stands
in `requests`; `left` is set when a client goes away in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, Self

KEY = "sk-local-0123456789abcdef"
MODEL = "tiny/Model 1"
Step = Callable[["Connection"], Awaitable[None]]


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Connection:
    """One request that waits for its answer. Every answer ends the connection."""

    def __init__(self, upstream: FaultyUpstream, reader, writer) -> None:
        self.upstream = upstream
        self.reader = reader
        self.writer = writer

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int, kind: str, headers: dict[str, str] | None = None) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        await self.write("\r\n".join([*lines, "", ""]).encode())

    async def event(self, event: Any) -> None:
        """Send one event as a chunk of a chunked body."""
        data = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode()
        data += b"\n\n"
        await self.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def until_left(self) -> None:
        while await self.reader.read(65536):
            pass
        self.upstream.left.set()

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, linger)
        self.writer.transport.abort()


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def end(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 3},
    },
}
WHOLE = (piece("Hello"), piece(" there"), end(), USAGE, b"data: [DONE]")


def stream(*events: Any, then: str = "close") -> Step:
    """Send `events`; `then` close in order, reset, stall, or go silently (cut the body)."""

    async def play(connection: Connection) -> None:
        await connection.head(200, "text/event-stream", {"Transfer-Encoding": "chunked"})
        for event in events:
            await connection.event(event)
        if then == "close":
            await connection.write(b"0\r\n\r\n")
        elif then == "reset":
            connection.reset()
        elif then == "stall":
            await connection.until_left()

    return play


def status(code: int, body: Any = "", **headers: str) -> Step:
    text = body if isinstance(body, str) else json.dumps(body)
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def play(connection: Connection) -> None:
        await connection.head(
            code, "application/json", named | {"Content-Length": str(len(text.encode()))}
        )
        await connection.write(text.encode())

    return play


def answer(body: Any) -> Step:
    return status(200, body)


async def reset(connection: Connection) -> None:
    """Break off before anything was said."""
    connection.reset()


async def silent(connection: Connection) -> None:
    """Take the request and say nothing."""
    await connection.until_left()


async def endless_line(connection: Connection) -> None:
    """Send a line that never ends."""
    await connection.head(200, "text/event-stream")
    try:
        while True:
            await connection.write(b"data: " + b"x" * 65536)
    except ConnectionError:
        connection.upstream.left.set()


class FaultyUpstream:
    """See the module. `async with FaultyUpstream() as upstream`."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.models: Any = {"data": [{"id": MODEL, "meta": {"n_ctx": 2048}}]}
        self.listing: Step | None = None
        self.plan: list[Step] = []
        self.requests: list[Asked] = []
        self.left = asyncio.Event()
        self.url = ""

    @property
    def posts(self) -> list[Asked]:
        return [asked for asked in self.requests if asked.method == "POST"]

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _serve(self, reader, writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            asked = await self._read(reader)
            self.requests.append(asked)
            await self._step(asked)(Connection(self, reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _read(self, reader) -> Asked:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        length = int(headers.get("content-length", 0))
        body = json.loads(await reader.readexactly(length)) if length else None
        return Asked(method=method, path=path, headers=headers, body=body)

    def _step(self, asked: Asked) -> Step:
        if asked.headers.get("authorization") != f"Bearer {KEY}":
            said = asked.headers.get("authorization", "nothing")
            return status(401, {"error": {"message": f"wrong key: {said}"}})
        if asked.method == "GET":
            return self.listing or answer(self.models)
        return self.plan.pop(0) if self.plan else stream(*WHOLE)
