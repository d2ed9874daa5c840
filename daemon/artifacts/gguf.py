"""A bounded reader of GGUF headers, versions 2 and 3, little-endian.

Owns what a GGUF file says about itself, and the checks that make it safe to hand the file to an
engine. Knows no engine, and never reads the weights.

Model files are untrusted. Every count, length and offset is checked against the real size of the
file and against the limits below before anything is allocated, and memory and time are bounded
whatever the file says: what is kept is small, and what is skipped costs one step a string at most.

The format, all numbers little-endian: magic `GGUF`, u32 version, u64 tensor count, u64 metadata
count; for each metadata entry a string key, u32 type, value; for each tensor a string name, u32
number of dimensions, u64 dimensions, u32 type, u64 offset; then, from the next multiple of
`general.alignment`, the tensors' data. A string is a u64 length and that many bytes; an array is
a u32 element type, u64 length and the elements.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from backends import contract
from daemon.artifacts import InvalidModelFile
from daemon.artifacts.cursor import Cursor, OpenFile, Reader
from daemon.artifacts.ggml_types import (
    ARRAY_TYPE,
    FILE_TYPES,
    REMOVED_TENSOR_TYPES,
    SCALAR_TYPES,
    STRING_TYPE,
    TENSOR_TYPES,
    TensorType,
)

MAGIC = b"GGUF"  # what every file begins with
MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_STRING_CHARS = 256  # of a string in `GgufHeader.metadata`
MAX_LIST = 1024  # elements of a list in `GgufHeader.metadata`
MAX_LIST_VALUES = 65_536  # elements of all those lists together
MAX_ARRAY_STRINGS = 4 * 1024 * 1024  # of all arrays together; the largest vocabularies have 2**18
MAX_CHAT_TEMPLATE_BYTES = 1024 * 1024
MAX_DIMENSIONS = 4
MIN_ALIGNMENT = 8  # the format asks for a multiple of 8, engines for a power of 2
MAX_ALIGNMENT = 1024 * 1024

_INT64_MAX = 2**63 - 1  # engines compute sizes and offsets as signed 64-bit numbers
_CONTEXT_MAX = 2**31 - 1
_ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LAYER = re.compile(r"blk\.([0-9]{1,4})\.")
_EMBEDDING = "token_embd."
_ROWS = 8  # matrices are laid out anew in groups of so many rows
_CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What the header of one GGUF file says, checked against the file.

    `parameters` is the number of elements, and `weights_bytes` the number of bytes, of the tensors
    in this file: a model that is split over several files has a header in each, and only the first
    one says the `architecture`; it is empty in the others. `quantization` is
    llama.cpp's name (`Q4_K_M`), `unknown` if the file has no tensors and does not say.
    `context_length` is in tokens, and 0 when the header has none. `alignment` is in bytes.

    `layer_bytes` are the bytes of each layer's weights, `embedding_bytes` those of the table of
    tokens, `output_bytes` those of the last matrix, 0 if the table of tokens serves as that.
    `matrix_bytes` are those of the matrices that an engine may lay out anew for a CPU, by type,
    and `embedding_type` is that of the table of tokens.

    `metadata` has the header's numbers, booleans, strings of at most MAX_STRING_CHARS characters
    and arrays of at most MAX_LIST numbers or booleans, under their own keys. An array that is left
    out (the vocabulary) is there as its number of elements: `tokenizer.ggml.tokens.length`.
    Numbers that are not finite are left out too: JSON cannot carry them.
    """

    architecture: str
    parameters: int
    quantization: str
    context_length: int
    chat_template: str
    weights_bytes: int
    metadata: dict[str, Any]
    tensor_count: int
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    output_bytes: int
    matrix_bytes: dict[str, int]
    embedding_type: str
    version: int
    alignment: int


class _Tensor(NamedTuple):
    name: str
    type: TensorType
    elements: int
    size_bytes: int
    offset: int
    is_matrix: bool


