"""A bounded reader of GGML files: the formats of ggml and llama.cpp before GGUF.

Owns what such a file says about itself, and the checks that make it safe to hand the file to an
engine, which has few of its own. Knows no engine, and never reads the weights.

The format, all numbers little-endian: a magic number, a version (not in files that begin with
`ggml`), numbers that differ by architecture, the vocabulary (strings with a u32 length), and then
each tensor: i32 number of dimensions, i32 length of the name, i32 type, i32 dimensions, name, data.
No field says which architecture it is. The file is read under each layout that its magic allows:
only one has numbers, strings and names of tensors that add up to the whole file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends import contract
from daemon.artifacts import InvalidModelFile
from daemon.artifacts.cursor import OpenFile, Reader, read_at_least
from daemon.artifacts.ggml_layouts import ALIASES, LAYOUTS, MAGICS, MARKERS
from daemon.artifacts.ggml_reading import Reading, Scan, Unfit

# Of LLaMA 1 and Falcon: their files do not say, and so long they were trained for.
_UNSAID_CONTEXT = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlHeader:
    """What one GGML file says, checked against the file.

    `container` is the format with its version, such as `ggjt v3`. `quantization` is llama.cpp's
    name. `context_length` is in tokens: the file's own, or what the architecture was trained for.
    `metadata` has the header's other numbers as `ggml.NAME`; `ggml.tied_bytes` is the size of a
    matrix that engines copy because the file has it once for two purposes.
    """

    architecture: str
    container: str
    parameters: int
    quantization: str
    context_length: int
    weights_bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)


def is_ggml(path: Path) -> bool:
    """Say whether the file begins as GGML files do. Raises InvalidModelFile if it can't be read."""
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            return int.from_bytes(file.read(4), "little") in MAGICS
    except OSError as error:
        raise InvalidModelFile(f"{path.name} cannot be read: {error.strerror or error}") from error


def read(path: Path, architecture: str = "") -> GgmlHeader:
    """Return what the GGML file at `path` says.

    `architecture` is what somebody who knows the model says, in any spelling; it decides where the
    file fits several, and must be one that the file fits. Blocks: reads the vocabulary and the
    names of the tensors. When it returns, the tensors are those of the architecture, with their
    shapes, and lie inside the file. Raises InvalidModelFile for everything else.
    """
    name = (path.name or str(path)).encode(errors="replace").decode()
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidModelFile(f"{name} is not a regular file")
            reader = OpenFile(descriptor=file.fileno(), size_bytes=status.st_size)
            return read_from(reader, name, architecture)
    except OSError as error:
        raise InvalidModelFile(f"{name} cannot be read: {error.strerror or error}") from error


def to_artifact(
    header: GgmlHeader, files: Sequence[contract.ModelFile], chat_template: str = ""
) -> contract.Artifact:
    """Return the artifact of `files`; the first is the one that `header` was read from.

    GGML files carry no chat template: `chat_template` comes from somebody who knows the model.
    """
    return contract.Artifact(
        format="ggml",
        files=tuple(files),
        architecture=header.architecture,
        parameters=header.parameters,
        quantization=header.quantization,
        context_length=header.context_length,
        weights_bytes=header.weights_bytes,
        chat_template=chat_template,
        metadata=header.metadata,
    )


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_from(reader: Reader, name: str, architecture: str = "") -> GgmlHeader:
    """Return what the GGML file called `name` says, as `read` does.

    Reads a few bytes before each tensor, from one end of the file to the other. What `reader`
    raises passes through.
    """
    start = read_at_least(reader, 0, 8, 8)
    magic = int.from_bytes(start[:4], "little")
    if magic not in MAGICS:
        begins = f"begins with {start[:4]!r}" if start else "is empty"
        raise InvalidModelFile(f"{name} is not a GGML file: it {begins}")
    versioned = MAGICS[magic] != "ggml"
    version = int.from_bytes(start[4:], "little") if versioned else 0
    layouts = LAYOUTS.get((magic, version), ())
    if not layouts:
        raise InvalidModelFile(
            f"{name} is a {MAGICS[magic]} file of version {version}, which no engine here reads"
        )
    wanted = _canonical(name, architecture, [a for layout in layouts for a in layout.architectures])
    failures = []
    for layout in layouts:
        if wanted and wanted not in layout.architectures:
            continue
        scan = Scan(reader, 8 if versioned else 4)
        try:
            reading = Reading(scan, layout, MAGICS[magic], version)
        except Unfit as unfit:
            failures.append((unfit.position, layout.architectures, unfit.problem))
        else:
            return _header(reading, layout.architectures, wanted)
    position, closest, problem = max(failures)
    if not position and len(failures) > 1:
        raise InvalidModelFile(
            f"{name} begins like a GGML file, but its numbers are those of no architecture that is "
            f"known here ({', '.join(a for _, known, _ in failures for a in known)})"
        )
    raise InvalidModelFile(
        f"{name} {problem} (read as a {' or '.join(closest)} model, "
        f"{'as the architecture field says' if wanted else 'which it resembles most'})"
    )


def _canonical(name: str, wanted: str, known: Sequence[str]) -> str:
    """Return our spelling of the architecture that somebody named; empty if nobody did."""
    plain = "".join(letter for letter in wanted.lower() if letter.isalnum())
    architecture = ALIASES.get(plain, plain)
    if architecture and architecture not in known:
        raise InvalidModelFile(
            f"{name} is said to be for {wanted!r}, and a file that begins like this one can be "
            f"for: {', '.join(known)}; correct its architecture field"
        )
    return architecture


def _header(reading: Reading, architectures: Sequence[str], wanted: str) -> GgmlHeader:
    marked = [a for a in architectures if reading.marked & MARKERS.get(a, frozenset())]
    metadata: dict[str, Any] = {f"ggml.{key}": value for key, value in reading.numbers.items()}
    metadata["ggml.container"] = reading.container
    metadata["ggml.quantization_version"] = reading.quantized_by
    metadata["ggml.tied_bytes"] = reading.tied_bytes
    return GgmlHeader(
        architecture=wanted or (marked or architectures)[0],
        container=reading.container,
        parameters=reading.parameters,
        quantization=reading.quantization,
        context_length=reading.numbers.get("context", _UNSAID_CONTEXT),
        weights_bytes=reading.weights_bytes,
        metadata=metadata,
    )
