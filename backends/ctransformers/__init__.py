"""GGML (pre-GGUF) models through ctransformers, the only runtime left for them."""

from backends.ctransformers.backend import CTransformers

__all__ = ["CTransformers"]
