"""ONNX models through onnxruntime: embeddings, rerankers, classifiers, and generation.

An ONNX model is a folder; `daemon.artifacts.onnx` reads what the folder says into
`Artifact.metadata`, and that is all that this package knows of it.
"""

from backends.onnx.backend import Onnx

__all__ = ["Onnx"]
