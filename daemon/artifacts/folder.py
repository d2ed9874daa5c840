"""Which files of a folder make up a model, by what their headers say, and the artifact of them.

Owns the choice of files, their roles and their order. Headers are read by the modules of their
formats. Knows neither where files come from nor where they go.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

from backends.contract import Artifact, ModelFile
from daemon.artifacts import InvalidModelFile, ggml, gguf, gguf_files, onnx
from daemon.artifacts.cursor import Reader, read_at_least
from daemon.artifacts.ggml_layouts import MAGICS
from daemon.artifacts.gguf_files import listed
from daemon.errors import InvalidRequest

MAX_FILES = 1000
MAX_ENTRIES = 50_000  # of a folder and all that are in it, whatever they are
MAX_DEPTH = 8  # parts of a name
_COPIED_BYTES = 1024 * 1024  # of configuration; larger files, such as vocabularies, are not parsed
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


def is_config(name: str) -> bool:
    """Say whether a file of this name may be a model's configuration or vocabulary."""
    return _CONFIG.search(name) is not None and is_candidate(name)


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
    kind = _only_kind(kinds, where)
    if kind == "onnx":
        return _read_onnx(folder, names)
    if kind == "ggml":
        has_config = "config.json" in names
        return _read_ggml(folder, list(kinds), where, architecture, has_config=has_config)
    roles, header = gguf_files.choose({name: gguf.read(folder / name) for name in kinds}, where)
    return FolderModel(roles=roles, describe=partial(gguf.to_artifact, header))


def read_from(files: Mapping[str, Reader], architecture: str = "") -> FolderModel:
    """Return the model that `files`, by name, make up, as `read` does, wherever they are.

    What the readers raise passes through.
    """
    kinds = {name: kind for name, file in files.items() if (kind := _kind_at(file, name))}
    where = listed(files)
    kind = _only_kind(kinds, where)
    if kind == "onnx":
        if len(files) == 1:
            raise InvalidModelFile(
                f"{where} is an ONNX model, which needs a tokenizer and configuration beside it: "
                "import the folder that has them"
            )
        return _read_onnx_from(files)
    if kind == "ggml":
        name = _only_ggml(list(kinds), where)
        if "config.json" in files:
            config = files["config.json"]
            raw = read_at_least(config, 0, config.size_bytes, config.size_bytes)
            architecture = architecture or _model_type(raw, "config.json")
        told = ggml.read_from(files[name], name, architecture)
        return FolderModel(roles=((name, "weights"),), describe=partial(ggml.to_artifact, told))
    headers = {name: gguf.read_from(files[name], name) for name in kinds}
    roles, header = gguf_files.choose(headers, where)
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


def _only_kind(kinds: Mapping[str, str], where: str) -> str:
    """Return the format that all of `kinds`, by file, are. Raises InvalidModelFile."""
    if not kinds:
        raise InvalidModelFile(f"{where} holds no model of a known format: modeld reads {_FORMATS}")
    if len(set(kinds.values())) > 1:
        formats = listed(f"{name} ({kind.upper()})" for name, kind in kinds.items())
        raise InvalidModelFile(
            f"{where} holds models of several formats: {formats}; import one of them by its own "
            "path, or give each a folder of its own"
        )
    return next(iter(kinds.values()))


def _only_ggml(names: Sequence[str], where: str) -> str:
    if len(names) > 1:
        raise gguf_files.several(where, names)
    return names[0]


def _kind(path: Path, *, alone: bool) -> str:
    """Return the format that a file's first bytes, or else its suffix, say; empty for none."""
    if not alone and not _WEIGHTS.search(path.name):
        return ""
    if gguf.is_gguf(path):
        return "gguf"
    if ggml.is_ggml(path):
        return "ggml"
    return _kind_by_suffix(path.name)


def _kind_at(reader: Reader, name: str) -> str:
    """Return what `_kind` would say of this one file."""
    start = read_at_least(reader, 0, 4, 4)
    if start == gguf.MAGIC:
        return "gguf"
    return "ggml" if int.from_bytes(start, "little") in MAGICS else _kind_by_suffix(name)


def _kind_by_suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
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


def _read_onnx_from(files: Mapping[str, Reader]) -> FolderModel:
    """Return the ONNX model of files that are elsewhere.

    It is told by more than headers: a folder gets copies of its configuration, and files without
    content that have the sizes of all others.
    """
    with tempfile.TemporaryDirectory(prefix="modeld-") as directory:
        for name, reader in files.items():
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as copy:
                if _CONFIG.search(name):
                    wanted = min(reader.size_bytes, _COPIED_BYTES)
                    copy.write(read_at_least(reader, 0, wanted, wanted))
                copy.truncate(reader.size_bytes)
        header = onnx.read(Path(directory), list(files), files)
    return FolderModel(roles=header.roles, describe=partial(onnx.to_artifact, header))


def _read_ggml(
    folder: Path, names: Sequence[str], where: str, architecture: str, *, has_config: bool
) -> FolderModel:
    name = _only_ggml(names, where)
    roles = [(name, "weights")]
    if has_config:
        try:
            with (folder / "config.json").open("rb") as file:
                raw = file.read(1024 * 1024)
        except OSError as error:
            raise InvalidModelFile(f"config.json cannot be read: {error}") from error
        architecture = architecture or _model_type(raw, "config.json")
        roles.append(("config.json", "config"))
    header = ggml.read(folder / name, architecture)
    return FolderModel(roles=tuple(roles), describe=partial(ggml.to_artifact, header))


def _model_type(raw: bytes, name: str) -> str:
    """Return the `model_type` of a config.json: where a GGML header cannot tell, this may."""
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidModelFile(f"{name} cannot be read as JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else ""
