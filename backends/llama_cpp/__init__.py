"""GGUF models through llama-cpp-python, the binding with the widest choice of GPU builds."""

from backends.llama_cpp.backend import LlamaCpp

__all__ = ["LlamaCpp"]
