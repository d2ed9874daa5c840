"""What the header of a GGUF file says of the model: layers, heads, tasks. Pure.

The names of header keys are those of the GGUF specification (github.com/ggml-org/ggml,
docs/gguf.md). Headers are untrusted: a number that can't be one is left out.
"""

from __future__ import annotations

from backends.contract import Artifact, Task

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
# What a pooling type in a header means (llama.cpp, enum llama_pooling_type).
_POOLING_RANK = 4
MAX_LAYERS = 1024


def layer_count(artifact: Artifact) -> int:
    """Return how many layers there are; a bounded number, whatever the header says."""
    return min(number(artifact, "block_count", 0), MAX_LAYERS)


def layers(
    artifact: Artifact, key: str, default: int, *, otherwise: list[int] | None = None
) -> list[int]:
    """Return a header value for each layer; a header may give one number for all.

    Without it in the header, it is `otherwise`, or `default` for all.
    """
    size = layer_count(artifact)
    value = artifact.metadata.get(f"{artifact.architecture}.{key}")
    if value is None and otherwise is not None:
        return otherwise
    if isinstance(value, list):
        told = [count(v, default) for v in value[:size]]
        return told + [default] * (size - len(told))
    return [count(value, default)] * size


def number(artifact: Artifact, key: str, default: int) -> int:
    """Return a header value; the largest, if there is one for each layer."""
    value = artifact.metadata.get(f"{artifact.architecture}.{key}", default)
    if isinstance(value, list):
        return max((count(v, default) for v in value), default=default)
    return count(value, default)


def count(value: object, default: int) -> int:
    """Return a header's number if it can be one of layers, heads or elements."""
    return int(value) if isinstance(value, int | float) and value >= 0 else default


def head_lengths(artifact: Artifact, *, windowed: bool = False) -> tuple[int, int]:
    """Return the elements of a head's key and of its value, in layers with a window or without."""
    heads = max(1, number(artifact, "attention.head_count", 1))
    length = number(artifact, "embedding_length", 0) // heads
    key = number(artifact, "attention.key_length", length)
    value = number(artifact, "attention.value_length", length)
    if not windowed:
        return key, value
    return (
        number(artifact, "attention.key_length_swa", key),
        number(artifact, "attention.value_length_swa", value),
    )


def pools(artifact: Artifact) -> bool:
    """Say whether the model turns a text into one vector or score: then its header says how."""
    return f"{artifact.architecture}.pooling_type" in artifact.metadata


def tasks(artifact: Artifact) -> tuple[Task, ...]:
    """Return what the model can be asked to do, as its header says."""
    if pools(artifact):
        pooling = artifact.metadata[f"{artifact.architecture}.pooling_type"]
        return (Task.RERANK,) if pooling == _POOLING_RANK else (Task.EMBED,)
    # Without a template of its own a model was never trained to talk in turns.
    found = [Task.CHAT, Task.COMPLETE] if artifact.chat_template else [Task.COMPLETE]
    if infill_tokens(artifact) is not None:
        found.append(Task.INFILL)
    if artifact.paths("mmproj") and artifact.chat_template:
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
