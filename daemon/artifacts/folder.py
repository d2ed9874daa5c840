"""Which files of a folder make up a model, by what their headers say, and the artifact of them.

Owns the choice of files, their roles and their order. Headers are read by the modules of their
formats. Knows neither where files come from nor where they go.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from backends.contract import Artifact, ModelFile
from daemon.artifacts import InvalidModelFile, ggml, gguf, gguf_files, onnx
from daemon.artifacts.gguf_files import listed
from daemon.errors import InvalidRequest

MAX_FILES = 1000
MAX_ENTRIES = 50_000  # of a folder and all that are in it, whatever they are
MAX_DEPTH = 8  # parts of a name
MAX_CONFIG_BYTES = 64 * 1024 * 1024
MAX_PART_BYTES = 200  # of one part of a name; filesystems stop at 255

_WEIGHTS = re.compile(r"\.(gguf|ggml|bin|onnx)$", re.IGNORECASE)
_EXTERNAL = re.compile(r"\.onnx[._]data(_\d+)?$", re.IGNORECASE)
_CONFIG = re.compile(r"\.(json|txt|model|jinja)$", re.IGNORECASE)
_FORMATS = "GGUF and GGML files, known by their first bytes, and ONNX files, named .onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderModel:
    """The model that a folder holds.

    `roles` has the name, relative to the folder, and the role of each of its files, in the order
    that `describe` wants them in.
    """

    roles: tuple[tuple[str, str], ...]
    describe: Callable[[tuple[ModelFile, ...]], Artifact]


def relative_name(name: str) -> str:
    """Return `name` if it is a plain path beneath a folder, `/` between its parts.

    Raises InvalidRequest for one that could lead elsewhere or cannot be shown.
    """
    parts = name.split("/")
    if (
        not name.isprintable()
        or len(parts) > MAX_DEPTH
        or any(p in ("", ".", "..") or len(os.fsencode(p)) > MAX_PART_BYTES for p in parts)
    ):
        raise InvalidRequest(
            f"{name!r} is no usable name for a file of a model: it must be printable, stay in its "
            f"folder, and have at most {MAX_DEPTH} parts of at most {MAX_PART_BYTES} bytes"
        )
    return name


def is_candidate(name: str) -> bool:
    """Say whether a file of this relative name may be part of a model. Hidden ones never are."""
    kinds = (_WEIGHTS, _EXTERNAL, _CONFIG)
    return not re.search(r"(^|/)\.", name) and any(kind.search(name) for kind in kinds)


def scan(folder: Path) -> dict[str, os.stat_result]:
    """Return the files beneath `folder` that may be part of a model, by relative name, sorted.

    They are regular, or symbolic links to regular files that are in the folder too. Raises
    InvalidRequest for a folder that cannot be read, has none, or is too large to be one model's.
    """
    root = folder.resolve()
    found: dict[str, os.stat_result] = {}
    outside: list[str] = []
    for name in _walk(folder):
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            if path.is_file():
                outside.append(name)
            continue
        try:
            facts = path.stat()
        except OSError:  # a link to nothing, or it has just gone
            continue
        if stat.S_ISREG(facts.st_mode):
            found[relative_name(name)] = facts
    weights = [name for name in outside if _WEIGHTS.search(name) or _EXTERNAL.search(name)]
    if weights:
        raise InvalidRequest(
            f"{listed(weights)} in {folder} are symbolic links that lead out of it, and such links "
            "are not followed: make a folder with the files themselves (`cp -rL`) and import that"
        )
    if len(found) > MAX_FILES:
        raise InvalidRequest(
            f"{folder} has {len(found)} files that may be part of a model, and at most "
            f"{MAX_FILES} are taken: name the folder that holds the model alone"
        )
    if not found:
        raise InvalidRequest(f"{folder} holds no model: modeld reads {_FORMATS}")
    return dict(sorted(found.items()))


def read(folder: Path, names: Sequence[str], architecture: str = "") -> FolderModel:
    """Return the model that the files `names` of `folder` make up.

    One name alone may be of any suffix. `architecture` is what is known of a GGML file otherwise.
    Blocks: reads headers and configuration, never weights.
    Raises InvalidModelFile if there is no model, more than one, or one that is not whole.
    """
    kinds = {name: kind for name in names if (kind := _kind(folder / name, alone=len(names) == 1))}
    where = names[0] if len(names) == 1 else str(folder)
    if not kinds:
        raise InvalidModelFile(f"{where} holds no model of a known format: modeld reads {_FORMATS}")
    if len(set(kinds.values())) > 1:
        formats = listed(f"{name} ({kind.upper()})" for name, kind in kinds.items())
        raise InvalidModelFile(
            f"{where} holds models of several formats: {formats}; import one of them by its own "
            "path, or give each a folder of its own"
        )
    kind = next(iter(kinds.values()))
    if kind == "onnx":
        return _read_onnx(folder, names)
    if kind == "ggml":
        has_config = "config.json" in names
        return _read_ggml(folder, list(kinds), where, architecture, has_config=has_config)
    roles, header = gguf_files.choose({name: gguf.read(folder / name) for name in kinds}, where)
    return FolderModel(roles=roles, describe=partial(gguf.to_artifact, header))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative names of candidates. Links to folders are not entered."""
    seen = 0
    pending = [""]
    while pending:
        inside = pending.pop()
        try:
            with os.scandir(folder / inside) as found:
                entries = list(islice(found, MAX_ENTRIES + 1 - seen))
        except OSError as error:
            raise InvalidRequest(f"cannot read {folder / inside}: {error.strerror}") from error
        seen += len(entries)
        if seen > MAX_ENTRIES:
            raise InvalidRequest(
                f"{folder} has more than {MAX_ENTRIES} entries: name the folder that holds the "
                "model alone"
            )
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name.startswith("."):
                    continue
                if name.count("/") + 2 > MAX_DEPTH:
                    raise InvalidRequest(
                        f"{folder} has folders in folders, over {MAX_DEPTH} deep ({name}): name "
                        "the folder that holds the model alone"
                    )
                pending.append(name)
            elif is_candidate(name):
                yield name


