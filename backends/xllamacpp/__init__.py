"""GGUF models through xllamacpp: llama.cpp's own server engine, in this process."""

from backends.xllamacpp.backend import Xllamacpp

__all__ = ["Xllamacpp"]
