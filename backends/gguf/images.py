"""What an image encoder (an mmproj file) takes beside a language model. Pure.

Sizes are bytes. Source: llama.cpp's `tools/mtmd/clip.cpp`: weights are read into a buffer of their
own, and one image at a time is computed, of at most so many patches as the projector's settings
say.
The facts are those of the encoder's header, under `modeld.mmproj.`.
"""

from __future__ import annotations

from backends.contract import Artifact
from backends.gguf.header import count

_FLOAT = 4
_RESIDUALS, _WIDE, _QUERIES = 4, 2, 4
_COLORS = 3
# The library with its graph, measured, and a decoded picture of two megapixels.
_RUNTIME_BYTES = 12 * 1024 * 1024
# Encoders of images as they come make up to so many tokens of one, each of `merge` patches squared:
# the type of the projector, tokens, merge (`set_limit_image_tokens`).
_LIMITS = {
    "qwen2vl_merger": (4096, 2),
    "qwen2.5vl_merger": (4096, 2),
    "qwen3vl_merger": (4096, 2),
    "glm4v": (4096, 2),
    "pixtral": (1024, 1),
    "kimivl": (1024, 2),
    "gemma4v": (1120, 3),
    "gemma4uv": (1120, 3),
    "lfm2": (256, 2),
    "minimax_m3": (576, 2),
}


def encoder_bytes(artifact: Artifact) -> int:
    """Return the bytes of an image encoder's weights, 0 without one."""
    return count(artifact.metadata.get("modeld.mmproj_bytes"), 0)


def encoding_bytes(artifact: Artifact) -> int:
    """Return what encoding the largest image takes beside the weights."""
    if not encoder_bytes(artifact):
        return 0
    patches = _patches(artifact)
    size = _fact(artifact, "patch_size")
    width = _fact(artifact, "embedding_length")
    wide = _fact(artifact, "feed_forward_length") or 4 * width
    layer = _RESIDUALS * width + max(_WIDE * wide, _QUERIES * width)
    pixels = _COLORS * size * size
    # The image as floats, its patches unfolded, and a layer.
    return _RUNTIME_BYTES + _FLOAT * patches * (2 * pixels + layer)


def _patches(artifact: Artifact) -> int:
    """Return the most patches of one image; a square of `image_size` if nothing else is said."""
    size = max(1, _fact(artifact, "patch_size"))
    square = (_fact(artifact, "image_size") // size) ** 2
    projector = str(artifact.metadata.get("modeld.mmproj.projector_type", ""))
    told = _fact(artifact, "image_max_pixels") // size**2
    tokens, merge = _LIMITS.get(projector, (0, 1))
    merge = _fact(artifact, "spatial_merge_size") or merge
    return max(square, told, tokens * merge * merge)


def _fact(artifact: Artifact, name: str) -> int:
    return count(artifact.metadata.get(f"modeld.mmproj.{name}"), 0)
