"""What a load by a llama.cpp engine needs, and where its layers go. Pure. Sizes are in bytes.

The sum is what a worker holds once it was used with full prompts in all slots: its anonymous memory
and the resident pages of its model files. The constants below were measured; the sizes that follow
from a header are in `cache`, `compute` and `images`.
"""

from __future__ import annotations

from dataclasses import dataclass

from backends import placement
from backends.contract import Artifact, LoadOptions, MemoryEstimate
from backends.gguf import compute, header, images, settings
from backends.gguf.cache import Cache, cache

# The engine's tables for a token: its text and score, a node and a bucket of the table of texts,
# the text as it is written out (`src/llama-vocab.cpp`: id_to_token, token_to_id,
# cache_token_to_piece, with the allocator's overhead; one text of ten is too long to lie in its
# string). For a merge: a node with two texts, and a bucket (bpe_ranks).
_TOKEN_BYTES = 40 + 64 + 14 + 32 + 14
_MERGE_BYTES = 96 + 14
_HOLE_BYTES = 72
# A tokenizer that looks texts up letter by letter has a node for each letter of each token.
_TRIES = frozenset(("t5", "rwkv"))
_TRIE_BYTES = 380


_X86_64 = ("x86_64", "AMD64")
_REPACKED_BY_X86 = frozenset(("Q4_0", "Q4_K", "IQ4_NL", "MXFP4", "Q2_K"))
_REPACKED_BY_ARM = frozenset(("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4", "Q1_0"))


def repacked_types(machine: str) -> frozenset[str]:
    """Return the types of weights that llama.cpp lays out anew for a CPU (`platform.machine()`).

    From `ggml-cpu/repack.cpp`, for CPUs with AVX2 (Q2_K: AVX-512) or with ARM's dot products; an
    older one has none of it.
    """
    return _REPACKED_BY_X86 if machine in _X86_64 else _REPACKED_BY_ARM


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What an engine takes, and how it keeps things, where the two llama.cpp engines differ.

    `runtime_bytes` is a worker with the engine in it that has loaded nothing. Of what a vocabulary
    is read into (tokens and merges), `string_bytes` for each are not given back to the system, and
    holes of up to `hole_bytes` together. `cell_bytes` are the descriptions of one token in the KV
    cache and in what holds its prompt, `slot_bytes` what else a slot has, and `candidates` how many
    lists of all tokens, to choose the next one from, there are for each slot.

    `full_windows`: layers with a window keep the whole context. `checkpoints` is how many copies a
    slot keeps of what it can't cut back to an earlier token. `pools_together`: texts to pool share
    one cache of the context's length. `image_batch` is the least batch of a model whose images must
    be computed at one go. `repacked_types` are the types of weights that the CPU has a second copy
    of, in another layout.
    """

    runtime_bytes: int
    string_bytes: int
    hole_bytes: int
    cell_bytes: int
    slot_bytes: int
    candidates: int
    full_windows: bool
    checkpoints: int
    pools_together: bool
    image_batch: int
    repacked_types: frozenset[str]


def estimate(
    artifact: Artifact, options: LoadOptions, footprint: Footprint, *, max_slots: int
) -> MemoryEstimate:
    """Return what a load by a llama.cpp engine needs, with every setting settled.

    The weights are counted in full although they are mapped: pages that do not stay resident are
    read from disk again for each token, which is what freezes a machine.
    """
    context_length = settings.settle_context_length(artifact, options)
    slots = min(max_slots, settings.settle_slots(artifact, options, context_length))
    batch = _batch(artifact, options, footprint, context_length, slots)
    together = footprint.pools_together and header.pools(artifact)
    kept = cache(
        artifact,
        options.engine,
        context_length=context_length,
        slots=1 if together else slots,
        batch=batch,
        full_windows=footprint.full_windows,
    )
    graph = compute.graph_bytes(
        artifact, options.engine, batch=batch, longest=kept.longest, slots=slots
    )
    plan = placement.place(
        _demand(artifact, kept, graph), options.gpus, gpu_layers=options.engine.get("gpu_layers")
    )
    parts = dict(plan.ram_parts)
    if not plan.placement.gpu_layers:  # with a GPU, llama.cpp keeps to layouts that it reads too
        parts["weights"] += repacked_bytes(artifact, footprint)
    parts["kv_cache"] += slots * footprint.checkpoints * kept.rewound
    parts["compute"] += compute.work_bytes(artifact, batch=batch, threads=max(1, options.threads))
    parts["runtime"] = _runtime_bytes(
        artifact, footprint, slots=slots, batch=batch, cells=kept.cells
    )
    parts |= {name: size for name, size in _beside(artifact).items() if size}
    return MemoryEstimate(
        context_length=context_length,
        slots=slots,
        parts=parts,
        gpu_parts=plan.gpu_parts,
        placement=plan.placement,
    )


def _batch(
    artifact: Artifact,
    options: LoadOptions,
    footprint: Footprint,
    context_length: int,
    slots: int,
) -> int:
    batch = settings.batch_size(artifact, options.threads, context_length, slots)
    if images.encoder_bytes(artifact) and artifact.architecture.startswith("gemma"):
        return max(batch, footprint.image_batch)
    return batch


def repacked_bytes(artifact: Artifact, footprint: Footprint) -> int:
    """Return the bytes of the copies of weights in the CPU's own layouts.

    Their pages of the file are read for that and stay resident, until somebody needs the memory.
    """
    return sum(
        _number(artifact, f"modeld.matrix_bytes.{kind}") for kind in footprint.repacked_types
    )


def vocabulary_bytes(artifact: Artifact, footprint: Footprint) -> int:
    """Return the bytes of the engine's vocabulary: tokens, merges, and what reading them left."""
    tokens = compute.vocabulary_size(artifact)
    merges = _number(artifact, "tokenizer.ggml.merges.length")
    each = _TOKEN_BYTES
    if artifact.metadata.get("tokenizer.ggml.model") in _TRIES:
        each += _TRIE_BYTES
    strings = tokens + merges
    left = strings * footprint.string_bytes + min(strings * _HOLE_BYTES, footprint.hole_bytes)
    return tokens * each + merges * _MERGE_BYTES + left


