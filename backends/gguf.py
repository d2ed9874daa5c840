"""What both GGUF backends need to know of a GGUF file: settings, memory, suitability. Pure.

Bytes are bytes of RAM, lengths are tokens. The names of header keys are those of the GGUF
specification (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

from backends.contract import (
    Artifact,
    BackendError,
    ChatRequest,
    LoadOptions,
    MemoryEstimate,
    Task,
)

MIB = 1024 * 1024
DEFAULT_CONTEXT_LENGTH = 4096
_DEFAULT_SLOTS = (4, 2, 1)
_KV_BYTES_PER_ELEMENT = 2  # f16
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
_MAX_CHARS_PER_TOKEN = 128  # of any real tokenizer; 64 were seen, for runs of spaces


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


def kv_bytes_per_token(artifact: Artifact) -> int:
    """Return the bytes that one token takes in the KV cache, over all layers.

    2 bytes (f16) × layers × KV heads × (key length + value length).
    """
    heads = max(1, _number(artifact, "attention.head_count", 1))
    head_length = _number(artifact, "embedding_length", 0) // heads
    key = _number(artifact, "attention.key_length", head_length)
    value = _number(artifact, "attention.value_length", head_length)
    kv_heads = _over_layers(artifact, "attention.head_count_kv", heads)
    return _KV_BYTES_PER_ELEMENT * kv_heads * (key + value)


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


def refuse_hopeless(request: ChatRequest, context_length: int) -> None:
    """Raise BackendError for messages that are far too long, before they are tokenized.

    Engines can't be interrupted while they tokenize, and take a hundred bytes a character for it.
    """
    size = sum(len(message["content"]) for message in request.messages)
    if size > _MAX_CHARS_PER_TOKEN * context_length:
        raise BackendError(
            "context_length_exceeded",
            f"the messages have {size} characters, which cannot fit a context_length of "
            f"{context_length} tokens: shorten them or load the model with a larger context_length",
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
    slot_bytes = kv_bytes_per_token(artifact) * context_length
    return next((n for n in _DEFAULT_SLOTS if n * slot_bytes <= bound), 1)


def estimate(
    artifact: Artifact, options: LoadOptions, *, max_slots: int, batch: int
) -> MemoryEstimate:
    """Return what a load by a llama.cpp engine needs, with every setting settled.

    `batch` is how many prompt tokens the engine reads at a time.

    The weights are counted in full although they are mapped: pages that do not stay resident are
    read from disk again for each token, which is what freezes a machine.
    """
    context_length = settle_context_length(artifact, options)
    slots = min(max_slots, settle_slots(artifact, options, context_length))
    embedding = _number(artifact, "embedding_length", 0)
    heads = _number(artifact, "attention.head_count", 1)
    vocabulary = _count(artifact.metadata.get("tokenizer.ggml.tokens.length"), 0)
    # f32 logits and activations of one batch, and its attention scores over the context
    compute = 4 * batch * (vocabulary + 16 * embedding + heads * context_length)
    return MemoryEstimate(
        context_length=context_length,
        slots=slots,
        parts={
            "weights": artifact.weights_bytes,
            "kv_cache": kv_bytes_per_token(artifact) * context_length * slots,
            "compute": compute,
            "runtime": _RUNTIME_BYTES,
        },
    )


def tasks(artifact: Artifact) -> tuple[Task, ...]:
    """Return what the model can be asked to do; a header with a pooling type is an embedder's."""
    if f"{artifact.architecture}.pooling_type" in artifact.metadata:
        return ()
    return (Task.CHAT,)
