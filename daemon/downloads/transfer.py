"""A file on the network into a partial one on the disk, over several connections.

Owns which part is asked for next, over how many connections, and what is done when something goes
wrong on the way: again, later, anew, or not at all. What is asked of servers, and what they may
answer, is `ranged`; knows no hub, no channel and nothing of the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import aiohttp
import msgspec

from daemon.downloads import publish, ranged
from daemon.downloads.network_errors import NoSuchRange, Unsteady, next_try
from daemon.downloads.pace import Bucket, Climb, Patience
from daemon.downloads.partial import Partial
from daemon.downloads.ranged import Changed, RemoteFile, Timeouts
from daemon.downloads.unfinished import missing_bytes
from daemon.errors import DownloadFailed

_LOOK_S = 1.0  # how often the rate is looked at
_PIECE_S = 3.0  # how long a part should take one connection
_FIRST_PIECE_BYTES = 4 * 1024 * 1024
_LEAST_PIECE_BYTES, _MOST_PIECE_BYTES = 1024 * 1024, 64 * 1024 * 1024
_RECHECK_BYTES = 64 * 1024 * 1024  # how often the room on the disk is looked at again
_SLOW_LOOKS = 5  # a connection that lags behind its siblings for so many is replaced
_SLOW_SHARE = 1 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who hears of a transfer.

    `landed` gets the bytes that are here, and the file's size if known (else 0); `waiting` what it
    waits for, in words, "" once it goes on; `noted` what happened that a person should know.
    """

    landed: Callable[[int, int], None]
    waiting: Callable[[str], None]
    noted: Callable[[str], None]


