"""What a load by a llama.cpp engine needs, and where its layers go. Pure. Sizes are in bytes."""

from __future__ import annotations

from backends import placement
from backends.contract import Artifact, LoadOptions, MemoryEstimate
from backends.gguf import header, settings

# The interpreter with its engine, which took 14 MiB (xllamacpp) and 24 MiB (llama_cpp) without a
# model, and what an engine allocates beside the buffers that are named.
_RUNTIME_BYTES = 40 * 1024 * 1024


def estimate(artifact: Artifact, options: LoadOptions, *, max_slots: int) -> MemoryEstimate:
    """Return what a load by a llama.cpp engine needs, with every setting settled.

    The weights are counted in full although they are mapped: pages that do not stay resident are
    read from disk again for each token, which is what freezes a machine.
    """
    context_length = settings.settle_context_length(artifact, options)
    slots = min(max_slots, settings.settle_slots(artifact, options, context_length))
    batch = settings.batch_size(artifact, options.threads, context_length, slots)
    embedding = header.number(artifact, "embedding_length", 0)
    heads = header.number(artifact, "attention.head_count", 1)
    vocabulary = header.count(artifact.metadata.get("tokenizer.ggml.tokens.length"), 0)
    # f32 logits and activations of one batch, and its attention scores over the context
    outputs = 0 if header.pools(artifact) else vocabulary
    compute = 4 * batch * (outputs + 16 * embedding + heads * context_length)
    demand = _demand(artifact, options, tokens=context_length * slots, compute=compute)
    plan = placement.place(demand, options.gpus, gpu_layers=options.engine.get("gpu_layers"))
    beside = _number(artifact, "modeld.mmproj_bytes") + _number(artifact, "modeld.adapter_bytes")
    parts = plan.ram_parts | {"runtime": _RUNTIME_BYTES}
    return MemoryEstimate(
        context_length=context_length,
        slots=slots,
        parts=parts | {"weights": parts["weights"] + beside},
        gpu_parts=plan.gpu_parts,
        placement=plan.placement,
    )


def _demand(
    artifact: Artifact, options: LoadOptions, *, tokens: int, compute: int
) -> placement.Demand:
    """Return the model's bytes layer by layer; together they are its weights and its KV cache."""
    cache = [each * tokens for each in header.kv_bytes_by_layer(artifact, options.engine)]
    told = artifact.metadata.get("modeld.layer_bytes")
    sizes = [header.count(size, 0) for size in told] if isinstance(told, list) else []
    count = max(len(cache), len(sizes))
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
        kv_cache=tuple(cache + [0] * (count - len(cache))),
        output=output,
        embedding=rest,
        compute=compute,
    )


def _number(artifact: Artifact, key: str) -> int:
    return header.count(artifact.metadata.get(key), 0)
