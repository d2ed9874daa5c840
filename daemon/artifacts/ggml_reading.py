"""One attempt to read a GGML file under a layout, with every count checked against the file.

Owns the bounds. Knows neither which layout to try nor what the facts are for.
"""

from __future__ import annotations

import math
import struct
from typing import NoReturn

from daemon.artifacts.cursor import Reader, read_at_least
from daemon.artifacts.ggml_layouts import MARKERS, UNIFORM_TYPES, Layout
from daemon.artifacts.ggml_types import FILE_TYPES, TENSOR_TYPES, TensorType

MAX_TOKEN_BYTES = 4096
MAX_TOKENS = 1024 * 1024
_MIN_TOKENS = 12  # engines give the first ones meanings of their own
MAX_LAYERS = 1024
MAX_TENSOR_NAME_BYTES = 128
# Of what the header's numbers may be; all of them are at least 1.
_BOUNDS = {
    "vocabulary": MAX_TOKENS,
    "merges": 4 * MAX_TOKENS,
    "context": 4 * 1024 * 1024,
    "embedding": 65_536,
    "heads": 4096,
    "heads_kv": 4096,
    "layers": MAX_LAYERS,
}
_TYPES = {name: TENSOR_TYPES[number] for number, name in enumerate(("F32", "F16", "Q4_0", "Q4_1"))}
_TYPES |= {kind.name: kind for n, kind in TENSOR_TYPES.items() if n in (6, 7, 8, *range(10, 15))}
_NUMBERS = {kind.name: number for number, kind in TENSOR_TYPES.items()}
_INT32_MAX = 2**31 - 1
_ALIGNMENT = 32
_CHUNK_BYTES = 64 * 1024


class Unfit(Exception):
    """The file does not have the layout that it is read under; `position` is how far it did."""

    def __init__(self, problem: str, position: int) -> None:
        super().__init__(problem)
        self.problem = problem
        self.position = position


class Scan:
    """A position in the file that can't leave it. Reads little at a time: most is passed over."""

    def __init__(self, reader: Reader, position: int) -> None:
        self.size_bytes = reader.size_bytes
        self.position = position
        self._reader = reader
        self._chunk = b""
        self._chunk_at = 0

    def fail(self, problem: str) -> NoReturn:
        """Raise Unfit."""
        raise Unfit(problem, self.position)

    def take(self, count: int, ahead: int = 0) -> bytes:
        """Return the next `count` bytes; more bytes `ahead` are likely to be asked for."""
        self._check(count)
        at = self.position - self._chunk_at
        if not 0 <= at <= len(self._chunk) - count:
            self._chunk = read_at_least(self._reader, self.position, count, count + ahead)
            self._chunk_at, at = self.position, 0
            if len(self._chunk) < count:
                self.fail("has become shorter while it was read")
        self.position += count
        return self._chunk[at : at + count]

    def integers(self, count: int) -> tuple[int, ...]:
        """Return the next `count` 32-bit numbers."""
        return struct.unpack(f"<{count}i", self.take(4 * count))

    def skip(self, count: int) -> None:
        """Pass `count` bytes."""
        self._check(count)
        self.position += count

    def _check(self, count: int) -> None:
        if self.position + count > self.size_bytes:
            needed = self.position + count
            self.fail(
                f"is truncated: it describes at least {needed} bytes, the file has "
                f"{self.size_bytes}"
            )