class _Metadata:
    """Reads the metadata entries. In `values` None stands for one that is not kept."""

    def __init__(self, cursor: Cursor) -> None:
        self.values: dict[str, Any] = {}
        self._cursor = cursor
        self._list_values = 0
        self._strings = 0

    def read_entry(self) -> None:
        key = self._cursor.name_string(f"metadata key {len(self.values) + 1}")
        kind = self._cursor.u32()
        if kind == ARRAY_TYPE:
            self._add(key, self._array(key))
        elif kind == STRING_TYPE:
            self._add(key, self._string(key))
        else:
            self._add(key, _finite(self._scalars(key, kind, 1)[0]))

    def _add(self, key: str, value: Any) -> None:
        if key in self.values:
            self._cursor.fail(f"is damaged: metadata key {key!r} is there twice")
        self.values[key] = value

    def _scalars(self, key: str, kind: int, count: int) -> list[Any]:
        layout = self._layout(key, kind, count)
        return list(layout.unpack(self._cursor.take(layout.size)))

    def _layout(self, key: str, kind: int, count: int) -> struct.Struct:
        if kind not in SCALAR_TYPES:
            self._cursor.fail(
                f"is damaged: metadata key {key!r} has a value of unknown type {kind}"
            )
        return struct.Struct(f"<{count}{SCALAR_TYPES[kind]}")

    def _string(self, key: str) -> str | None:
        """Return a text that is worth keeping. Bytes that are not UTF-8 become U+FFFD.

        Such bytes are there in real files, as in the path of a calibration file on Windows.
        """
        length = self._cursor.u64()
        if key == _CHAT_TEMPLATE:
            if length > MAX_CHAT_TEMPLATE_BYTES:
                self._cursor.fail(f"is damaged: its chat template is {length} bytes long")
            return self._cursor.take(length).decode(errors="replace")
        if length > 4 * MAX_STRING_CHARS:  # UTF-8 has at most 4 bytes a character
            self._cursor.skip(length)
            return None
        text = self._cursor.take(length).decode(errors="replace")
        return text if len(text) <= MAX_STRING_CHARS else None

    def _array(self, key: str) -> list[Any] | None:
        kind = self._cursor.u32()
        length = self._cursor.u64()
        if kind == ARRAY_TYPE:
            self._cursor.fail(f"is damaged: metadata key {key!r} is an array of arrays")
        if kind == STRING_TYPE:
            self._strings += length
            if self._strings > MAX_ARRAY_STRINGS:
                self._cursor.fail(f"is damaged: metadata key {key!r} has {length} strings")
            self._cursor.skip_strings(length)
        elif length <= min(MAX_LIST, MAX_LIST_VALUES - self._list_values):
            values = self._scalars(key, kind, length)
            if all(_finite(value) is not None for value in values):
                self._list_values += length
                return values
        else:
            self._cursor.skip(self._layout(key, kind, 1).size * length)
        self._add(f"{key}.length", length)
        return None


def read(path: Path | str) -> GgufHeader:
    """Return what the header of the GGUF file at `path` says.

    Blocks: reads the header (some MB for a large vocabulary, 512 MiB at the very most), not the
    weights. When it returns, the data of each tensor lies inside the file, aligned, and none
    overlap. Raises InvalidModelFile for everything else, also for a file that cannot be opened.
    """
    name = (Path(path).name or str(path)).encode(errors="replace").decode()
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidModelFile(f"{name} is not a regular file")
            return read_from(OpenFile(descriptor=file.fileno(), size_bytes=status.st_size), name)
    except OSError as error:
        raise InvalidModelFile(f"{name} cannot be read: {error.strerror or error}") from error


def read_from(reader: Reader, name: str) -> GgufHeader:
    """Return what the header of the GGUF file called `name` says, as `read` does.

    What `reader` raises passes through.
    """
    return _read_header(Cursor(reader, name))


def is_gguf(path: Path) -> bool:
    """Say whether the file begins as GGUF files do. Raises InvalidModelFile if it can't be read."""
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise InvalidModelFile(f"{path.name} cannot be read: {error.strerror or error}") from error


