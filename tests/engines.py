"""Models of each kind, and one chat template on each engine that renders them, in one daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_models
import onnx_files
from ggml_files import write_ggml
from running import RunningDaemon

# The engines by the names of their backends, and the modules that they are in.
ENGINES = {
    "xllamacpp": "xllamacpp",
    "llama_cpp": "llama_cpp",
    "onnx": "onnxruntime_genai",
    "ctransformers": "ctransformers",
}


def add(daemon: RunningDaemon, unique: str, source: str, **more: Any) -> None:
    """Add a model and download it."""
    daemon.json("POST", "/modeld/v1/models", {"source": source, "unique": unique, **more})
    daemon.download(unique)


def add_encoders(daemon: RunningDaemon, home: Path) -> None:
    """Add an `embedder`, a `reranker` and a `classifier`."""
    for name, folder in onnx_files.encoders(home).items():
        add(daemon, name, f"{folder}/")


def add_to_each(daemon: RunningDaemon, home: Path, template: str) -> None:
    """Add a model with this template for each engine, under the engine's name."""
    sources = {name: str(gguf_models.smollm2()) for name in ("xllamacpp", "llama_cpp")}
    (home / "decoder").mkdir()
    onnx_files.decoder(home / "decoder", context_length=512)
    sources["onnx"] = f"{home / 'decoder'}/"
    sources["ctransformers"] = str(write_ggml(home / "m.bin", "llama", context_length=512))
    for name, source in sources.items():
        add(daemon, name, source, backend=name, chat_template=template)
