"""The file that llama.cpp keeps one sequence of a KV cache in, made to fit another number of slots.

A cache without a common pool has a part for each slot, a file says how many parts its cache had,
and the engine refuses it where that is another number. Nothing else in the file depends on it: the
parts of other slots are empty. Models with a sliding window have two caches, one after the other.
llama.cpp's server puts earlier states of such a window after them ("checkpoints"), without which it
can't go back. What else may follow a cache, such as the state of recurrent layers, is the same for
any number of slots.

What is known here are versions 3 and 4 of the format (`state_write` in llama.cpp's llama-kv-cache
and llama-context, and the server's slot files). A file that reads differently is left alone. If one
were misread all the same, the engine would refuse it: each layer of each part says what it is. Pure
but for reading and writing these files.
"""

from __future__ import annotations

import mmap
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAGIC = b"qsgg"  # 0x67677371, "ggsq"
_CHECKPOINTS = b"SCKP"
# Bytes between the number of layers and the first layer, by version.
_BEFORE_LAYERS = {3: 0, 4: 8}
# Whether there are values, and whether caches are followed by what this module does not know: the
# first reading under which a file makes sense. Models with latent attention have keys alone.
_READINGS = ((True, False), (False, False), (True, True))
_Piece = tuple[int, int] | bytes  # a range of the file, or what stands in its place


class _UnknownError(Exception):
    """The file is not laid out as this module knows it."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How caches are to be written, and how they read."""

    slots: int
    before_layers: int
    has_values: bool
    has_more: bool


@dataclass(slots=True)
class _Cursor:
    data: mmap.mmap
    at: int = 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Read little-endian numbers."""
        numbers = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return numbers

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise _UnknownError

    def skip_rows(self, count: int, size: int) -> None:
        if not size:
            raise _UnknownError
        self.skip(count * size)


@contextmanager
def refitted(path: Path, scratch: str, slots: int) -> Iterator[Path]:
    """Yield the file as a cache with `slots` slots would have written it.

    That is `path` itself, or a copy in the folder `scratch` while this lasts. A file that is not
    understood is yielded as it is: the engine has its own opinion of it. Raises OSError.
    """
    copy = Path(scratch) / f"{secrets.token_hex(16)}.refit"
    try:
        yield copy if _refit(path, copy, slots) else path
    finally:
        copy.unlink(missing_ok=True)


def _refit(source: Path, target: Path, slots: int) -> bool:
    """Write `source` to `target` so that it fits; say whether that was needed, and done."""
    if not source.stat().st_size:
        return False
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        pieces = _pieces(data, slots)
        if not pieces:
            return False
        with target.open("xb") as out, memoryview(data) as view:
            for piece in pieces:
                out.write(piece if isinstance(piece, bytes) else view[piece[0] : piece[1]])
    return True


def _pieces(data: mmap.mmap, slots: int) -> list[_Piece]:
    """Return what the new file is made of; nothing if the old one is to stay."""
    for has_values, has_more in _READINGS:
        cursor = _Cursor(data)
        try:
            magic, version, tokens = cursor.take("4sII")
            if magic != _MAGIC or version not in _BEFORE_LAYERS:
                return []
            cursor.skip(4 * tokens)
            start = cursor.at
            if cursor.take("I") == (slots,):
                return []
            cursor.at = start
            form = _Form(slots, _BEFORE_LAYERS[version], has_values, has_more)
            return [(0, start), *_cache(cursor, form), *_rest(cursor, form)]
        except (_UnknownError, struct.error):
            continue
    return []


def _rest(cursor: _Cursor, form: _Form) -> list[_Piece]:
    """Return what follows the first cache."""
    pieces: list[_Piece] = []
    end = len(cursor.data)
    while cursor.at < end:
        start = cursor.at
        checkpoints = cursor.data[start : start + 4] == _CHECKPOINTS
        try:
            pieces += (_checkpoints if checkpoints else _cache)(cursor, form)
        except (_UnknownError, struct.error):
            if not form.has_more:
                raise
            return [*pieces, (start, end)]
    return pieces


def _cache(cursor: _Cursor, form: _Form) -> list[_Piece]:
    """Return one cache: the number of parts, and each part with its number of cells first."""
    (parts,) = cursor.take("I")
    filled: list[_Piece] = []
    for _ in range(parts):
        start = cursor.at
        (cells,) = cursor.take("I")
        if cells:
            _skip_part(cursor, cells, form)
            filled.append((start, cursor.at))
    if len(filled) > 1 or not parts:
        raise _UnknownError
    return [struct.pack("<I", form.slots), *filled, bytes(4 * (form.slots - len(filled)))]


def _skip_part(cursor: _Cursor, cells: int, form: _Form) -> None:
    """Go to the end of a part that has cells."""
    for _ in range(cells):
        _, sequences = cursor.take("iI")
        cursor.skip(4 * sequences)
    transposed, layers = cursor.take("II")
    cursor.skip(form.before_layers)
    for _ in range(layers):  # keys
        _, row = cursor.take("iQ")
        cursor.skip_rows(cells, row)
    for _ in range(layers if form.has_values else 0):
        if transposed:
            _, element, row = cursor.take("iII")
            row *= element
        else:
            _, row = cursor.take("iQ")
        cursor.skip_rows(cells, row)


def _checkpoints(cursor: _Cursor, form: _Form) -> list[_Piece]:
    """Return the states that follow the caches, each a cache behind its own header and length."""
    start = cursor.at
    _, version, count = cursor.take("4sII")
    if version != 1:
        raise _UnknownError
    pieces: list[_Piece] = [(start, cursor.at)]
    for _ in range(count):
        start = cursor.at
        *_, size = cursor.take("qiiQ")
        header = (start, cursor.at - 8)
        end = cursor.at + size
        own = (cursor.at, cursor.at + 8)
        cursor.skip(8)
        state: list[_Piece] = [own]
        while cursor.at < end:
            state += _cache(cursor, form)
        if cursor.at != end or cursor.take("QQ") != (0, 0):  # of a second model and its decoder
            raise _UnknownError
        length = struct.pack("<Q", sum(_size(piece) for piece in state))
        pieces += [header, length, *state, bytes(16)]
    return pieces


def _size(piece: _Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
