"""A forward proxy on this machine for https: it makes tunnels (CONNECT), and sees no more of them.

Plain http it answers as `proxy.Proxy` does.
"""

from __future__ import annotations

import asyncio
import contextlib

from proxy import Proxy


class Tunnel(Proxy):
    """Enter it to start. All tunnels lead to 127.0.0.1:`server_port`, whatever they are asked for.

    `asked` are hosts with ports then. A tunnel that `answers` refuses is not made.
    """

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, host, _ = head[0].split()
            assert method == "CONNECT", "only https is asked of it"
            self.asked.append(host)
            for name, _, text in (line.partition(":") for line in head[1:]):
                if name.lower() == "proxy-authorization":
                    self.credentials.add(text.strip())
            if self.answers:
                status = self.answers.pop(0)
                writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
            else:
                writer.write(b"HTTP/1.1 200 Here it is\r\n\r\n")
                await self._lead(reader, writer)
        writer.close()

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what either side says, until one of them ends."""
        answer, asking = await asyncio.open_connection("127.0.0.1", self.server_port)
        ways = [
            asyncio.create_task(_pour(reader, asking)),
            asyncio.create_task(_pour(answer, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            asking.close()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(64 * 1024):
            writer.write(chunk)
            await writer.drain()
