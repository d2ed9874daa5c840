"""Files on the network, read where they are: what readers of headers need of them, and little more.

Owns how much is asked for at once, and how much in all. What is asked of servers, and what they may
answer, is `ranged`. Blocks: an event loop of its own runs while a file is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from daemon.artifacts.cursor import Reader
from daemon.downloads import ranged
from daemon.downloads.ranged import Answer, RemoteFile, Timeouts
from daemon.errors import DownloadFailed

MAX_BYTES = 64 * 1024 * 1024  # of all files together
FIRST_BYTES = 1024 * 1024  # headers take 2 to 8 MB, most of it vocabulary
MAX_PART_BYTES = 4 * 1024 * 1024
# Readers of GGML files jump from tensor to tensor: a part that is not the next one is small. What
# is passed over within the next one, such as the end of a string, is no jump.
JUMP_BYTES = 16 * 1024
_NEAR_BYTES = 64 * 1024

T = TypeVar("T")


class RemoteFiles:
    """Opens files on the network, all by one client, which keeps its connections alive.

    Leaving it hangs up.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._left_bytes = MAX_BYTES
        self._streams: list[Answer] = []

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner().__enter__()
        self._client = self._runner.run(self._connect())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for answer in self._streams:
            answer.close()
        self._runner.run(self._client.close())
        self._runner.close()

    def open(self, remote: RemoteFile) -> Reader:
        """Return a reader of the file; like the reader it raises DownloadFailed.

        A server that gives no parts of files is read from the beginning, and no further than asked.
        """
        answer = self.run(
            ranged.ask(self._client, remote, end=self._granted(remote, FIRST_BYTES), or_whole=True)
        )
        size_bytes = answer.total_bytes
        if size_bytes is None:
            answer.close()
            raise DownloadFailed(
                f"{remote.name}: its server does not say how large it is, so it can only be "
                "downloaded, not looked at before"
            )
        if answer.whole:
            self._streams.append(answer)
            return _Stream(self, answer, size_bytes)
        return _Parts(self, answer.found, size_bytes, self.run(self._all_of(answer)))

    def part(self, remote: RemoteFile, start: int, wanted: int) -> bytes:
        """Return `wanted` bytes from `start` on, or as many of them as may still be read."""
        return self.run(self._part(remote, start, start + self._granted(remote, wanted)))

    def more(self, remote: RemoteFile, answer: Answer) -> bytes:
        """Return the next bytes of an answer."""
        self._granted(remote, 1)
        return self.run(self._more(answer))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`."""
        return self._runner.run(work)

    def _granted(self, remote: RemoteFile, wanted: int) -> int:
        if not self._left_bytes:
            raise too_long(remote)
        return min(wanted, self._left_bytes)

    async def _connect(self) -> aiohttp.ClientSession:
        return ranged.session(self._timeouts)

    async def _part(self, remote: RemoteFile, start: int, end: int) -> bytes:
        return await self._all_of(await ranged.ask(self._client, remote, start=start, end=end))

    async def _all_of(self, answer: Answer) -> bytes:
        found = bytearray()
        async with answer:
            while chunk := await self._more(answer):
                found += chunk
        return bytes(found)

    async def _more(self, answer: Answer) -> bytes:
        chunk = await answer.more()
        self._left_bytes = max(0, self._left_bytes - len(chunk))
        return chunk


def too_long(remote: RemoteFile) -> DownloadFailed:
    """Return the error for a file of which more would have to be read than is."""
    return DownloadFailed(
        f"{remote.name}: {MAX_BYTES:,} bytes are not enough to tell what it is, and no more are "
        "read of a model that is not downloaded"
    )


class _Parts:
    """A file of which the server gives parts; the first one and the latest are kept."""

    def __init__(
        self, files: RemoteFiles, remote: RemoteFile, size_bytes: int, first: bytes
    ) -> None:
        self.size_bytes = size_bytes
        self._files = files
        self._remote = remote
        self._kept = [(0, first)]
        self._next = len(first)  # the position after the latest part
        self._part_bytes = FIRST_BYTES

    def read_at(self, offset: int, count: int) -> bytes:
        for start, part in self._kept:
            if start <= offset < start + len(part):
                return part[offset - start : offset - start + count]
        if offset >= self.size_bytes:
            return b""
        near = 0 <= offset - self._next < _NEAR_BYTES
        self._part_bytes = min(2 * self._part_bytes, MAX_PART_BYTES) if near else JUMP_BYTES
        wanted = min(max(count, self._part_bytes), self.size_bytes - offset)
        part = self._files.part(self._remote, offset, wanted)
        self._kept[1:] = [(offset, part)]
        self._next = offset + len(part)
        return part[:count]


class _Stream:
    """A file that the server sends from its beginning; all that was read of it is kept."""

    def __init__(self, files: RemoteFiles, answer: Answer, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._files = files
        self._answer = answer
        self._read = bytearray()

    def read_at(self, offset: int, count: int) -> bytes:
        if MAX_BYTES <= offset < self.size_bytes:
            raise too_long(self._answer.found)
        while len(self._read) <= offset < self.size_bytes:
            self._read += self._files.more(self._answer.found, self._answer)
        return bytes(self._read[offset : offset + count])