def to_artifact(header: GgufHeader, files: tuple[contract.ModelFile, ...]) -> contract.Artifact:
    """Return the artifact that consists of `files`, described by `header`, the first one's."""
    return contract.Artifact(
        format="gguf",
        files=files,
        architecture=header.architecture,
        parameters=header.parameters,
        quantization=header.quantization,
        context_length=header.context_length,
        weights_bytes=header.weights_bytes,
        chat_template=header.chat_template,
        metadata=header.metadata,
    )


def _open_without_waiting(path: str, flags: int) -> int:
    """Open like `open`, but do not wait for the other end if `path` is a named pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_header(cursor: Cursor) -> GgufHeader:
    version = _read_version(cursor)
    tensor_count = cursor.u64()
    key_count = cursor.u64()
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        cursor.fail(f"is damaged: it claims {tensor_count} tensors and {key_count} metadata keys")
    reader = _Metadata(cursor)
    for _ in range(key_count):
        reader.read_entry()
    values = reader.values
    architecture = _architecture(cursor, values)
    alignment = _alignment(cursor, values)
    tensors = _read_tensors(cursor, tensor_count)
    _check_tensor_data(cursor, tensors, alignment)
    template = values.pop(_CHAT_TEMPLATE, None)
    return GgufHeader(
        architecture=architecture,
        parameters=sum(tensor.elements for tensor in tensors),
        quantization=_quantization(values.get("general.file_type"), tensors),
        context_length=_integer(cursor, values, f"{architecture}.context_length", 0, _CONTEXT_MAX),
        chat_template=template if isinstance(template, str) else "",
        weights_bytes=sum(tensor.size_bytes for tensor in tensors),
        metadata={key: value for key, value in values.items() if value is not None},
        tensor_count=tensor_count,
        layer_bytes=_layer_bytes(tensors),
        embedding_bytes=_bytes_of(tensors, _EMBEDDING),
        output_bytes=_bytes_of(tensors, "output."),
        matrix_bytes=_matrix_bytes(tensors),
        embedding_type=next((t.type.name for t in tensors if t.name.startswith(_EMBEDDING)), ""),
        version=version,
        alignment=alignment,
    )


def _bytes_of(tensors: list[_Tensor], prefix: str) -> int:
    return sum(tensor.size_bytes for tensor in tensors if tensor.name.startswith(prefix))


def _matrix_bytes(tensors: list[_Tensor]) -> dict[str, int]:
    """Return the bytes of matrices by type, without the table of tokens."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.is_matrix and not tensor.name.startswith(_EMBEDDING):
            sizes[tensor.type.name] += tensor.size_bytes
    return dict(sizes)


def _layer_bytes(tensors: list[_Tensor]) -> tuple[int, ...]:
    """Return the bytes of `blk.0.…`, `blk.1.…` and so on; at most MAX_LIST of them."""
    layers: Counter[int] = Counter()
    for tensor in tensors:
        found = _LAYER.match(tensor.name)
        if found and int(found[1]) < MAX_LIST:
            layers[int(found[1])] += tensor.size_bytes
    return tuple(layers[number] for number in range(max(layers, default=-1) + 1))


def _read_version(cursor: Cursor) -> int:
    if cursor.size == 0:
        cursor.fail("is not a GGUF file: it is empty")
    magic = cursor.take(min(4, cursor.size))
    if magic != MAGIC:
        cursor.fail(f"is not a GGUF file: it begins with {magic!r}")
    raw = cursor.take(4)
    version = int.from_bytes(raw, "little")
    if version in (2, 3):
        return version
    if int.from_bytes(raw, "big") in (1, 2, 3):
        cursor.fail("is a big-endian GGUF file: this computer needs the little-endian one")
    cursor.fail(f"is a GGUF file of version {version}: only versions 2 and 3 can be read")


def _read_tensors(cursor: Cursor, count: int) -> list[_Tensor]:
    tensors: dict[str, _Tensor] = {}
    for number in range(1, count + 1):
        name = cursor.name_string(f"the name of tensor {number}")
        if name in tensors:
            cursor.fail(f"is damaged: tensor {name!r} is there twice")
        tensors[name] = _read_tensor(cursor, name)
    return list(tensors.values())


