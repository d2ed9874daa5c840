"""What follows from an ONNX model's facts: tasks, options, batch size, memory, providers. Pure.

Bytes are bytes of RAM, lengths are tokens. The keys of the facts are those of
`daemon.artifacts.onnx`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backends.contract import (
    Artifact,
    BackendError,
    Gpu,
    LoadOptions,
    MemoryEstimate,
    Option,
    Placement,
    Task,
    check_options,
)

MIB = 1024 * 1024
INSTALL = "pip install onnxruntime tokenizers"
INSTALL_GENAI = "pip install onnxruntime-genai"
GENERATE = "generate"  # the feature that a prober reports where onnxruntime-genai is installed

_DEFAULT_CONTEXT_LENGTH = 4096
_UNKNOWN_CONTEXT_LENGTH = 512  # of a model that does not say what it was trained for
_DEFAULT_SLOTS = 32  # callers wait for a batch together, and cost a thread each
_MAX_BATCH_TOKENS = 512  # larger batches were no faster, and took more memory
# As in `backends.gguf`: half a second is aimed at, with 20e9 floating-point operations a thread.
_BATCH_SECONDS = 0.5
_FLOPS_PER_THREAD = 20e9

# The worker with numpy, onnxruntime and tokenizers, without a model; what each thread that waits
# for an answer costs; onnxruntime-genai.
_RUNTIME_BYTES = 29 * MIB
_SLOT_BYTES = MIB // 4
_GENAI_BYTES = 5 * MIB
# Texts, their tokens and vectors, of requests for many at a time.
_REQUESTS_BYTES = 5 * MIB
# What a provider for a GPU takes of the RAM beside; not measured: no such computer was at hand.
_GPU_RUNTIME_BYTES = 300 * MIB
# A tokenizer in memory, in bytes for each byte of its tokenizer.json (8 MiB for 0.44 MiB).
_TOKENIZER_FACTOR = 18
# Floats that are alive at a time while a layer is computed, measured on all-MiniLM-L6-v2: so many
# for each token and unit of the feed-forward layer, and for each attention score.
_LIVE_UNITS = 8
_LIVE_SCORES = 5

# Execution providers, the preferred first: onnxruntime's name, ours, and the GPUs they compute on.
_PROVIDERS = (
    ("CUDAExecutionProvider", "cuda", ("nvidia",)),
    ("MIGraphXExecutionProvider", "migraphx", ("amd",)),
    ("ROCMExecutionProvider", "rocm", ("amd",)),
    ("DmlExecutionProvider", "directml", ("nvidia", "amd", "intel")),
    ("CoreMLExecutionProvider", "coreml", ("apple",)),
    ("OpenVINOExecutionProvider", "openvino", ("intel",)),
    ("TensorrtExecutionProvider", "tensorrt", ("nvidia",)),
)
# It compiles an engine for minutes at each load: only for who asks for it.
_NOT_BY_ITSELF = "tensorrt"
_CPU = "CPUExecutionProvider"

OPTIONS: Mapping[str, Option] = {
    "provider": Option(
        kind="choice",
        choices=("auto", "cpu", *(name for _, name, _ in _PROVIDERS)),
        help="what computes (auto: a GPU that the model fits into, else the CPU)",
    ),
    "pooling": Option(
        kind="choice",
        choices=("mean", "cls", "last", "max"),
        help="how the vectors of tokens become one, against what the model's files say",
    ),
    "normalize": Option(
        kind="boolean", help="scale vectors to length 1, against what the model's files say"
    ),
}

_TASKS = {
    "embed": (Task.EMBED,),
    "rerank": (Task.RERANK,),
    "classify": (Task.CLASSIFY,),
}


def fact(artifact: Artifact, name: str) -> int:
    """Return a number out of the model's files; 0 if they don't say."""
    value = artifact.metadata.get(f"onnx.{name}", 0)
    return int(value) if isinstance(value, int | float) and value > 0 else 0


def generates(artifact: Artifact) -> bool:
    """Say whether the model generates text."""
    return artifact.metadata.get("onnx.task") == "generate"


def tasks(artifact: Artifact) -> tuple[Task, ...]:
    """Return what the model can be asked to do."""
    if generates(artifact):
        return (Task.CHAT, Task.COMPLETE) if artifact.chat_template else (Task.COMPLETE,)
    return _TASKS.get(str(artifact.metadata.get("onnx.task")), ())


def gpu_vendors(devices: Iterable[str]) -> tuple[str, ...]:
    """Return the vendors whose GPUs a build with these execution providers can use."""
    have = set(devices)
    return tuple(sorted({v for name, _, vendors in _PROVIDERS if name in have for v in vendors}))


def providers(available: Sequence[str], wanted: str, placement: Placement) -> list[str]:
    """Return the execution providers to compute on, in order; the CPU is always the last.

    `wanted` is the option `provider`. Raises BackendError for one that is not available.
    """
    if wanted == "cpu" or (wanted == "auto" and not placement.gpu_layers):
        return [_CPU]
    chosen = [
        name
        for name, ours, _ in _PROVIDERS
        if name in available and (ours == wanted or (wanted == "auto" and ours != _NOT_BY_ITSELF))
    ]
    if not chosen and wanted != "auto":
        raise BackendError(
            "load_failed",
            f"this build of onnxruntime has no provider {wanted!r}; it has: {', '.join(available)}",
        )
    return [*chosen, _CPU]


def batch_tokens(artifact: Artifact, threads: int) -> int:
    """Return how many tokens, padding included, are computed at a time; a single text may be more.

    0: texts are computed one by one, since the model's answers depend on what is beside them.
    """
    if artifact.metadata.get("onnx.alone"):
        return 0
    embedding = fact(artifact, "vocabulary") * fact(artifact, "hidden_size")
    computing = max(1, artifact.parameters - embedding)
    tokens = _BATCH_SECONDS * _FLOPS_PER_THREAD * max(1, threads) / (2 * computing)
    return max(1, min(int(tokens), _MAX_BATCH_TOKENS))


def context_length(artifact: Artifact, asked: int | None) -> int:
    """Return what one text may have: the least of the model's, the user's and a default."""
    trained = artifact.context_length or (
        _DEFAULT_CONTEXT_LENGTH if generates(artifact) else _UNKNOWN_CONTEXT_LENGTH
    )
    return min(trained, asked or _DEFAULT_CONTEXT_LENGTH)


def estimate(artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
    """Return what a load needs, with every setting settled.

    Raises BackendError that names an option which is not known.
    """
    engine = check_options("onnx", OPTIONS, options.engine)
    length = context_length(artifact, options.context_length)
    slots = 1 if generates(artifact) else options.slots or _DEFAULT_SLOTS
    model = {
        "weights": max(artifact.weights_bytes, fact(artifact, "resident_bytes")),
        "kv_cache": _kv_bytes_per_token(artifact) * length,
        "compute": _compute_bytes(artifact, options.threads, length),
    }
    runtime = _RUNTIME_BYTES + slots * _SLOT_BYTES
    runtime += _TOKENIZER_FACTOR * fact(artifact, "tokenizer_bytes")
    runtime += _GENAI_BYTES if generates(artifact) else _REQUESTS_BYTES
    gpu, reason = _gpu(options.gpus, str(engine.get("provider", "auto")), sum(model.values()))
    if gpu is None:
        return MemoryEstimate(
            context_length=length,
            slots=slots,
            parts=model | {"runtime": runtime},
            placement=Placement(reason=reason),
        )
    layers = max(1, fact(artifact, "layers"))
    runtime += _GPU_RUNTIME_BYTES
    return MemoryEstimate(
        context_length=length,
        slots=slots,
        parts={"runtime": runtime} | (model if gpu.integrated else {}),
        gpu_parts={} if gpu.integrated else {gpu.id: model},
        placement=Placement(gpu_layers=layers, layers=((gpu.id, layers),), reason=reason),
    )


def _kv_bytes_per_token(artifact: Artifact) -> int:
    if not generates(artifact):
        return 0
    heads = fact(artifact, "kv_heads") or fact(artifact, "heads")
    size = fact(artifact, "head_size")
    return 2 * 4 * fact(artifact, "layers") * heads * size


def _compute_bytes(artifact: Artifact, threads: int, length: int) -> int:
    """Return the bytes of activations of the largest batch: many short texts, or one long."""
    hidden = fact(artifact, "hidden_size")
    units = fact(artifact, "intermediate_size") or 4 * hidden
    heads = fact(artifact, "heads") or max(1, hidden // 64)
    if generates(artifact):
        tokens, logits = min(length, _MAX_BATCH_TOKENS), fact(artifact, "vocabulary")
        return 4 * tokens * (_LIVE_UNITS * units + logits + 2 * heads * length)
    texts = max(1, batch_tokens(artifact, threads) // length)
    tokens = max(texts * length, batch_tokens(artifact, threads))
    return 4 * (tokens * _LIVE_UNITS * units + texts * _LIVE_SCORES * heads * length * length)


def _gpu(gpus: Sequence[Gpu], wanted: str, needed_bytes: int) -> tuple[Gpu | None, str]:
    """Return the GPU to compute on, and why. Engines count from the first one that they can use."""
    if wanted == "cpu":
        return None, "the option provider is cpu"
    if not gpus:
        return None, "no GPU that this engine can use"
    gpu = gpus[0]
    free_bytes = gpu.free_bytes if gpu.free_bytes is not None else gpu.total_bytes
    if not gpu.integrated and (free_bytes is None or needed_bytes > free_bytes):
        free = "an unknown amount" if free_bytes is None else f"{free_bytes / MIB:.0f} MiB"
        return None, f"{gpu.name} has {free} free, the model needs {needed_bytes / MIB:.0f} MiB"
    return gpu, f"the whole model is on {gpu.name}"


def pooling(artifact: Artifact, engine: Mapping[str, Any]) -> str:
    """Return how the vectors of tokens become one: the user's choice, else the model's.

    Raises BackendError for a choice where the graph itself makes one vector of a text.
    """
    own = str(artifact.metadata.get("onnx.pooling", "mean"))
    if own == "none" and "pooling" in engine:
        raise BackendError(
            "invalid_request",
            "option pooling of onnx has no effect on this model, whose graph pools itself: "
            "leave it out",
        )
    return str(engine.get("pooling", own))
