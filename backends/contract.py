"""The contract between modeld and an inference engine.

Owns the Backend protocol, the values that cross it and its errors. Knows no engine, no channel
and no HTTP. Stdlib only: the daemon, the workers and third-party backends all import it.

A request is shaped like OpenAI's chat completions; the other APIs translate at the edge.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol


class Task(StrEnum):
    """What a loaded model can be asked to do."""

    CHAT = "chat"
    COMPLETE = "complete"
    EMBED = "embed"
    RERANK = "rerank"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of a model on disk.

    `mtime_ns` and `size_bytes` are those seen when the file was verified: a file that differs from
    them has been changed since, and is not loaded.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. None and "" are facts that could not be had.

    `id` tells it from the others: NVIDIA's UUID or the PCI address. `vendor` is `nvidia`, `amd`,
    `intel` or `apple`. An `integrated` GPU uses the computer's RAM: its memory comes off that.
    `free_bytes` is what was free when it was looked at. `sources` says where a field came from.
    """

    id: str
    vendor: str
    name: str
    pci: str = ""
    driver: str = ""
    integrated: bool = False
    total_bytes: int | None = None
    free_bytes: int | None = None
    compute_capability: str = ""
    sources: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a computer offers: the facts a backend may base `fit` and `estimate` on.

    `physical_cores` is how many threads may compute: the physical cores that this process may run
    on, or its CPU quota rounded down if that is less. `logical_cores` counts the CPUs it may run
    on, `affinity` names them, `installed_cores` are all that the machine has (0: not known).
    `ram_bytes` is what this process may use: `installed_ram_bytes`, or `memory_limit_bytes` of its
    cgroups if there is one. `sources` says where a field came from, `problems` what could not be
    found out and, where something can be done, what.
    """

    cpu_model: str
    physical_cores: int
    logical_cores: int
    ram_bytes: int
    platform: str = ""
    installed_cores: int = 0
    affinity: tuple[int, ...] = ()
    cpu_quota: float | None = None
    cpu_features: tuple[str, ...] = ()
    installed_ram_bytes: int = 0
    memory_limit_bytes: int | None = None
    swap_bytes: int = 0
    memory_pressure: bool = False
    gpus: tuple[Gpu, ...] = ()
    problems: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one backend can do on this computer, as its prober found it.

    `reason` is empty for a backend that works; otherwise it says, for a person, why it does not
    and which command would change that.
    """

    backend: str
    available: bool
    version: str = ""
    devices: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well a backend suits an artifact: 0 means not at all, and the highest score is chosen."""

    score: int
    reason: str
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What a user fixed about a load; None leaves it to the backend.

    `context_length` is what one request may use, in tokens. `slots` is how many requests run at
    once. `threads` is the number of CPU threads that may compute.
    """

    context_length: int | None = None
    slots: int | None = None
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a load will need, and the settings that this holds for.

    `parts` are bytes of RAM by purpose: `weights`, `kv_cache`, `compute`, `runtime`.
    """

    context_length: int
    slots: int
    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """The bytes of RAM to reserve."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """Everything that `Backend.load` needs. `scratch_dir` is private to the worker (mode 0700)."""

    artifact: Artifact
    context_length: int
    slots: int
    threads: int
    scratch_dir: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What was loaded: its tasks, and how many calls it takes at once."""

    tasks: tuple[Task, ...]
    slots: int
    context_length: int
    engine_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when generation ends; None is the engine's default.

    Names and meanings are those of the OpenAI API and of llama.cpp: `temperature` 0 is greedy.
    `max_tokens` None runs to the end of the context. `ignore_eos` goes on past end-of-sequence.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """Messages in the form of OpenAI's chat completions: each has `role` and `content`."""

    messages: tuple[dict[str, Any], ...]
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer: whole characters, never part of a stop sequence."""

    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request. `cached_tokens` of the prompt were already in the KV cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Milliseconds spent reading the prompt and writing the answer."""

    prompt_ms: float = 0.0
    predicted_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a generation ended: `stop`, `length` or `cancelled`, and what it cost."""

    finish_reason: str
    usage: Usage = Usage()
    timings: Timings = Timings()


Progress = Callable[[float], None]
Cancelled = Callable[[], bool]
Generation = Generator[Delta, None, Done]


class BackendError(Exception):
    """An engine could not do what it was asked; `code` is for machines, the text for people.

    Codes: `invalid_request` (the caller can mend it), `context_length_exceeded` (the prompt is
    longer than `context_length`), `load_failed`, `engine_error`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Backend(Protocol):
    """An adapter to one inference engine. One instance holds one loaded model.

    Importing the backend's module must not import the engine: `fit` and `estimate` run in the
    daemon, everything else in a child process. Methods are synchronous; `chat` may be called from
    `LoadedModel.slots` threads at once.
    """

    name: ClassVar[str]
    formats: ClassVar[frozenset[str]]
    # The Python distribution of the engine: what its prober found holds until its version changes.
    # Empty: ask at every start.
    distribution: ClassVar[str]

    @classmethod
    def probe(cls) -> Probe:
        """Import the engine and say what it can do here. Called in a short-lived child.

        Never raises for an engine that is missing or broken: that is a `Probe` with a reason.
        """
        ...

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """Say how well this engine suits `artifact` on `hardware`. Pure."""
        ...

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """Settle what `options` leaves open and say what such a load will need. Pure."""
        ...

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """Load the model. Called once. `progress` takes fractions of 1, if the engine has them.

        Raises BackendError("load_failed", …) with what the engine said.
        """
        ...

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """Answer `request`: yield each Delta, return the Done.

        Ends within one token, or one prefill batch of at most 1 s, once `cancelled()` is true, and
        then returns a Done whose finish_reason is `cancelled`. Raises BackendError.
        """
        ...

    def close(self) -> None:
        """Free the model. May be called twice, and before `load`."""
        ...
