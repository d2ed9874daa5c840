"""What both GGUF backends need to know of a GGUF file: settings, memory, suitability. Pure.

Bytes are bytes of RAM, lengths are tokens. The names of header keys are those of the GGUF
specification (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.contract import (
    Artifact,
    BackendError,
    ChatRequest,
    CompleteRequest,
    LoadOptions,
    MemoryEstimate,
    Option,
    Task,
    check_options,
)

MIB = 1024 * 1024
DEFAULT_CONTEXT_LENGTH = 4096
_DEFAULT_SLOTS = (4, 2, 1)
# Bytes of one element, from the block layouts in ggml (github.com/ggml-org/ggml, ggml-common.h).
CACHE_TYPES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
_QUANTIZED = frozenset(CACHE_TYPES) - {"f32", "f16", "bf16"}
OPTIONS: Mapping[str, Option] = {
    "cache_type_k": Option(
        kind="choice", choices=tuple(CACHE_TYPES), help="element type of the KV cache's keys (f16)"
    ),
    "cache_type_v": Option(
        kind="choice",
        choices=tuple(CACHE_TYPES),
        help="element type of the KV cache's values (f16); a quantized one needs flash attention",
    ),
    "flash_attention": Option(
        kind="choice",
        choices=("auto", "on", "off"),
        help="the attention kernel that does not write out its scores (auto: where it is faster)",
    ),
    "adapter_scale": Option(
        kind="number", minimum=-10, maximum=10, help="strength of the model's LoRA adapters (1)"
    ),
    "gpu_layers": Option(
        kind="integer",
        minimum=0,
        maximum=10_000,
        help="layers on the GPU (as many as fit); 0: none",
    ),
}
# What a pooling type in a header means (llama.cpp, enum llama_pooling_type).
_POOLING_RANK = 4
# The interpreter with its engine, which took 14 MiB (xllamacpp) and 24 MiB (llama_cpp) without a
# model, and what an engine allocates beside the buffers that are named.
_RUNTIME_BYTES = 40 * MIB

# A batch of the prompt must not take over 1 s, since it can't be interrupted. Reading a token costs
# 2 floating-point operations a parameter; one thread did 31e9 a second on a quiet machine and 15e9
# on a busy one (SmolLM2-135M, batches of 64), and half a second is aimed at.
_PREFILL_SECONDS = 0.5
_FLOPS_PER_THREAD = 20e9
_MIN_BATCH = 4  # the default slots: an engine must be able to decode one token for each at a time
MAX_BATCH = 256
MAX_CHARS_PER_TOKEN = 128  # of any real tokenizer; 64 were seen, for runs of spaces


def _over_layers(artifact: Artifact, key: str, default: int) -> int:
    """Return a header value summed over the layers; a header may give one number for all."""
    value = artifact.metadata.get(f"{artifact.architecture}.{key}", default)
    if isinstance(value, list):
        return sum(_count(v, default) for v in value)
    return _count(value, default) * _number(artifact, "block_count", 0)


def _number(artifact: Artifact, key: str, default: int) -> int:
    value = artifact.metadata.get(f"{artifact.architecture}.{key}", default)
    if isinstance(value, list):
        return max((_count(v, default) for v in value), default=default)
    return _count(value, default)


def _count(value: object, default: int) -> int:
    """Return a header's number if it can be one of layers, heads or elements: it is untrusted."""
    return int(value) if isinstance(value, int | float) and value >= 0 else default


