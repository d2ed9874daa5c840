"""What onnxruntime-genai's genai_config.json says of a model that generates text.

Owns what is refused of such a file: it can name libraries to load, and models made of several
graphs. Names are those of onnxruntime-genai (onnxruntime.ai/docs/genai/reference/config).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from daemon.artifacts import InvalidModelFile
from daemon.artifacts.onnx.configs import GENAI, count

_MAX_EOS = 64
_PARTS = ("encoder", "vision", "speech", "embedding")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenaiFacts:
    """`file` is the graph's, relative to the configuration."""

    file: str
    architecture: str
    context_length: int
    metadata: dict[str, Any]


def read(config: Mapping[str, Any]) -> GenaiFacts:
    """Return the facts of a decoder in one graph. Raises InvalidModelFile for anything else."""
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        raise InvalidModelFile(f"{GENAI} is damaged: it has no model.decoder")
    if parts := [part for part in _PARTS if model.get(part)]:
        raise InvalidModelFile(
            f"{GENAI} describes a model with a part for {parts[0]}: only text models are run"
        )
    _refuse_libraries(config)
    name = decoder.get("filename")
    if decoder.get("pipeline") or not isinstance(name, str):
        raise InvalidModelFile(f"{GENAI} names no single graph (model.decoder.filename)")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix != ".onnx" or "\\" in name:
        raise InvalidModelFile(f"{GENAI} names {name!r}: that is no .onnx file beside it")
    ends = model.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return GenaiFacts(
        file=str(path),
        architecture=str(model.get("type", "")),
        context_length=count(model, "context_length"),
        metadata={
            "onnx.task": "generate",
            "onnx.eos_token_ids": [e for e in ends if type(e) is int and e >= 0][:_MAX_EOS],
            "onnx.hidden_size": count(decoder, "hidden_size"),
            "onnx.layers": count(decoder, "num_hidden_layers"),
            "onnx.heads": count(decoder, "num_attention_heads"),
            "onnx.kv_heads": count(decoder, "num_key_value_heads"),
            "onnx.head_size": count(decoder, "head_size"),
            "onnx.vocabulary": count(model, "vocab_size"),
        },
    )


def _refuse_libraries(config: Any) -> None:
    """Refuse a configuration that would have the engine load code from somewhere."""
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                if "library" in str(key).lower() and inner:
                    raise InvalidModelFile(
                        f"{GENAI} is refused: {key} would load code out of {inner!r}; remove it"
                    )
            pending += value.values()
        elif isinstance(value, list):
            pending += value
