"""Writes small GGUF files for tests, whole ones and broken ones.

Has its own knowledge of the format, so that a mistake in the reader is not repeated here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

F32, F16, Q4_1, Q8_0, Q4_K = 0, 1, 3, 8, 12
UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10

MINIMAL: dict[str, Any] = {"general.architecture": "llama"}

_BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_1: (32, 20), Q8_0: (32, 34), Q4_K: (256, 144)}
_LETTERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A metadata value of a given type, where Python's own would be written as another.

    `content` is bytes to write them as they are.
    """

    type: int
    content: Any


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of zeros. `offset` None puts it after the one before."""

    name: str | bytes = "weight"
    dimensions: Sequence[int] = (32, 2)
    type: int = F32
    offset: int | None = None

    @property
    def size_bytes(self) -> int:
        """The bytes that the data takes; 0 for a type this module does not know."""
        block, size = _BLOCKS.get(self.type, (1, 0))
        return math.prod(self.dimensions) // block * size


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any] | Iterable[tuple[str | bytes, Any]] = MINIMAL,
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    magic: bytes = b"GGUF",
    order: str = "<",
    key_count: int | None = None,
    tensor_count: int | None = None,
    data: bytes | None = None,
) -> Path:
    """Write a GGUF file to `path` and return it.

    `metadata` may be pairs, to write a key twice. bool, int (u32, else i32, else u64), float
    (f32), str and lists of one of them are written as such, anything else as a `Value`.
    `alignment` is where data is put; the key `general.alignment` is the caller's. `key_count`,
    `tensor_count` and `data` replace what would be right.
    """
    writer = _Writer(order)
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    writer.raw += magic
    writer.pack("I", version)
    writer.pack("Q", len(tensors) if tensor_count is None else tensor_count)
    writer.pack("Q", len(pairs) if key_count is None else key_count)
    for key, value in pairs:
        writer.string(key)
        writer.value(value)
    end = 0
    for tensor in tensors:
        offset = _aligned(end, alignment) if tensor.offset is None else tensor.offset
        writer.tensor(tensor, offset)
        end = offset + tensor.size_bytes
    header = bytes(writer.raw)
    if tensors and data is None:
        data = bytes(_aligned(len(header), alignment) - len(header) + end)
    path.write_bytes(header + (data or b""))
    return path


class _Writer:
    def __init__(self, order: str) -> None:
        self.raw = bytearray()
        self._order = order

    def pack(self, letters: str, *values: Any) -> None:
        self.raw += struct.pack(self._order + letters, *values)

    def string(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.pack("Q", len(raw))
        self.raw += raw

    def value(self, value: Any) -> None:
        kind = value.type if isinstance(value, Value) else _type_of(value)
        self.pack("I", kind)
        self._content(kind, value.content if isinstance(value, Value) else value)

    def tensor(self, tensor: Tensor, offset: int) -> None:
        self.string(tensor.name)
        self.pack(f"I{len(tensor.dimensions)}Q", len(tensor.dimensions), *tensor.dimensions)
        self.pack("IQ", tensor.type, offset)

    def _content(self, kind: int, content: Any) -> None:
        if isinstance(content, bytes):
            self.raw += content
        elif kind == STRING:
            self.string(content)
        elif kind == ARRAY:
            element = _type_of(content[0]) if content else UINT32
            self.pack("IQ", element, len(content))
            for item in content:
                self._content(element, item)
        else:
            self.pack(_LETTERS[kind], content)


def _type_of(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return UINT32 if 0 <= value < 2**32 else INT32 if value < 0 else UINT64
    return {bool: BOOL, float: FLOAT32, str: STRING, list: ARRAY}[type(value)]


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