def _kind(path: Path, *, alone: bool) -> str:
    """Return the format that a file's first bytes, or else its suffix, say; empty for none."""
    if not alone and not _WEIGHTS.search(path.name):
        return ""
    if gguf.is_gguf(path):
        return "gguf"
    if ggml.is_ggml(path):
        return "ggml"
    suffix = path.suffix.lower()
    return suffix[1:] if suffix in (".gguf", ".onnx") else ""


def _read_onnx(folder: Path, names: Sequence[str]) -> FolderModel:
    for name in names:
        size_bytes = (folder / name).stat().st_size
        if _CONFIG.search(name) and size_bytes > MAX_CONFIG_BYTES:
            raise InvalidModelFile(
                f"{name} has {size_bytes:,} bytes, and at most {MAX_CONFIG_BYTES:,} are read of a "
                "file of this kind: move it out of the folder if it is not the model's"
            )
    header = onnx.read(folder, names)
    return FolderModel(roles=header.roles, describe=partial(onnx.to_artifact, header))


def _read_ggml(
    folder: Path, names: Sequence[str], where: str, architecture: str, *, has_config: bool
) -> FolderModel:
    if len(names) > 1:
        raise gguf_files.several(where, names)
    roles = [(names[0], "weights")]
    if has_config:
        architecture = architecture or _model_type(folder / "config.json")
        roles.append(("config.json", "config"))
    header = ggml.read(folder / names[0], architecture)
    return FolderModel(roles=tuple(roles), describe=partial(ggml.to_artifact, header))


def _model_type(path: Path) -> str:
    """Return the `model_type` of a config.json: where a GGML header cannot tell, this may."""
    try:
        with path.open("rb") as file:
            raw = file.read(1024 * 1024)
        config = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidModelFile(f"{path.name} cannot be read as JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else ""