class _NoParts(DownloadFailed):
    """The server sends all of a file or nothing."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Piece:
    """A part of the file that one connection fetches; `at` is how far it is."""

    at: int
    end: int | None
    came_bytes: int = 0  # since the last look
    slow_looks: int = 0
    task: asyncio.Task[None] | None = None
    replaced: bool = False


class Transfer:
    """One file's transfer. `bucket` bounds the rate of all that share it."""

    def __init__(
        self,
        remote: RemoteFile,
        partial: Partial,
        timeouts: Timeouts,
        bucket: Bucket,
        listener: Listener,
    ) -> None:
        known = partial.identity.version if partial.spans.total and not remote.sha256 else None
        self._remote = replace(remote, etag=known)  # where a hash decides, versions need not
        self._found: RemoteFile | None = None
        self._partial = partial
        self._timeouts = timeouts
        self._bucket = bucket
        self._listener = listener
        self._climb = Climb()
        self._patience = Patience(
            timeouts.patience_s, timeouts.first_patience_s, began=bool(partial.spans.total)
        )
        self._pieces: list[_Piece] = []
        self._piece_bytes = _FIRST_PIECE_BYTES
        self._more_at = 0.0  # when the next connection may be opened
        self._came_bytes = self._checked_bytes = 0
        self._one_stream = False
        self._begun_anew = False

    async def run(self) -> None:
        """Fetch what is missing. Raises DownloadFailed, VerificationFailed and InsufficientDisk."""
        async with ranged.session(self._timeouts) as client:
            while not self._complete():
                try:
                    await self._attempt(client)
                except Unsteady as error:
                    await self._wait(error)
                except _NoParts as error:
                    self._clean(error.message)
                except (Changed, NoSuchRange) as error:
                    if self._begun_anew or not self._partial.spans.total:
                        raise
                    self._begun_anew = True
                    self._clean(f"{error.message}; it is fetched anew")
        self._partial.note()

    def _complete(self) -> bool:
        size = self._partial.identity.size_bytes
        return size is not None and self._partial.spans.covers(0, size)

    async def _wait(self, error: Unsteady) -> None:
        self._partial.note()
        self._found = None  # an address that a redirect led to may be good for a while only
        wait_s, words = next_try(error, self._patience)
        self._listener.waiting(words)
        await asyncio.sleep(wait_s)

    def _clean(self, note: str) -> None:
        """Begin again from nothing."""
        self._listener.noted(note)
        self._partial.clean()
        self._identify(size_bytes=self._remote.size_bytes, version=None)
        self._remote = replace(self._remote, etag=None)
        self._found = None

    async def _attempt(self, client: aiohttp.ClientSession) -> None:
        """Fetch over as many connections as help, until all is here or none of them works."""
        if self._one_stream and self._partial.spans.total:
            self._partial.clean()
        try:
            self._fill(client)
            looked_at, came = time.monotonic(), self._came_bytes
            while self._pieces:
                tasks = [piece.task for piece in self._pieces if piece.task is not None]
                left_s = max(0.0, looked_at + _LOOK_S - time.monotonic())
                done, _ = await asyncio.wait(
                    tasks, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                )
                self._collect(done)
                if (passed_s := time.monotonic() - looked_at) >= _LOOK_S:
                    self._look((self._came_bytes - came) / passed_s)
                    looked_at, came = time.monotonic(), self._came_bytes
                self._fill(client)
        finally:
            await self._hang_up()

    def _collect(self, done: set[asyncio.Task[None]]) -> None:
        """Take note of connections that ended. Raises what the last one failed with."""
        ended = [piece for piece in self._pieces if piece.task in done]
        self._pieces = [piece for piece in self._pieces if piece.task not in done]
        for piece in ended:
            assert piece.task is not None
            if piece.replaced and piece.task.cancelled():
                continue
            try:
                piece.task.result()
            except Unsteady as error:
                if error.too_much:
                    self._climb.less()
                if not self._pieces:
                    raise
                self._more_at = time.monotonic() + (error.after_s or _LOOK_S)

    async def _hang_up(self) -> None:
        tasks = [piece.task for piece in self._pieces if piece.task is not None]
        self._pieces = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fill(self, client: aiohttp.ClientSession) -> None:
        """Open so many connections as there should be; one, until the server is known."""
        known = self._found is not None and not self._one_stream
        wanted = self._climb.wanted if known else 1
        while len(self._pieces) < wanted:
            if self._pieces and time.monotonic() < self._more_at:
                return
            piece = self._next()
            if piece is None:
                return
            piece.task = asyncio.create_task(self._fetch(piece, client))
            self._pieces.append(piece)

    def _next(self) -> _Piece | None:
        """Return the first part that is neither here nor on its way."""
        size = self._partial.identity.size_bytes
        if self._one_stream or size is None:
            end = None if self._one_stream else self._piece_bytes
            return None if self._pieces or self._complete() else _Piece(at=0, end=end)
        taken = self._partial.spans.copy()
        for piece in self._pieces:
            if piece.end is not None:
                taken.add(piece.at, piece.end)
        for start, end in taken.missing(size):
            return _Piece(at=start, end=min(end, start + self._piece_bytes))
        return None

    def _look(self, bytes_per_s: float) -> None:
        """Decide anew on connections, the size of pieces, and who is too slow."""
        self._climb.look(bytes_per_s)
        each = int(_PIECE_S * bytes_per_s / max(1, len(self._pieces)))
        self._piece_bytes = min(max(each, _LEAST_PIECE_BYTES), _MOST_PIECE_BYTES)
        came = sorted(piece.came_bytes for piece in self._pieces)
        for piece in self._pieces:
            slow = len(came) > 1 and piece.came_bytes < _SLOW_SHARE * came[len(came) // 2]
            piece.slow_looks = piece.slow_looks + 1 if slow else 0
            piece.came_bytes = 0
            if piece.slow_looks >= _SLOW_LOOKS and piece.task is not None:
                piece.replaced = True
                piece.task.cancel()  # what it has yet to bring is asked for again

    async def _fetch(self, piece: _Piece, client: aiohttp.ClientSession) -> None:
        async with await self._ask(piece, client) as answer:
            if not self._one_stream and (answer.whole or answer.total_bytes is None):
                self._one_stream = True
                if not answer.whole or self._partial.spans.total or len(self._pieces) > 1:
                    raise _NoParts(
                        f"{self._remote.name}: its server gives no parts of files, so all of it "
                        "is fetched in one"
                    )
            if answer.whole or (piece.end or 0) > (answer.total_bytes or 0):
                piece.end = answer.total_bytes
            self._listener.waiting("")
            if piece.end is not None:
                self._partial.prepare(piece.at, min(piece.end, piece.at + _MOST_PIECE_BYTES))
            while chunk := await answer.more():
                await self._land(piece, chunk)
        if piece.end is None:
            self._identify(size_bytes=piece.at, version=self._partial.identity.version)

    async def _ask(self, piece: _Piece, client: aiohttp.ClientSession) -> ranged.Answer:
        """Ask where the file was found before, or else where it should be."""
        if self._found is not None:
            try:
                return await ranged.ask(client, self._found, start=piece.at, end=piece.end)
            except (Changed, NoSuchRange, Unsteady):
                raise
            except DownloadFailed:
                self._found = None  # the address was good for a while, as signed ones are
        answer = await ranged.ask(
            client, self._remote, start=piece.at, end=piece.end, or_whole=True
        )
        self._remote = replace(self._remote, etag=answer.etag)
        self._found = answer.found
        size = answer.total_bytes
        self._identify(
            size_bytes=self._partial.identity.size_bytes if size is None else size,
            version=answer.etag,
        )
        self._room()
        return answer

    def _identify(self, *, size_bytes: int | None, version: str | None) -> None:
        self._partial.identify(
            msgspec.structs.replace(self._partial.identity, size_bytes=size_bytes, version=version)
        )

    def _room(self) -> None:
        folder, size = self._partial.data.parent, self._partial.identity.size_bytes or 0
        publish.require_room(folder, missing_bytes(folder, size))

    async def _land(self, piece: _Piece, chunk: bytes) -> None:
        full = self._partial.land(piece.at, chunk)
        piece.at += len(chunk)
        piece.came_bytes += len(chunk)
        self._came_bytes += len(chunk)
        self._patience.progress()
        if self._came_bytes - self._checked_bytes >= _RECHECK_BYTES:
            self._checked_bytes = self._came_bytes
            publish.require_room(self._partial.data.parent, 0)
        self._listener.landed(self._partial.spans.total, self._partial.identity.size_bytes or 0)
        if full:
            await asyncio.to_thread(self._partial.settle)
        await self._bucket.take(len(chunk))
