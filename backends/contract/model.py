"""A model on disk, and a load of it: what is asked for, what it will need, what it became."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from backends.contract.machine import Gpu


class Task(StrEnum):
    """What a loaded model can be asked to do."""

    CHAT = "chat"
    COMPLETE = "complete"
    INFILL = "infill"
    VISION = "vision"
    EMBED = "embed"
    RERANK = "rerank"
    CLASSIFY = "classify"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of a model on disk.

    `mtime_ns` and `size_bytes` are those seen when the file was verified: a file that differs from
    them has been changed since, and is not loaded. `role` says what the file is for: `weights`,
    `mmproj` (an image encoder for a language model), `adapter` (LoRA) or `config`.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str
    role: str = "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """The files of one model, and what their headers say. The first file is the one to open.

    `metadata` holds the header's other facts under the names that the format gives them (for GGUF
    `llama.block_count` and the like): numbers, booleans, short strings and short lists of numbers.
    `weights_bytes` is the sum of the tensors' sizes. `parameters` counts weights, not bytes.
    """

    format: str
    files: tuple[ModelFile, ...]
    architecture: str
    parameters: int
    quantization: str
    context_length: int
    weights_bytes: int
    chat_template: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The file that an engine is told to open."""
        return self.files[0].path

    def paths(self, role: str) -> tuple[str, ...]:
        """Return the paths of the files that have this role, in the order of `files`."""
        return tuple(file.path for file in self.files if file.role == role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well a backend suits an artifact: 0 means not at all, and the highest score is chosen."""

    score: int
    reason: str
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What a user fixed about a load, and what there is for it; None leaves it to the backend.

    `context_length` is what one request may use, in tokens. `slots` is how many requests run at
    once. `threads` is the number of CPU threads that may compute. `gpus` are those that the engine
    can use, with their free memory. `engine` holds settings out of the backend's own `options`.
    """

    context_length: int | None = None
    slots: int | None = None
    threads: int = 1
    gpus: tuple[Gpu, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which layers of a model are on GPUs; the rest is computed by the CPU.

    `layers` holds, for each GPU that is used, its `Gpu.id` and how many layers it gets, in the
    order of the layers. `gpu_layers` is their sum; the output layer counts as one. `reason` says,
    for a person, why it is so.
    """

    gpu_layers: int = 0
    layers: tuple[tuple[str, int], ...] = ()
    reason: str = "no GPU that this engine can use"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a load will need, and the settings that this holds for.

    `parts` are bytes of RAM by purpose: `weights`, `kv_cache`, `compute`, `runtime`, and those of
    files beside the model's own: `adapters`, `mmproj`. `gpu_parts` are bytes of each GPU's own
    memory, by `Gpu.id` and purpose.
    """

    context_length: int
    slots: int
    parts: dict[str, int]
    gpu_parts: dict[str, dict[str, int]] = field(default_factory=dict, hash=False)
    placement: Placement = Placement()

    @property
    def total_bytes(self) -> int:
        """The bytes of RAM to reserve."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """Another computer's model, reached over HTTP: the base URL of its API ends before `/v1`.

    `model` is its name there. `api_key` is a secret: it must never reach a log or a listing.
    """

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedConversation:
    """The KV state of one conversation on disk: a file `name` in the folder it was saved to.

    `tokens` is how many of them need not be read again. Whoever keeps the file sees to it that only
    the same engine, of the same version, gets it back, with the same model and adapters.
    """

    name: str
    size_bytes: int
    sha256: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """Everything that `Backend.load` needs. `scratch_dir` is private to the worker (mode 0700).

    `upstream` is there for models that run elsewhere. `conversations` are to be restored from the
    folder `state_dir` after the load, the most wanted first; there need be neither.
    """

    artifact: Artifact
    context_length: int
    slots: int
    threads: int
    scratch_dir: str
    placement: Placement = Placement()
    engine: dict[str, Any] = field(default_factory=dict, hash=False)
    upstream: Upstream | None = None
    state_dir: str = ""
    conversations: tuple[SavedConversation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What was loaded: its tasks, and how many calls it takes at once.

    `restored` are the names of the saved conversations that it goes on from: the worker fills it.
    """

    tasks: tuple[Task, ...]
    slots: int
    context_length: int
    engine_version: str
    restored: tuple[str, ...] = ()
