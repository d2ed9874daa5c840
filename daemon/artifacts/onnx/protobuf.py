"""A bounded walker over protobuf's wire format in a file.

Owns the bounds of every read and of the number of fields. Knows no message type.

A message is a run of fields: a varint key (field number << 3 | wire type), then a varint (type 0),
8 bytes (1), a length and that many bytes (2), or 4 bytes (5). Encoding: protobuf.dev.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from daemon.artifacts import InvalidModelFile
from daemon.artifacts.cursor import Reader, read_at_least

MAX_FIELDS = 4_000_000  # large graphs have some hundred thousand
MAX_DEPTH = 32
_CHUNK_BYTES = 64 * 1024
_MAX_VARINT_BYTES = 10

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}


class Field(NamedTuple):
    """One field. `value` is a varint's number; `start` and `end` are where other values lie."""

    number: int
    kind: int
    value: int
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """The length of a value that is not a varint."""
        return self.end - self.start


class Message:
    """A file that holds one protobuf message.

    Reads chunks instead of mapping the file: whoever cuts a mapped file short kills its readers
    (SIGBUS).
    """

    def __init__(self, reader: Reader, name: str) -> None:
        self.name = name
        self.size = reader.size_bytes
        self._reader = reader
        self._chunk = b""
        self._start = 0
        self._fields = 0

    def fail(self, problem: str) -> NoReturn:
        """Raise InvalidModelFile about this file."""
        raise InvalidModelFile(f"{self.name} {problem}")

    def fields(self, start: int, end: int, depth: int = 0) -> Iterator[Field]:
        """Yield the fields of the message between two positions. Values are passed over unread."""
        if depth > MAX_DEPTH:
            self.fail(f"is damaged: its parts are nested more than {MAX_DEPTH} deep")
        at = start
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                self.fail(f"cannot be read: it has more than {MAX_FIELDS} fields")
            key, at = self.varint(at, end)
            number, kind = key >> 3, key & 7
            value, first = 0, at
            if kind == VARINT:
                value, at = self.varint(at, end)
            elif kind == BYTES:
                length, first = self.varint(at, end)
                at = first + length
            elif kind in _FIXED_BYTES:
                at += _FIXED_BYTES[kind]
            else:
                self.fail(f"is no ONNX file, or damaged: wire type {kind} at byte {first}")
            if number == 0:
                self.fail(f"is no ONNX file, or damaged: field number 0 at byte {first}")
            if at > end:
                what = "truncated" if end == self.size else "damaged"
                self.fail(
                    f"is {what}: the value at byte {first} would end at byte {at}, but what it is "
                    f"part of ends at {end}"
                )
            yield Field(number, kind, value, first, at)

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """Return the number at a position and where it ends."""
        value = 0
        for count in range(_MAX_VARINT_BYTES):
            if at + count >= end:
                break
            offset = at + count - self._start
            if not 0 <= offset < len(self._chunk):
                self._fill(at + count)
                offset = 0
            byte = self._chunk[offset]
            value |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at + count + 1
        self.fail(f"is no ONNX file, or damaged: no number ends at byte {at}")

    def text(self, field: Field, limit: int, what: str) -> str:
        """Return the text of a field; messages call it `what`. Bytes outside UTF-8 are replaced."""
        if field.kind != BYTES or field.size_bytes > limit:
            self.fail(f"is damaged: {what} has {field.size_bytes} bytes, at most {limit} are read")
        raw = read_at_least(self._reader, field.start, field.size_bytes, field.size_bytes)
        return raw.decode(errors="replace")

    def numbers(self, field: Field, limit: int) -> list[int]:
        """Return the varints of a repeated field, packed or not."""
        if field.kind == VARINT:
            return [field.value]
        if field.kind != BYTES or field.size_bytes > limit * _MAX_VARINT_BYTES:
            self.fail(f"is damaged: a list of numbers at byte {field.start} is not one")
        found, at = [], field.start
        while at < field.end:
            value, at = self.varint(at, field.end)
            found.append(value)
        return found

    def _fill(self, at: int) -> None:
        self._start = at
        self._chunk = read_at_least(self._reader, at, 1, _CHUNK_BYTES)
        if not self._chunk:
            self.fail("has become shorter while it was read")
