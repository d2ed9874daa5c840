"""What a GGML model needs in RAM, and the bounds that the engine's fixed buffers set. Pure.

Bytes are bytes of RAM, lengths are tokens. ctransformers 0.2.27 computes in buffers of 256 MiB.
Those that layers use in turn (gpt_neox, mpt, starcoder) stay as they are; where one is for all
layers, it grows with the tokens in a batch, but not with the context. A buffer that is too small
ends the process, so what fits is computed here: the numbers below count the tensors of `*_eval` in
the engine's sources (github.com/marella/ctransformers, `models/llms/`).
"""

from __future__ import annotations

from dataclasses import dataclass

from backends import gguf
from backends.contract import Artifact, LoadOptions, MemoryEstimate

_MIB = 1024 * 1024
BUFFER_BYTES = 256 * _MIB
# The worker with the engine took 28 MiB; a token's place in the engine's two tables of tokens 317
# bytes, and 123 for llama and falcon. Measured with 263 to 50,264 tokens.
_RUNTIME_BYTES = 29 * _MIB
_TOKEN_BYTES, _SHORT_TOKEN_BYTES = 320, 130
_TENSOR_BYTES = 512  # of a tensor's description
_TENSORS_PER_LAYER = 64
_SPARE = 1.03  # for what is not counted: alignment, and work space of single operations
_DEFAULT_BATCH = 8  # the engine's own


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """What computing takes: per layer and token, in elements of 4 bytes.

    `activations` × embedding + `scores` × context × heads; and, however many tokens there are,
    `values` × context × embedding for a transposed copy of the cache. `logits` × vocabulary once.
    `cache` is the bytes of an element of the KV cache. `shared`: one buffer for all layers; else
    `activations` counts the fuller of two that the layers use in turn.
    """

    activations: int
    scores: int
    values: float
    logits: int
    cache: int
    shared: bool


_COSTS = {
    "gpt2": _Costs(activations=46, scores=1, values=1, logits=1, cache=4, shared=True),
    "gptj": _Costs(activations=32, scores=1, values=0, logits=3, cache=2, shared=True),
    "dolly-v2": _Costs(activations=47, scores=1, values=0, logits=1, cache=2, shared=True),
    "replit": _Costs(activations=26, scores=4, values=0.5, logits=1, cache=2, shared=True),
    "gpt_neox": _Costs(activations=26, scores=1, values=0, logits=1, cache=2, shared=False),
    "mpt": _Costs(activations=16, scores=4, values=0.5, logits=1, cache=2, shared=False),
    "starcoder": _Costs(activations=26, scores=1, values=1, logits=1, cache=4, shared=False),
}
ARCHITECTURES = (*_COSTS, "llama", "falcon")
# Their cache is of the length that is asked for; others have that of the file, or, for a shorter
# context, use a part of it.
_SIZED = ("mpt", "llama", "falcon")


def number(artifact: Artifact, name: str) -> int:
    """Return a number of the header; the reader has checked it. 0 if it has none of that name."""
    value = artifact.metadata.get(f"ggml.{name}", 0)
    return value if isinstance(value, int) else 0


def computing_bytes(artifact: Artifact, batch: int, context_length: int) -> int:
    """Return what computing `batch` tokens at the end of a full context takes of one buffer."""
    costs = _COSTS[artifact.architecture]
    embedding, layers = number(artifact, "embedding"), number(artifact, "layers")
    scores = context_length * number(artifact, "heads") * batch
    layer = 4 * (
        costs.activations * embedding * batch
        + costs.scores * scores
        + costs.values * context_length * embedding
    )
    if not costs.shared:
        return round(_SPARE * layer)
    logits = 4 * costs.logits * number(artifact, "vocabulary") * batch
    work = 2 * max(scores, 4 * embedding * batch)
    described = layers * _TENSORS_PER_LAYER * _TENSOR_BYTES
    return round(_SPARE * (layers * layer + logits + work + described))


