"""The buffers that a llama.cpp engine computes in, and what they hold once they were used. Pure.

Sizes are bytes, lengths are tokens. llama.cpp reserves one buffer for the graph of its largest
batch (`src/llama-context.cpp`, `sched_reserve`), in which tensors take the place of those that are
no longer needed (`ggml/src/ggml-alloc.c`). It is therefore as large as the fullest moment of one
layer; how many tensors that is was read off the sizes that the engine reports. Beside it the CPU
backend has work space for the largest single operation (`ggml/src/ggml-cpu/ggml-cpu.c`,
`ggml_graph_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.contract import Artifact
from backends.gguf.header import count, head_lengths, layers, number, pools

_FLOAT = 4
# Tensors as wide as the model that are alive in a layer: the residual, its norm, a sum, a product.
_RESIDUALS = 4
# In the feed-forward network: gate, up and their product; what goes in and out without a gate.
_GATED, _UNGATED = 3, 2
_WITHOUT_GATES = frozenset(
    """
    bert bloom codeshell falcon gpt2 gptj gptneox mpt nemotron phi2 refact starcoder starcoder2
    """.split()
)
# In attention: queries before and after their rotation, and the result.
_QUERIES = 3
# In a layer with a state: its input twice, gate, convolution and result.
_INNER = 6
# One thread attends to tiles of so many queries and keys (`ggml-cpu/common.h`, GGML_FA_TILE_Q).
_TILE = 64
# A token with its probability, which samplers sort (`llama.h`, llama_token_data).
CANDIDATE_BYTES = 12


def graph_bytes(
    artifact: Artifact, engine: Mapping[str, Any], *, batch: int, longest: int, slots: int
) -> int:
    """Return what computing a batch of `batch` tokens touches of the graph's buffer.

    `longest` counts what its tokens can attend to; each of `slots` has one output at a time.
    """
    width = number(artifact, "embedding_length", 0)
    fullest = max(
        _attention_elements(artifact),
        _feed_forward_elements(artifact),
        _state_elements(artifact),
    )
    elements = batch * (_RESIDUALS * width + fullest)
    elements += batch * number(artifact, "attention.indexer.head_count", 0) * longest
    elements += 2 * slots * _scanned_elements(artifact)
    # Which token may see which: half floats with flash attention, else floats beside the scores.
    heads = number(artifact, "attention.head_count", 0)
    mask = longest * batch * 2
    if engine.get("flash_attention") == "off":
        mask = longest * batch * _FLOAT * (1 + heads)
    copies = longest * slots * _copied_bytes(artifact, engine)
    outputs = batch * width if pools(artifact) else slots * vocabulary_size(artifact)
    return _FLOAT * (elements + outputs) + mask + copies


def work_bytes(artifact: Artifact, *, batch: int, threads: int) -> int:
    """Return the CPU's work space: a product's input as its weights' type, and tiles of attention.

    Inputs become 8-bit blocks or half floats, which are the larger.
    """
    key, value = head_lengths(artifact)
    tiles = _FLOAT * _TILE * (2 * key + 2 * value + 2 * _TILE)
    widest = max(
        number(artifact, "feed_forward_length", 0),
        number(artifact, "embedding_length", 0),
        number(artifact, "ssm.inner_size", 0),
        number(artifact, "attention.head_count", 0) * value,
        number(artifact, "expert_used_count", 0)
        * number(artifact, "expert_feed_forward_length", 0),
    )
    return max(2 * batch * widest, 0) + threads * tiles


def _copied_bytes(artifact: Artifact, engine: Mapping[str, Any]) -> int:
    """Return the bytes of a token's keys and values that flash attention wants as half floats."""
    if engine.get("flash_attention") == "off":
        return 0
    heads = number(artifact, "attention.head_count_kv", number(artifact, "attention.head_count", 0))
    lengths = zip(("cache_type_k", "cache_type_v"), head_lengths(artifact), strict=True)
    return sum(2 * heads * length for name, length in lengths if engine.get(name) == "f32")


def vocabulary_size(artifact: Artifact) -> int:
    """Return the number of tokens that the model knows."""
    listed = count(artifact.metadata.get("tokenizer.ggml.tokens.length"), 0)
    return listed or number(artifact, "vocab_size", 0)


def _attention_elements(artifact: Artifact) -> int:
    """Return the floats of one token in an attention layer."""
    heads = max(layers(artifact, "attention.head_count", 0), default=0)
    kv_heads = number(artifact, "attention.head_count_kv", heads)
    key, value = head_lengths(artifact)
    if rank := number(artifact, "attention.kv_lora_rank", 0):
        # Each head's query is turned into the latent space, and its result out of it.
        short = number(artifact, "attention.key_length_mla", 0)
        return heads * (2 * key + short + 2 * rank) + 2 * key
    return _QUERIES * heads * key + 2 * kv_heads * (key + value)


def _feed_forward_elements(artifact: Artifact) -> int:
    """Return the floats of one token in a feed-forward layer, or in all its experts."""
    width = number(artifact, "embedding_length", 0)
    parts = _UNGATED if artifact.architecture in _WITHOUT_GATES else _GATED
    dense = parts * number(artifact, "feed_forward_length", 0)
    used = number(artifact, "expert_used_count", 0)
    if not used:
        return dense
    wide = number(artifact, "expert_feed_forward_length", 0) or number(
        artifact, "feed_forward_length", 0
    )
    shared = number(artifact, "expert_shared_feed_forward_length", 0)
    shared = shared or number(artifact, "expert_shared_count", 0) * wide
    routed = used * (_GATED * wide + 2 * width) + 2 * number(artifact, "expert_count", 0)
    return max(dense, routed, _GATED * shared + used * width)


def _state_elements(artifact: Artifact) -> int:
    """Return the floats of one token in a layer with a state."""
    width = number(artifact, "embedding_length", 0)
    if number(artifact, "shortconv.l_cache", 0):
        return _INNER * width
    if number(artifact, "wkv.head_size", 0):
        return 2 * _INNER * width
    inner, state = number(artifact, "ssm.inner_size", 0), number(artifact, "ssm.state_size", 0)
    groups = max(1, number(artifact, "ssm.group_count", 1))
    heads, size = number(artifact, "attention.head_count", 0), number(artifact, "kda.head_dim", 0)
    return _INNER * (inner + heads * size) + (4 * groups * state if inner else 0)


def _scanned_elements(artifact: Artifact) -> int:
    """Return the floats of the state that a layer hands on, of one conversation."""
    width, heads = (
        number(artifact, "embedding_length", 0),
        number(artifact, "attention.head_count", 0),
    )
    return max(
        number(artifact, "ssm.inner_size", 0) * number(artifact, "ssm.state_size", 0),
        width * number(artifact, "wkv.head_size", 0),
        heads * number(artifact, "kda.head_dim", 0) ** 2,
    )
