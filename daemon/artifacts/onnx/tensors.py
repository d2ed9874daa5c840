"""The tensors in an ONNX file: where their data lies, and how much there is.

Owns the check that every tensor's data is whole and lies in this file or in a file beside it.
Never reads weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from daemon.artifacts.onnx.protobuf import BYTES, VARINT, Field, Message

MAX_NAME_BYTES = 1024  # exporters build long names out of module paths
MAX_TENSORS = 65_536
MAX_FIELDS = 10_000  # of one tensor: its data is one field, unless a writer is very odd
MAX_DIMENSIONS = 32
_INT64_MAX = 2**63 - 1

_HALF = (10, 16)  # float16 and bfloat16
# TensorProto.DataType: name and bits of an element; strings have no fixed size.
ELEMENT_TYPES = {
    1: ("F32", 32),
    2: ("UINT8", 8),
    3: ("INT8", 8),
    4: ("UINT16", 16),
    5: ("INT16", 16),
    6: ("INT32", 32),
    7: ("INT64", 64),
    8: ("STRING", 0),
    9: ("BOOL", 8),
    10: ("F16", 16),
    11: ("F64", 64),
    12: ("UINT32", 32),
    13: ("UINT64", 64),
    14: ("COMPLEX64", 64),
    15: ("COMPLEX128", 128),
    16: ("BF16", 16),
    17: ("F8", 8),
    18: ("F8", 8),
    19: ("F8", 8),
    20: ("F8", 8),
    21: ("UINT4", 4),
    22: ("INT4", 4),
    23: ("F4", 4),
    24: ("F8", 8),
    25: ("UINT2", 2),
    26: ("INT2", 2),
}
_NOT_WEIGHTS = frozenset(("INT32", "INT64", "BOOL", "STRING", "UINT32", "UINT64"))
# Tensor data in a field of its element's kind, by field number: least bytes of one element.
_TYPED_DATA = {4: 4.0, 5: 0.25, 7: 1.0, 10: 8.0, 11: 1.0}
_EXTERNAL = 1


class Tensor(NamedTuple):
    """One tensor: its type, by the number of TensorProto.DataType, and its size."""

    type: int
    elements: int

    @property
    def size_bytes(self) -> int:
        """The bytes of its elements."""
        return -(-self.elements * ELEMENT_TYPES[self.type][1] // 8)


class Tensors:
    """Collects the tensors of the file `message`; `folder` is where it lies.

    `external` are the names of files beside it that hold tensors.
    """

    def __init__(self, message: Message, folder: Path) -> None:
        self.named: dict[str, Tensor] = {}
        self.external: set[str] = set()
        self.weights_bytes = 0
        self.parameters = 0
        self._message = message
        self._folder = folder
        self._read = 0
        self._half_bytes = 0
        self._bytes_by_type: Counter[str] = Counter()
        self._sizes: dict[str, int] = {}

    def read(self, tensor: Field, depth: int) -> None:
        """Take in the TensorProto at `tensor`."""
        every = self._message.fields(tensor.start, tensor.end, depth)
        fields = list(islice(every, MAX_FIELDS + 1))
        if len(fields) > MAX_FIELDS:
            self._message.fail(
                f"cannot be read: a tensor is spread over more than {MAX_FIELDS} fields"
            )
        last = {part.number: part for part in fields}
        name = self._text(last[8]) if 8 in last else ""
        dimensions = [
            number
            for part in fields
            if part.number == 1
            for number in self._message.numbers(part, MAX_DIMENSIONS)
        ]
        made = self._checked(name, last[2].value if 2 in last else 0, dimensions)
        if 14 in last and last[14].value == _EXTERNAL:
            pairs = [self._pair(p, depth + 1) for p in fields if p.number == 13 and p.kind == BYTES]
            self._check_external(name, made, dict(pairs))
        elif 9 in last and last[9].size_bytes != made.size_bytes:
            self._message.fail(
                f"is damaged: tensor {name!r} needs {made.size_bytes} bytes and has "
                f"{last[9].size_bytes}"
            )
        elif 9 not in last and made.size_bytes and _typed_elements(fields) < made.elements:
            self._message.fail(f"is damaged: tensor {name!r} has no data for {dimensions}")
        self._count(name, made)

    @property
    def quantization(self) -> str:
        """The name of the type that most of the weights' bytes have."""
        most = self._bytes_by_type.most_common(1)
        return most[0][0] if most else "unknown"

    def resident_bytes(self, casts: dict[str, int]) -> int:
        """Return the bytes that a CPU's memory will hold.

        `casts` says into which type graphs cast the tensors of these names: an engine does that
        once, at load. It has no arithmetic for 16-bit floats, and makes 32 bits of them.
        """
        more = 0
        for name, kind in casts.items():
            tensor = self.named.get(name)
            if tensor is not None and kind in ELEMENT_TYPES and tensor.type not in _HALF:
                more += max(0, tensor._replace(type=kind).size_bytes - tensor.size_bytes)
        return self.weights_bytes + self._half_bytes + more

    def _text(self, part: Field) -> str:
        return self._message.text(part, MAX_NAME_BYTES, "the name of a tensor")

    def _checked(self, name: str, kind: int, dimensions: list[int]) -> Tensor:
        if kind not in ELEMENT_TYPES:
            self._message.fail(f"cannot be read: tensor {name!r} has the unknown type {kind}")
        elements = math.prod(dimensions)
        if len(dimensions) > MAX_DIMENSIONS or max(elements, *dimensions, 0) > _INT64_MAX:
            self._message.fail(f"is damaged: tensor {name!r} has impossible dimensions")
        return Tensor(kind, elements)

    def _pair(self, pair: Field, depth: int) -> tuple[str, str]:
        key = value = ""
        for part in self._message.fields(pair.start, pair.end, depth):
            if part.number == 1:
                key = self._text(part)
            elif part.number == 2:
                value = self._text(part)
        return key, value

    def _check_external(self, name: str, tensor: Tensor, where: dict[str, str]) -> None:
        """Check that a tensor's data lies in a file beside this one, and inside that."""
        location = where.get("location", "")
        path = PurePosixPath(location)
        if (
            not location
            or path.is_absolute()
            or ".." in path.parts
            or re.search(r"[\\\0]", location)
        ):
            self._message.fail(
                f"is refused: tensor {name!r} lies in {location!r}, and only files beside the "
                "model are read"
            )
        numbers = [where.get("offset", "0"), where.get("length", str(tensor.size_bytes))]
        if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
            self._message.fail(f"is damaged: the place of tensor {name!r} is {numbers}")
        offset, length = map(int, numbers)
        available = self._size_of(str(path))
        if length != tensor.size_bytes or offset + length > available:
            self._message.fail(
                f"does not fit {location}: tensor {name!r} needs {tensor.size_bytes} bytes, and is "
                f"said to have {length} from byte {offset} of {available}: download {location} anew"
            )
        self.external.add(str(path))

    def _size_of(self, location: str) -> int:
        if location not in self._sizes:
            path = self._folder / location
            try:
                if not path.resolve().is_relative_to(self._folder.resolve()):
                    self._message.fail(f"is refused: {location} leads out of its folder")
                self._sizes[location] = path.stat().st_size
            except OSError as error:
                self._message.fail(
                    f"needs {location}, which cannot be read ({error.strerror}): put it beside it"
                )
        return self._sizes[location]

    def _count(self, name: str, tensor: Tensor) -> None:
        self._read += 1
        if self._read > MAX_TENSORS:
            self._message.fail(f"is damaged: it has more than {MAX_TENSORS} tensors")
        self.named[name] = tensor
        self.weights_bytes += tensor.size_bytes
        self._half_bytes += tensor.size_bytes if tensor.type in _HALF else 0
        label = ELEMENT_TYPES[tensor.type][0]
        if label not in _NOT_WEIGHTS:
            self.parameters += tensor.elements
            self._bytes_by_type[label] += tensor.size_bytes


def _typed_elements(fields: list[Field]) -> float:
    """Return how many elements the data in typed fields may have, at the very most."""
    found = 0.0
    for part in fields:
        if part.number in _TYPED_DATA:
            size = 1 if part.kind == VARINT else part.size_bytes
            found += size / _TYPED_DATA[part.number]
    return found