def check(backend: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine options in `given`. Raises BackendError that names the first wrong one."""
    options = check_options(backend, OPTIONS, given)
    if options.get("cache_type_v") in _QUANTIZED and options.get("flash_attention") == "off":
        raise BackendError(
            "invalid_request",
            f"option cache_type_v is {options['cache_type_v']}, which needs flash attention: set "
            "flash_attention to auto or on, or cache_type_v to f16",
        )
    return options


def kv_bytes_per_token(artifact: Artifact, engine: Mapping[str, Any] | None = None) -> int:
    """Return the bytes that one token takes in the KV cache, over all layers.

    Layers × KV heads × (key length × bytes of a key's element + the same of values). `engine` holds
    the options `cache_type_k` and `cache_type_v`. A model without causal attention keeps nothing.
    """
    if artifact.metadata.get(f"{artifact.architecture}.attention.causal") is False:
        return 0
    engine = engine or {}
    heads = max(1, _number(artifact, "attention.head_count", 1))
    head_length = _number(artifact, "embedding_length", 0) // heads
    key = _number(artifact, "attention.key_length", head_length)
    value = _number(artifact, "attention.value_length", head_length)
    kv_heads = _over_layers(artifact, "attention.head_count_kv", heads)
    key_bytes = CACHE_TYPES[engine.get("cache_type_k", "f16")]
    value_bytes = CACHE_TYPES[engine.get("cache_type_v", "f16")]
    return round(kv_heads * (key * key_bytes + value * value_bytes))


def batch_size(artifact: Artifact, threads: int, context_length: int, slots: int) -> int:
    """Return how many tokens the engine is to compute at a time.

    A model that pools needs a whole text in one batch. Other models read prompts in batches that
    a request can be cancelled between; each slot has at least one token in it.
    """
    if pools(artifact):
        return context_length
    return max(slots, prefill_batch(artifact, threads))


def prefill_batch(artifact: Artifact, threads: int) -> int:
    """Return how many prompt tokens to read at a time, so that a batch takes at most 1 s.

    Never less than 4: a machine that needs a quarter of a second for one token takes longer.
    """
    flops_per_token = 2 * max(1, artifact.parameters)
    tokens = _PREFILL_SECONDS * _FLOPS_PER_THREAD * max(1, threads) / flops_per_token
    batch = _MIN_BATCH
    while batch * 2 <= min(tokens, MAX_BATCH):
        batch *= 2
    return batch


def _size_chars(request: ChatRequest | CompleteRequest) -> int:
    if isinstance(request, CompleteRequest):
        return len(request.prompt) + len(request.suffix or "")
    size = 0
    for message in request.messages:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        size += sum(len(part) for part in parts)
    return size


def refuse_hopeless(request: ChatRequest | CompleteRequest, context_length: int) -> None:
    """Raise BackendError for a prompt that is far too long, before it is tokenized.

    Engines can't be interrupted while they tokenize, and take a hundred bytes a character for it.
    """
    size = _size_chars(request)
    if size > MAX_CHARS_PER_TOKEN * context_length:
        raise BackendError(
            "context_length_exceeded",
            f"the prompt has {size} characters, which cannot fit a context_length of "
            f"{context_length} tokens: shorten it or load the model with a larger context_length",
        )


def context_exceeded(tokens: int, context_length: int) -> BackendError:
    """Return the error for a prompt that does not fit."""
    return BackendError(
        "context_length_exceeded",
        f"the prompt has {tokens} tokens, but the model was loaded with a context_length of "
        f"{context_length}: shorten the prompt or load the model with a larger context_length",
    )


def settle_context_length(artifact: Artifact, options: LoadOptions) -> int:
    """Return what one request may use: the user's choice, else min(the model's, 4096)."""
    trained = artifact.context_length or DEFAULT_CONTEXT_LENGTH
    return options.context_length or min(trained, DEFAULT_CONTEXT_LENGTH)


def settle_slots(artifact: Artifact, options: LoadOptions, context_length: int) -> int:
    """Return how many requests run at once.

    The user's choice, else the largest of 4, 2, 1 whose KV cache stays under the larger of 512 MiB
    and half the weights.
    """
    if options.slots:
        return options.slots
    bound = max(512 * MIB, artifact.weights_bytes // 2)
    slot_bytes = kv_bytes_per_token(artifact, options.engine) * context_length
    return next((n for n in _DEFAULT_SLOTS if n * slot_bytes <= bound), 1)


def estimate(artifact: Artifact, options: LoadOptions, *, max_slots: int) -> MemoryEstimate:
    """Return what a load by a llama.cpp engine needs, with every setting settled.

    The weights are counted in full although they are mapped: pages that do not stay resident are
    read from disk again for each token, which is what freezes a machine.
    """
    context_length = settle_context_length(artifact, options)
    slots = min(max_slots, settle_slots(artifact, options, context_length))
    batch = batch_size(artifact, options.threads, context_length, slots)
    embedding = _number(artifact, "embedding_length", 0)
    heads = _number(artifact, "attention.head_count", 1)
    vocabulary = _count(artifact.metadata.get("tokenizer.ggml.tokens.length"), 0)
    # f32 logits and activations of one batch, and its attention scores over the context
    outputs = 0 if pools(artifact) else vocabulary
    compute = 4 * batch * (outputs + 16 * embedding + heads * context_length)
    extras = sum(
        _count(artifact.metadata.get(key), 0)
        for key in ("modeld.mmproj_bytes", "modeld.adapter_bytes")
    )
    return MemoryEstimate(
        context_length=context_length,
        slots=slots,
        parts={
            "weights": artifact.weights_bytes + extras,
            "kv_cache": kv_bytes_per_token(artifact, options.engine) * context_length * slots,
            "compute": compute,
            "runtime": _RUNTIME_BYTES,
        },
    )


def pools(artifact: Artifact) -> bool:
    """Say whether the model turns a text into one vector or score: then its header says how."""
    return f"{artifact.architecture}.pooling_type" in artifact.metadata


def tasks(artifact: Artifact) -> tuple[Task, ...]:
    """Return what the model can be asked to do, as its header says."""
    if pools(artifact):
        pooling = artifact.metadata[f"{artifact.architecture}.pooling_type"]
        return (Task.RERANK,) if pooling == _POOLING_RANK else (Task.EMBED,)
    found = [Task.CHAT, Task.COMPLETE]
    if infill_tokens(artifact) is not None:
        found.append(Task.INFILL)
    if artifact.paths("mmproj"):
        found.append(Task.VISION)
    return tuple(found)


def infill_tokens(artifact: Artifact) -> tuple[int, int, int] | None:
    """Return the tokens that announce a prefix, a suffix and the middle; None without infill.

    Older files call them `prefix_token_id` and so on, newer ones `fim_pre_token_id`.
    """
    found = []
    for names in (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle")):
        keys = [f"tokenizer.ggml.{name}_token_id" for name in names]
        ids = [artifact.metadata[key] for key in keys if key in artifact.metadata]
        if not ids or not isinstance(ids[0], int):
            return None
        found.append(ids[0])
    return found[0], found[1], found[2]
