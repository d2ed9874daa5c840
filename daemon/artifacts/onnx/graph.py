"""What the graph in an ONNX file says of itself: its inputs, outputs, operators and tensors.

Owns the walk through all of the file's parts; `tensors` owns what is checked of tensors. Field
numbers and types are those of onnx.proto (github.com/onnx/onnx).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from daemon.artifacts import InvalidModelFile
from daemon.artifacts.cursor import OpenFile, Reader
from daemon.artifacts.onnx.protobuf import BYTES, VARINT, Field, Message
from daemon.artifacts.onnx.tensors import MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSORS, Tensors

MAX_PORTS = 4096  # a decoder has four for each layer
_INT64_MAX = 2**63 - 1


class Port(NamedTuple):
    """An input or output. A dimension that is not fixed is -1; a shape may be unknown (None)."""

    name: str
    type: int
    shape: tuple[int, ...] | None


@dataclass(slots=True)
class Graph:
    """The facts of one ONNX file.

    `weights_bytes` is the sum of its tensors, `resident_bytes` what a CPU's memory holds of them.
    `external` are the names of files beside it that hold tensors.
    """

    ir_version: int = 0
    opset: int = 0
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)
    external: set[str] = field(default_factory=set)
    weights_bytes: int = 0
    resident_bytes: int = 0
    parameters: int = 0
    quantization: str = "unknown"

    def output(self, name: str) -> Port | None:
        """Return the output of this name, if there is one."""
        return next((port for port in self.outputs if port.name == name), None)


def read_from(reader: Reader, folder: Path, name: str) -> Graph:
    """Return what `read` would of a file that is elsewhere, with its data in `folder`."""
    return _Walker(Message(reader, name), (folder / name).parent).model()


def read(folder: Path, name: str) -> Graph:
    """Return what the graph of the ONNX file `name` in `folder` says.

    Raises InvalidModelFile for one that is damaged, or whose tensors lie elsewhere than they may.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidModelFile(f"{name} cannot be read: {error.strerror or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelFile(f"{name} is not a regular file")
        return read_from(OpenFile(descriptor=descriptor, size_bytes=status.st_size), folder, name)
    except OSError as error:
        raise InvalidModelFile(f"{name} cannot be read: {error.strerror or error}") from error
    finally:
        os.close(descriptor)


class _Walker:
    """Collects the facts of one file into a Graph."""

    def __init__(self, message: Message, folder: Path) -> None:
        self._message = message
        self._graph = Graph()
        self._tensors = Tensors(message, folder)
        self._casts: dict[str, int] = {}

    def model(self) -> Graph:
        """Walk a ModelProto."""
        graph, found = self._graph, 0
        if not self._message.size:
            self._message.fail("is no ONNX file: it is empty")
        for part in self._message.fields(0, self._message.size):
            if part.number == 1 and part.kind == VARINT:
                graph.ir_version = part.value
            elif part.number == 7 and part.kind == BYTES:
                found += 1
                self._walk_graph(part, depth=1, outermost=True)
            elif part.number == 8 and part.kind == BYTES:
                self._opset(part)
        if found != 1 or not graph.ir_version:
            self._message.fail("is no ONNX file: it has no graph")
        if not graph.inputs or not graph.outputs:
            self._message.fail("is damaged: its graph has no inputs or no outputs")
        tensors = self._tensors
        graph.inputs = [port for port in graph.inputs if port.name not in tensors.named]
        graph.external = tensors.external
        graph.weights_bytes = tensors.weights_bytes
        graph.resident_bytes = tensors.resident_bytes(self._casts)
        graph.parameters = tensors.parameters
        four_bits = "MatMulNBits" in graph.operators  # they are packed in bytes
        graph.quantization = "INT4" if four_bits else tensors.quantization
        return graph

    def _opset(self, part: Field) -> None:
        domain, version = "", 0
        for entry in self._message.fields(part.start, part.end, 1):
            if entry.number == 1:
                domain = self._text(entry)
            elif entry.number == 2:
                version = entry.value
        if domain in ("", "ai.onnx"):
            self._graph.opset = version

    def _text(self, part: Field) -> str:
        return self._message.text(part, MAX_NAME_BYTES, "a name")

    def _walk_graph(self, graph: Field, depth: int, *, outermost: bool = False) -> None:
        for part in self._message.fields(graph.start, graph.end, depth):
            if part.kind != BYTES:
                continue
            if part.number == 1:
                self._node(part, depth + 1)
            elif part.number == 5:
                self._tensors.read(part, depth + 1)
            elif part.number == 15:
                self._sparse(part, depth + 1)
            elif outermost and part.number == 11:
                self._graph.inputs.append(self._port(part, depth + 1))
            elif outermost and part.number == 12:
                self._graph.outputs.append(self._port(part, depth + 1))
            if len(self._graph.inputs) + len(self._graph.outputs) > MAX_PORTS:
                self._message.fail(f"is damaged: it has more than {MAX_PORTS} inputs and outputs")

    def _node(self, node: Field, depth: int) -> None:
        operator, first_input, cast_to = "", "", 0
        for part in self._message.fields(node.start, node.end, depth):
            if part.number == 4:
                operator = self._text(part)
            elif part.number == 1 and not first_input:
                first_input = self._text(part)
            elif part.number == 5 and part.kind == BYTES:
                cast_to = self._attribute(part, depth + 1) or cast_to
        self._graph.operators.add(operator)
        if len(self._graph.operators) > MAX_PORTS:
            self._message.fail(f"is damaged: it has more than {MAX_PORTS} kinds of operators")
        if operator == "Cast" and len(self._casts) < MAX_TENSORS:
            self._casts[first_input] = cast_to

    def _attribute(self, attribute: Field, depth: int) -> int:
        """Walk the graphs and tensors of a node's attribute; return its integer, if it is one."""
        number = 0
        for part in self._message.fields(attribute.start, attribute.end, depth):
            if part.number == 3 and part.kind == VARINT:
                number = part.value
            elif part.kind == BYTES and part.number in (5, 10):
                self._tensors.read(part, depth + 1)
            elif part.kind == BYTES and part.number in (6, 11):
                self._walk_graph(part, depth + 1)
        return number

    def _port(self, port: Field, depth: int) -> Port:
        name, kind = "", 0
        shape: tuple[int, ...] | None = None
        for part in self._message.fields(port.start, port.end, depth):
            if part.number == 1:
                name = self._text(part)
            elif part.number == 2 and part.kind == BYTES:
                for choice in self._message.fields(part.start, part.end, depth + 1):
                    if choice.number == 1 and choice.kind == BYTES:
                        kind, shape = self._tensor_type(choice, depth + 2)
        return Port(name, kind, shape)

    def _tensor_type(self, tensor: Field, depth: int) -> tuple[int, tuple[int, ...] | None]:
        kind = 0
        shape: tuple[int, ...] | None = None
        for part in self._message.fields(tensor.start, tensor.end, depth):
            if part.number == 1:
                kind = part.value
            elif part.number == 2 and part.kind == BYTES:
                dimensions = [
                    self._dimension(entry, depth + 2)
                    for entry in self._message.fields(part.start, part.end, depth + 1)
                    if entry.number == 1 and entry.kind == BYTES
                ]
                shape = tuple(dimensions[:MAX_DIMENSIONS])
        return kind, shape

    def _dimension(self, dimension: Field, depth: int) -> int:
        for part in self._message.fields(dimension.start, dimension.end, depth):
            if part.number == 1 and part.kind == VARINT and part.value <= _INT64_MAX:
                return part.value
        return -1

    def _sparse(self, tensor: Field, depth: int) -> None:
        for part in self._message.fields(tensor.start, tensor.end, depth):
            if part.number in (1, 2) and part.kind == BYTES:
                self._tensors.read(part, depth + 1)
