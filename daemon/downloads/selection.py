"""Which files of a repository a source means. Pure: names and sizes in, names out.

A model is a GGUF file, or the parts of one, with its image projector if there is one; else an ONNX
graph with its data, tokenizer and configuration; else a GGML file with its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from daemon.artifacts.folder import MAX_CONFIG_BYTES, is_candidate, is_config
from daemon.errors import InvalidRequest
from daemon.sources import HubSource
from daemon.units import size

# The first of these that is there and fits is taken where none is named: four bits and a half lose
# little, more gain little, and fewer lose much (figures: https://github.com/ggml-org/llama.cpp/pull/1684).
PREFERRED = """
    Q4_K_M Q4_K_L Q4_K_S IQ4_NL IQ4_XS Q4_1 Q4_0 Q5_K_M Q5_K_S Q5_1 Q5_0 Q6_K Q8_0 MXFP4
    Q3_K_L Q3_K_M IQ3_M Q3_K_S IQ3_S IQ3_XS IQ3_XXS Q2_K_L Q2_K IQ2_M IQ2_S IQ2_XS IQ2_XXS
    BF16 F16 FP16 F32
""".split()
_PROJECTORS = "F16 BF16 Q8_0 F32".split()
_GRAPHS = ("onnx/model.onnx", "model.onnx")
_INT8 = ("int8", "quantized", "qint8")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_LISTED = 30  # names of files that an error quotes at most
# What weights take in memory beside themselves: cache, buffers and the engine.
_MEMORY_SHARE, _MEMORY_BYTES = 1.2, 512 * 1024**2


@dataclass(frozen=True, slots=True)
class Selected:
    """A file by its path in the repository; `name` is its name in the model."""

    path: str
    name: str


def select(
    sizes: Mapping[str, int | None], source: HubSource, memory_bytes: int = 0
) -> tuple[Selected, ...]:
    """Return the files of a repository that `source` means; `sizes` are in bytes, by path.

    That is the file, the folder (`file` ends in `/`) or the quantization that it names. If it names
    none, it is the first of PREFERRED that fits into `memory_bytes` (0 is not known). Raises
    InvalidRequest with the choices.
    """
    names = sorted(name for name in sizes if is_candidate(name) or name == source.file)
    repository = _Repository(names, sizes, source, memory_bytes)
    if source.file.endswith("/"):
        return repository.folder(source.file)
    if source.file:
        return repository.file(source.file)
    if repository.ggufs:
        return repository.gguf()
    return repository.onnx() or repository.ggml()


class _Repository:
    def __init__(
        self,
        names: Sequence[str],
        sizes: Mapping[str, int | None],
        source: HubSource,
        memory_bytes: int,
    ) -> None:
        self._names = names
        self._sizes = sizes
        self._source = source
        self._memory_bytes = memory_bytes
        ggufs = [name for name in names if name.lower().endswith(".gguf")]
        self._projectors = [name for name in ggufs if _is_projector(name)]
        self.ggufs = [
            name for name in ggufs if not _is_projector(name) and _part_number(name) in (0, 1)
        ]

    def file(self, path: str) -> tuple[Selected, ...]:
        """Return a file that is named, with what belongs to it."""
        if path not in self._sizes:
            raise self._refused(f"has no file {path!r}")
        if path.lower().endswith(".gguf"):
            return self._with_projector(path)
        if path.lower().endswith(".onnx"):
            return self._with_onnx(path)
        return (_flat(path), *self._configs_of_ggml(path))

    def folder(self, folder: str) -> tuple[Selected, ...]:
        """Return all of a folder that may be part of a model."""
        found = [name for name in self._names if name.startswith(folder)]
        if not found:
            raise self._refused(f"has no folder {folder!r}")
        return tuple(Selected(name, name.removeprefix(folder)) for name in found)

    def gguf(self) -> tuple[Selected, ...]:
        """Return the GGUF model that is meant."""
        if wanted := self._source.quantization:
            return self._with_projector(self._single(wanted, _having(self.ggufs, wanted)))
        if len(self.ggufs) == 1:
            return self._with_projector(self.ggufs[0])
        there = [(name, found) for name in PREFERRED if (found := _having(self.ggufs, name))]
        for quantization, found in there:
            if self._fits(found[0]):
                return self._with_projector(self._single(quantization, found))
        if not there:
            return self._with_projector(self._single(PREFERRED[0], []))
        _, found = min(there, key=lambda each: self._bytes(each[1][0]))
        raise self._refused(
            f"has nothing that fits the {size(self._memory_bytes)} which models may take here: the "
            f"smallest is {found[0]} with {size(self._bytes(found[0]))}"
        )

    def onnx(self) -> tuple[Selected, ...]:
        """Return the ONNX model that is meant, if there is one."""
        generating = [n for n in self._names if PurePosixPath(n).name == "genai_config.json"]
        if generating and not self._source.quantization:
            return self._generating(generating)
        graphs = [name for name in self._names if name.lower().endswith(".onnx")]
        if wanted := self._source.quantization.lower():
            kinds = _INT8 if wanted == "int8" else (wanted,)
            found = [g for kind in kinds for g in graphs if PurePosixPath(g).stem.endswith(kind)]
            if graphs:
                return self._with_onnx(found[0] if found else self._single(wanted, [], graphs))
        for name in _GRAPHS:
            if name in graphs:
                return self._with_onnx(name)
        return self._with_onnx(self._single("", graphs, graphs)) if graphs else ()

    def ggml(self) -> tuple[Selected, ...]:
        """Return the GGML model that is meant."""
        found = [name for name in self._names if name.lower().endswith((".bin", ".ggml"))]
        if wanted := self._source.quantization:
            found = _having(found, wanted)
        if not found:
            raise self._refused("has no model of a known format")
        path = self._single(wanted, found, found)
        return (_flat(path), *self._configs_of_ggml(path))

    def _generating(self, configs: Sequence[str]) -> tuple[Selected, ...]:
        """Return the folder of a model for onnxruntime-genai; one for CPUs if there are several."""
        folders = [name.removesuffix("genai_config.json") for name in configs]
        for_cpu = [folder for folder in folders if "cpu" in folder.lower()]
        if len(folders) > 1 and len(for_cpu) != 1:
            raise self._refused(
                "has several models: choose one with "
                f"hf:{self._source.repo}/FOLDER/, of {', '.join(for_cpu or folders)}"
            )
        return self.folder(for_cpu[0] if for_cpu else folders[0])

    def _with_projector(self, path: str) -> tuple[Selected, ...]:
        found = [_flat(part) for part in self._parts(path)]
        if near := [] if _is_projector(path) else self._projectors_near(path):
            best = next((b for kind in _PROJECTORS for b in _having(near, kind)), near[0])
            found.append(_flat(best))
        return tuple(found)

    def _projectors_near(self, path: str) -> list[str]:
        """Return the projectors beside a model, or else in the nearest folder above it."""
        for folder in PurePosixPath(path).parents:
            if near := [p for p in self._projectors if PurePosixPath(p).parent == folder]:
                return near
        return []

    def _with_onnx(self, graph: str) -> tuple[Selected, ...]:
        """Return a graph with its data, and the configuration beside and above it.

        Names stay as in the repository: a graph names its data, engines look for configuration.
        """
        data = [n for n in self._names if n.startswith((f"{graph}_data", f"{graph}.data"))]
        near = {"", _parent(graph), "1_Pooling"}
        configs = [
            name
            for name in self._names
            if is_config(name)
            and _parent(name) in near
            and (self._sizes[name] or 0) <= MAX_CONFIG_BYTES
        ]
        return tuple(Selected(name, name) for name in (graph, *data, *configs))

    def _configs_of_ggml(self, path: str) -> tuple[Selected, ...]:
        config = "config.json"
        return (Selected(config, config),) if config in self._names and path != config else ()

    def _parts(self, path: str) -> list[str]:
        split = _SPLIT.search(path)
        if split is None:
            return [path]
        parts = [
            f"{path[: split.start()]}-{number:05}-of-{split[2]}{path[split.end() :]}"
            for number in range(1, int(split[2]) + 1)
        ]
        missing = [part for part in parts if part not in self._sizes]
        if missing:
            raise self._refused(f"lacks parts of {path}: {_listing(missing)}")
        return parts

    def _bytes(self, path: str) -> int:
        return sum(self._sizes[part] or 0 for part in self._parts(path))

    def _fits(self, path: str) -> bool:
        needed = _MEMORY_SHARE * self._bytes(path) + _MEMORY_BYTES
        return not self._memory_bytes or needed <= self._memory_bytes

    def _single(
        self, quantization: str, found: Sequence[str], models: Sequence[str] | None = None
    ) -> str:
        if len(found) == 1:
            return found[0]
        many = "several files" if found else "no file"
        of = f" of quantization {quantization}" if quantization else ""
        models = self.ggufs if models is None else models
        raise self._refused(f"has {many}{of}", found or models)

    def _refused(self, problem: str, choices: Sequence[str] | None = None) -> InvalidRequest:
        repo = self._source.repo
        choices = self.ggufs if choices is None else choices
        listing = f"; it has {_listing(choices)}" if choices else "; it has no GGUF files"
        return InvalidRequest(
            f"{repo} {problem}: choose one with hf:{repo}:QUANTIZATION or hf:{repo}/FILE{listing}"
        )


def _flat(path: str) -> Selected:
    return Selected(path, PurePosixPath(path).name)


def _parent(path: str) -> str:
    parent = PurePosixPath(path).parent.as_posix()
    return "" if parent == "." else parent


def _is_projector(path: str) -> bool:
    return "mmproj" in PurePosixPath(path).name.lower()


def _part_number(path: str) -> int:
    split = _SPLIT.search(path)
    return 0 if split is None else int(split[1])


def _having(paths: Iterable[str], quantization: str) -> list[str]:
    """Return the files of a quantization: in their own names, else in their folder's.

    A name's tokens end at anything but a letter, a digit or "_": Q4_K is not Q4_K_M.
    """
    token = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quantization)}(?![A-Za-z0-9_])", re.IGNORECASE)
    paths = list(paths)
    found = [path for path in paths if token.search(PurePosixPath(path).name)]
    return found or [path for path in paths if token.search(_parent(path))]


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"
