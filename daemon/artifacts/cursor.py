"""A position in a model file's header that can't leave the file, wherever the file is.

Owns the bounds of every read. Knows no format.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import NoReturn, Protocol

from daemon.artifacts import InvalidModelFile

MAX_HEADER_BYTES = 512 * 1024 * 1024
MAX_NAME_BYTES = 256  # of a metadata key or a tensor; engines stop at 64
_CHUNK_BYTES = 256 * 1024
_U64 = struct.Struct("<Q")


class Reader(Protocol):
    """A file, here or elsewhere, that is read piece by piece."""

    @property
    def size_bytes(self) -> int:
        """The real size of the whole file."""

    def read_at(self, offset: int, count: int) -> bytes:
        """Return bytes from `offset` on: at most `count`, fewer if that suits, none at the end.

        What it raises passes through whoever reads headers.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """A file on this machine, open as `descriptor`, as a Reader."""

    descriptor: int
    size_bytes: int

    def read_at(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes from `offset` on. Raises OSError."""
        return os.pread(self.descriptor, count, offset)


def read_at_least(reader: Reader, offset: int, count: int, most: int) -> bytes:
    """Return at least `count` and up to `most` bytes from `offset` on; less only if it ends there.

    The caller has bounded both.
    """
    found = reader.read_at(offset, most)
    while len(found) < count:
        more = reader.read_at(offset + len(found), most - len(found))
        if not more:
            break
        found += more
    return found


class Cursor:
    """A position in the header that stays inside the file and below MAX_HEADER_BYTES.

    Reads chunks instead of mapping the file: whoever cuts a mapped file short kills its readers
    (SIGBUS).
    """

    def __init__(self, reader: Reader, name: str) -> None:
        self.name = name
        self.size = reader.size_bytes
        self._reader = reader
        self._chunk = b""
        self._start = 0  # where in the file the chunk begins
        self._at = 0  # the position, relative to the chunk; may lie beyond it

    @property
    def position(self) -> int:
        """Where in the file the next byte is."""
        return self._start + self._at

    def fail(self, problem: str) -> NoReturn:
        """Raise InvalidModelFile about this file."""
        raise InvalidModelFile(f"{self.name} {problem}")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes. The caller has bounded `count`."""
        self._fill(count)
        self._at += count
        return self._chunk[self._at - count : self._at]

    def skip(self, count: int) -> None:
        """Pass `count` bytes, which need not be bounded."""
        self._check(count)
        self._at += count

    def u32(self) -> int:
        """Return the next 32-bit number."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """Return the next 64-bit number."""
        return int.from_bytes(self.take(8), "little")

    def name_string(self, what: str) -> str:
        """Return a string that names something; messages call it `what`."""
        length = self.u64()
        if not 0 < length <= MAX_NAME_BYTES:
            self.fail(f"is damaged: {what} is {length} bytes long, not 1 to {MAX_NAME_BYTES}")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"is damaged: {what}, {raw!r}, is not UTF-8 text")

    def skip_strings(self, count: int) -> None:
        """Pass `count` strings. This loop takes most of the time of reading a header."""
        while count:
            self._fill(_U64.size)
            chunk, at = self._chunk, self._at
            last = len(chunk) - _U64.size
            while at <= last and count:
                at += _U64.size + _U64.unpack_from(chunk, at)[0]
                count -= 1
            self._at = at
        self._check(0)

    def _check(self, count: int) -> None:
        end = self.position + count
        if end > MAX_HEADER_BYTES:
            self.fail(f"is damaged: its header would be longer than {MAX_HEADER_BYTES} bytes")
        if end > self.size:
            self.truncated(f"at least {end}")

    def truncated(self, needed: object) -> NoReturn:
        """Raise InvalidModelFile about a file that should have `needed` bytes."""
        self.fail(f"is truncated: its header describes {needed} bytes, the file has {self.size}")

    def _fill(self, count: int) -> None:
        self._check(count)
        if self._at + count > len(self._chunk):
            self._start, self._at = self.position, 0
            most = max(count, _CHUNK_BYTES)
            self._chunk = read_at_least(self._reader, self._start, count, most)
            if len(self._chunk) < count:
                self.fail("has become shorter while it was read")