def _runtime_bytes(
    artifact: Artifact, footprint: Footprint, *, slots: int, batch: int, cells: int
) -> int:
    """Return what is there beside the named buffers: process, vocabulary, outputs, bookkeeping."""
    tokens = compute.vocabulary_size(artifact)
    outputs = slots * tokens * (4 + footprint.candidates * compute.CANDIDATE_BYTES)
    if header.pools(artifact):
        # There is room for every token of a batch, for logits too (`llama-context.cpp`,
        # output_reserve), which nobody asks for.
        outputs = 4 * batch * (tokens + header.number(artifact, "embedding_length", 0))
    return (
        footprint.runtime_bytes
        + vocabulary_bytes(artifact, footprint)
        + outputs
        + slots * footprint.slot_bytes
        + cells * footprint.cell_bytes
    )


def _beside(artifact: Artifact) -> dict[str, int]:
    """Return the bytes of the files beside the language model's, which are read, not mapped."""
    return {
        "adapters": _number(artifact, "modeld.adapter_bytes"),
        "mmproj": images.encoder_bytes(artifact) + images.encoding_bytes(artifact),
    }


def _demand(artifact: Artifact, kept: Cache, graph: int) -> placement.Demand:
    """Return the model's bytes layer by layer; together they are its weights and its KV cache."""
    told = artifact.metadata.get("modeld.layer_bytes")
    sizes = [header.count(size, 0) for size in told] if isinstance(told, list) else []
    count = max(len(kept.layers), len(sizes))
    embedding = _number(artifact, "modeld.embedding_bytes")
    output = _number(artifact, "modeld.output_bytes")
    if sum(sizes) + embedding + output > artifact.weights_bytes or not sizes:
        # A header that tells nothing of its layers, or lies: as if all were in layers alike.
        sizes, embedding, output = [artifact.weights_bytes // max(1, count)] * count, 0, 0
    # What belongs to no layer stays in RAM with the table of tokens. Where that table is the last
    # matrix too, a GPU gets a copy of it.
    rest = artifact.weights_bytes - sum(sizes) - output
    return placement.Demand(
        layers=tuple(sizes + [0] * (count - len(sizes))),
        kv_cache=tuple(kept.layers + (0,) * (count - len(kept.layers))),
        output=output,
        embedding=rest,
        compute=graph,
    )


def _number(artifact: Artifact, key: str) -> int:
    return header.count(artifact.metadata.get(key), 0)