def _read_tensor(cursor: Cursor, name: str) -> _Tensor:
    dimension_count = cursor.u32()
    if dimension_count > MAX_DIMENSIONS:
        cursor.fail(f"is damaged: tensor {name!r} has {dimension_count} dimensions")
    dimensions = [cursor.u64() for _ in range(dimension_count)] or [1]
    elements = math.prod(dimensions)
    if max(elements, *dimensions) > _INT64_MAX:
        cursor.fail(f"is damaged: tensor {name!r} has impossible dimensions {dimensions}")
    number = cursor.u32()
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        removed = REMOVED_TENSOR_TYPES.get(number)
        known = f"{removed}, which engines no longer support" if removed else "unknown"
        cursor.fail(f"cannot be read: the type {number} of tensor {name!r} is {known}")
    if dimensions[0] % kind.block:
        cursor.fail(
            f"is damaged: tensor {name!r} has rows of {dimensions[0]} elements, "
            f"not a multiple of {kind.name}'s {kind.block}"
        )
    return _Tensor(
        name=name,
        type=kind,
        elements=elements,
        size_bytes=elements // kind.block * kind.bytes,
        offset=cursor.u64(),
        is_matrix=_is_matrix(name, dimensions),
    )


def _is_matrix(name: str, dimensions: list[int]) -> bool:
    """Say whether rows of this tensor can be laid out anew: of a matrix, or of one for each expert.

    From llama.cpp's `ggml-cpu/repack.cpp` (`supports_op`, `ggml_repack_get_optimal_repack_type`).
    """
    sizes = [size for size in dimensions[2:] if size > 1]
    if len(dimensions) < 2 or dimensions[1] <= 1 or dimensions[1] % _ROWS:
        return False
    return not sizes or (len(sizes) == 1 and "_exps." in name)


def _check_tensor_data(cursor: Cursor, tensors: list[_Tensor], alignment: int) -> None:
    """Check that the tensors' data lies in the file, after the header, one beside the other."""
    if not tensors:
        return
    data_start = -(-cursor.position // alignment) * alignment
    previous = None
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset % alignment or tensor.offset + tensor.size_bytes > _INT64_MAX:
            cursor.fail(f"is damaged: tensor {tensor.name!r} is at offset {tensor.offset}")
        if previous and tensor.offset < end:
            cursor.fail(f"is damaged: tensors {previous.name!r} and {tensor.name!r} overlap")
        previous = tensor
        end = tensor.offset + tensor.size_bytes
    if data_start + end > cursor.size:
        cursor.truncated(data_start + end)


def _architecture(cursor: Cursor, values: dict[str, Any]) -> str:
    architecture = values.get("general.architecture")
    if architecture is None and values.get("general.type") == "imatrix":
        cursor.fail("is an importance matrix, which only quantizing a model needs: move it away")
    if architecture is None and values.get("split.no"):
        return ""  # of the parts of a split model only the first has the model's metadata
    if architecture is None:
        cursor.fail("does not say which architecture it is for (general.architecture)")
    if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
        cursor.fail(f"is damaged: its general.architecture is {architecture!r}")
    return architecture


def _alignment(cursor: Cursor, values: dict[str, Any]) -> int:
    alignment = _integer(cursor, values, "general.alignment", 32, MAX_ALIGNMENT)
    if alignment < MIN_ALIGNMENT or alignment.bit_count() != 1:
        cursor.fail(f"is damaged: its general.alignment is {alignment}")
    return alignment


def _integer(cursor: Cursor, values: dict[str, Any], key: str, default: int, highest: int) -> int:
    value = values.get(key, default)
    if type(value) is not int or not 0 <= value <= highest:  # a bool is not a number here
        cursor.fail(f"is damaged: its {key} is {value!r}")
    return value


def _quantization(file_type: Any, tensors: list[_Tensor]) -> str:
    """Return the name of `general.file_type`, else of the type that most of the bytes have."""
    if type(file_type) is int and file_type in FILE_TYPES:
        return FILE_TYPES[file_type]
    bytes_by_type: Counter[str] = Counter()
    for tensor in tensors:
        bytes_by_type[tensor.type.name] += tensor.size_bytes
    return bytes_by_type.most_common(1)[0][0] if bytes_by_type else "unknown"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
