"""A forward proxy on this machine, which leads every host to one server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


@dataclass(slots=True)
class Proxy:
    """Enter it to start. It asks 127.0.0.1:`server_port` whatever host it is asked for.

    `answers` are statuses that it gives itself, one a request, before it asks anybody. `asked` are
    the addresses that it was asked for, `credentials` what it was shown with them.
    """

    server_port: int
    answers: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    credentials: set[str] = field(default_factory=set)
    port: int = 0
    _loop: asyncio.AbstractEventLoop | None = None
    _end: asyncio.Event | None = None
    _thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Where it listens, without a scheme."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)))
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._loop is not None and self._end is not None and self._thread is not None
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._end.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request; each connection is for one."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, url, version = head[0].split()
            self.asked.append(url)
            lines = [line for line in head[1:] if line]
            for line in lines:
                if line.lower().startswith("proxy-authorization:"):
                    self.credentials.add(line.partition(":")[2].strip())
            if self.answers:
                status = self.answers.pop(0)
                writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n".encode())
                writer.write(b"Connection: close\r\n\r\n")
            else:
                parts = urlsplit(url)
                path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
                dropped = ("proxy-", "connection:")
                lines = [line for line in lines if not line.lower().startswith(dropped)]
                request = "\r\n".join([f"{method} {path} {version}", *lines, "Connection: close"])
                await self._pass(f"{request}\r\n\r\n".encode("latin-1"), writer)
            await writer.drain()
        writer.close()

    async def _pass(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        answer, asking = await asyncio.open_connection("127.0.0.1", self.server_port)
        try:
            asking.write(request)
            while chunk := await answer.read(64 * 1024):
                writer.write(chunk)
                await writer.drain()
        finally:
            asking.close()