class Reading:
    """One attempt to read the file under a layout. Raises Unfit."""

    def __init__(self, scan: Scan, layout: Layout, magic: str, version: int) -> None:
        self._scan = scan
        self._layout = layout
        self.container = f"{magic} v{version}" if version else magic
        self._found: set[str] = set()
        self.marked: set[bytes] = set()
        self._types: dict[str, int] = {}  # bytes by type
        self.tied_bytes = 0
        self.weights_bytes = 0
        self.parameters = 0
        raw = dict(zip(layout.numbers, scan.integers(len(layout.numbers)), strict=True))
        self.numbers = {key: value for key, value in raw.items() if not key.startswith("-")}
        self.quantized_by = version - 1 if version else self.numbers["file_type"] // 1000
        if magic == "ggcc":
            self.quantized_by = 2
        self.numbers["file_type"] %= 1000
        self._type = UNIFORM_TYPES.get(self.numbers["file_type"], "")
        try:
            self._check_numbers()
        except Unfit as unfit:  # it has got nowhere
            raise Unfit(unfit.problem, 0) from None
        self._read_vocabulary()
        self._read_tensors()
        self._check_quantization()

    @property
    def quantization(self) -> str:
        """llama.cpp's name for the types of the weights."""
        if self._layout.uniform:
            return self._type
        most = max(self._types, key=self._types.__getitem__)
        return FILE_TYPES.get(self.numbers["file_type"], most)

    def _check_numbers(self) -> None:
        for key, limit in _BOUNDS.items():
            value = self.numbers.get(key, 1)
            if not 1 <= value <= limit:
                self._scan.fail(f"is damaged: its {key} is {value}, not 1 to {limit}")
        if self.numbers["vocabulary"] < _MIN_TOKENS:
            self._scan.fail(f"is damaged: it has only {self.numbers['vocabulary']} tokens")
        embedding, heads = self.numbers["embedding"], self.numbers["heads"]
        if embedding % heads:
            self._scan.fail(f"is damaged: {heads} heads cannot share an embedding of {embedding}")
        if self._layout.uniform and not self._type:
            self._scan.fail(f"is damaged: its type is {self.numbers['file_type']}")
        if not 0 <= self.numbers.get("rotary", 0) <= embedding // heads:
            self._scan.fail(f"is damaged: it rotates {self.numbers['rotary']} elements a head")
        cache = self.numbers["layers"] * self.numbers.get("context", 1) * embedding
        if not self._layout.wide and cache > _INT32_MAX:
            self._scan.fail(
                f"cannot be run: engines count its cache of {cache} elements in 31 bits"
            )

    def _read_vocabulary(self) -> None:
        scan, count = self._scan, self.numbers["vocabulary"]
        if self._layout.counts_twice and (again := scan.integers(1)[0]) != count:
            scan.fail(f"is damaged: it has {count} tokens, and then {again}")
        markers = frozenset().union(*MARKERS.values())
        for number in range(count):
            token = self._string(f"token {number}")
            if token in markers:
                self.marked.add(token)
            if self._layout.scored:
                scan.skip(4)
        if self._layout.merges:
            (merges,) = scan.integers(1)
            if not 0 <= merges <= _BOUNDS["merges"]:
                scan.fail(f"is damaged: it has {merges} merges")
            for number in range(2 * merges):
                self._string(f"merge {number // 2}")

    def _string(self, what: str) -> bytes:
        length = int.from_bytes(self._scan.take(4, _CHUNK_BYTES), "little")
        if length > MAX_TOKEN_BYTES:
            self._scan.fail(f"is damaged: {what} is {length} bytes long")
        return self._scan.take(length, _CHUNK_BYTES)

    def _read_tensors(self) -> None:
        expected = dict(self._layout.tensors)
        for layer in range(self.numbers["layers"]):
            for name, shape in self._layout.layer_tensors.items():
                expected[name.format(layer)] = shape
        letters = {
            "E": self.numbers["embedding"],
            "V": self.numbers["vocabulary"],
            "C": self.numbers.get("context", 0),
        }
        for factor in (3, 4):
            letters[f"{factor}E"] = factor * letters["E"]
        while self._scan.position < self._scan.size_bytes:
            self._read_tensor(expected, letters)
        missing = [
            name
            for name in expected
            if name not in self._found and name not in self._layout.optional
        ]
        if missing:
            listed = ", ".join(missing[:3])
            self._scan.fail(
                f"is incomplete: {len(missing)} of its {len(expected)} tensors are missing, "
                f"such as {listed}"
            )
        if self._layout.optional and self._found.isdisjoint(self._layout.optional):
            size = letters["E"] * letters["V"]
            self.tied_bytes = size // _TYPES[self._type].block * _TYPES[self._type].bytes

    def _read_tensor(self, expected: dict[str, tuple[str, ...]], letters: dict[str, int]) -> None:
        """Pass one tensor. `letters` learns the sizes that the header does not tell."""
        scan = self._scan
        count, length, number = scan.integers(3)
        if count not in (1, 2) or not 1 <= length <= MAX_TENSOR_NAME_BYTES:
            scan.fail(f"is damaged: a tensor has {count} dimensions and a name of {length} bytes")
        dimensions = scan.integers(count)
        name = scan.take(length).decode(errors="replace")
        if name not in expected:
            scan.fail(f"has an unknown tensor {name!r}")
        if name in self._found:
            scan.fail(f"is damaged: tensor {name!r} is there twice")
        self._found.add(name)
        shape = expected[name]
        wanted = tuple(letters.get(letter, 0) for letter in shape)
        if len(wanted) != count or any(
            size != want for size, want in zip(dimensions, wanted, strict=True) if want
        ):
            scan.fail(f"is damaged: tensor {name!r} has the dimensions {dimensions}")
        kind = self._kind(name, number, len(shape))
        elements = math.prod(dimensions)
        if min(dimensions) < 1 or elements > _INT32_MAX or dimensions[0] % kind.block:
            scan.fail(f"is damaged: tensor {name!r} has the dimensions {dimensions}")
        letters.update(zip(shape, dimensions, strict=True))
        if self._layout.aligned:
            scan.skip(-scan.position % _ALIGNMENT)
        size_bytes = elements // kind.block * kind.bytes
        scan.skip(size_bytes)
        self.parameters += elements
        self.weights_bytes += size_bytes
        self._types[kind.name] = self._types.get(kind.name, 0) + size_bytes
        for letter, key in (("K", "attention_rows"), ("F", "feed_forward")):
            if letter in letters:
                self.numbers[key] = letters[letter]

    def _kind(self, name: str, number: int, dimensions: int) -> TensorType:
        """Return the type of a tensor, if it is one that engines expect there."""
        vector = dimensions == 1 or name == "model/wpe"
        kind = TENSOR_TYPES.get(number)
        wanted = "F32" if vector else self._type if self._layout.uniform else ""
        if kind is None or kind.name not in _TYPES or (wanted and kind.name != wanted):
            self._scan.fail(
                f"is damaged: tensor {name!r} has type {kind.name if kind else number}"
                + (f", not {wanted}" if wanted else "")
            )
        return kind

    def _check_quantization(self) -> None:
        """Refuse blocks of the months before the formats were settled: they look the same."""
        oldest = {"Q5_0": 1, "Q5_1": 1, "F32": 0, "F16": 0}
        for kind in self._types:
            # These three changed their size with version 2, so what adds up is version 2.
            if self._layout.uniform and kind in ("Q4_0", "Q4_1", "Q8_0"):
                continue
            if self.quantized_by < oldest.get(kind, 2):
                self._scan.fail(
                    f"has {kind} tensors of version {self.quantized_by} of ggml's quantization, "
                    "which engines would misread: get the model as GGUF, or converted anew"
                )