def grows(artifact: Artifact) -> bool:
    """Say whether the engine has one buffer for all layers, which can be made to grow."""
    costs = _COSTS.get(artifact.architecture)
    return costs is not None and costs.shared


def batch_size(artifact: Artifact, threads: int, context_length: int) -> int:
    """Return how many tokens of a prompt to read at a time.

    One batch takes at most a second and, as far as it goes, one buffer; at least 1.
    """
    batch = gguf.prefill_batch(artifact, threads)
    if artifact.architecture not in _COSTS:
        return batch
    least = min(_DEFAULT_BATCH, batch) if grows(artifact) else 1
    while batch > least and computing_bytes(artifact, batch, context_length) > BUFFER_BYTES:
        batch //= 2
    return batch


def settle_context_length(artifact: Artifact, wanted: int | None) -> int:
    """Return what one request may use: `wanted` (None: at most 4096) as far as the model has it.

    Never more than the file's context, except for llama and falcon, whose files do not say; and
    what the engine's buffers hold.
    """
    length = gguf.settle_context_length(artifact, LoadOptions(context_length=wanted))
    if artifact.architecture in ("llama", "falcon"):
        return wanted or length
    length = min(length, artifact.context_length)
    if grows(artifact):
        return length
    # Everything is a multiple of the context but for the activations.
    least = computing_bytes(artifact, 1, 0)
    each = computing_bytes(artifact, 1, 1) - least
    return min(length, (BUFFER_BYTES - least) // max(1, each))


def _cache_bytes(artifact: Artifact, context_length: int) -> int:
    """Return the bytes of the KV cache."""
    layers, embedding = number(artifact, "layers"), number(artifact, "embedding")
    if artifact.architecture == "llama":
        return 2 * 2 * layers * context_length * number(artifact, "attention_rows")
    if artifact.architecture == "falcon":  # the values are there twice
        head_length = embedding // number(artifact, "heads")
        return 3 * 4 * layers * context_length * head_length * number(artifact, "heads_kv")
    length = context_length if artifact.architecture in _SIZED else artifact.context_length
    return 2 * _COSTS[artifact.architecture].cache * layers * length * embedding


def _compute_bytes(artifact: Artifact, batch: int, context_length: int) -> int:
    embedding = number(artifact, "embedding")
    if artifact.architecture not in _COSTS:
        # The engine's buffers are larger, but this is what is written to: logits, activations, and
        # scores of one layer; in falcon also one key and value for each head, and values turned.
        scores = number(artifact, "heads") * context_length
        elements = batch * (number(artifact, "vocabulary") + 20 * embedding + scores)
        if artifact.architecture == "falcon":
            elements += 3 * context_length * embedding
            return 4 * elements + 3 * _MIB
        # Beside programs that take the CPU, llama was seen to take 2 MiB more than alone.
        return 4 * elements + 5 * _MIB
    one = computing_bytes(artifact, batch, context_length)
    if grows(artifact):
        return one
    logits = 4 * number(artifact, "vocabulary") * batch
    described = number(artifact, "layers") * _TENSORS_PER_LAYER * _TENSOR_BYTES
    return one + computing_bytes(artifact, batch, 0) + logits + described


def estimate(artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
    """Return what a load needs, with every setting settled. All weights are read into memory."""
    context_length = settle_context_length(artifact, options.context_length)
    batch = batch_size(artifact, options.threads, context_length)
    token_bytes = _TOKEN_BYTES if artifact.architecture in _COSTS else _SHORT_TOKEN_BYTES
    return MemoryEstimate(
        context_length=context_length,
        slots=1,
        parts={
            "weights": artifact.weights_bytes + number(artifact, "tied_bytes"),
            "kv_cache": _cache_bytes(artifact, context_length),
            "compute": _compute_bytes(artifact, batch, context_length),
            "runtime": _RUNTIME_BYTES + token_bytes * number(artifact, "vocabulary"),
        },
    )
