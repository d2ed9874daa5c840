"""A bounded reader of ONNX models: a folder with a graph, a tokenizer and configuration.

Owns which files of a folder make up the model, and what it is for. Knows no engine, and never
reads weights. Model files are untrusted: see `graph`, `protobuf` and `configs` for the bounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from backends import contract
from daemon.artifacts import InvalidModelFile
from daemon.artifacts.cursor import Reader
from daemon.artifacts.onnx import configs, genai, graph
from daemon.artifacts.onnx.configs import Configs
from daemon.artifacts.onnx.graph import Graph, Port

_PREFERRED = ("onnx/model.onnx", "model.onnx")
_ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Families whose positions are counted from the padding token's id + 1.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "xmod")
# Outputs that hold a vector for each text, and for each token of it, under their usual names.
_TEXT_OUTPUTS = ("sentence_embedding", "sentence_embeddings", "text_embeds")
_TOKEN_OUTPUTS = ("last_hidden_state", "token_embeddings", "hidden_states")
_LOGITS = "logits"
# Operators that round to 8 bits by the largest number of everything that is computed together.
_ROUNDING = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul"})


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxHeader:
    """What an ONNX model says about itself.

    `roles` has the name and role of each of its files: the .onnx file to open first, then its
    other weights, then its configuration. `metadata` is described at `Artifact`; its keys begin
    with `onnx.`, and `onnx.task` is `embed`, `rerank`, `classify` or `generate`.
    """

    architecture: str
    parameters: int
    quantization: str
    context_length: int
    chat_template: str
    weights_bytes: int
    metadata: dict[str, Any]
    roles: tuple[tuple[str, str], ...]


def read(
    folder: Path, names: Sequence[str], elsewhere: Mapping[str, Reader] | None = None
) -> OnnxHeader:
    """Return what the ONNX model in `folder` says; `names` are the files that may belong to it.

    Those that are `elsewhere` are read there: in the folder they only have their sizes.

    Blocks: reads the graph and some configuration, not the weights. When it returns, the data of
    each tensor lies inside a file of the model. Raises InvalidModelFile for everything else.
    """
    model = _choose(folder, names)
    found = Configs(folder, names, model)
    tokenizer_bytes = found.check_tokenizer()
    if elsewhere is not None:
        facts = graph.read_from(elsewhere[model], folder, model)
    else:
        facts = graph.read(folder, model)
    beside = PurePosixPath(model).parent
    external = sorted(str(beside / location) for location in facts.external)
    if missing := [name for name in external if name not in names]:
        raise InvalidModelFile(
            f"{model} needs {', '.join(missing)}, named like data of an ONNX model (.onnx_data, "
            ".onnx.data): export it with such a name, or import the folder that has it"
        )
    config = found.mapping("config.json")
    metadata = _told(_common(facts, config)) | {"onnx.tokenizer_bytes": tokenizer_bytes}
    if found.find(configs.GENAI):
        told = genai.read(found.mapping(configs.GENAI))
        metadata |= _told(told.metadata)
        context_length, architecture = told.context_length, told.architecture
        template = configs.chat_template(found)
    else:
        metadata = _told(_text_facts(model, facts, config, found)) | metadata
        context_length = _context_length(facts, config, found)
        architecture, template = str(config.get("model_type", "")), ""
    if not _ARCHITECTURE.fullmatch(architecture):
        architecture = "onnx"
    return OnnxHeader(
        architecture=architecture,
        parameters=facts.parameters,
        quantization=facts.quantization,
        context_length=context_length,
        chat_template=template,
        weights_bytes=facts.weights_bytes,
        metadata=metadata,
        roles=(
            (model, "weights"),
            *((name, "weights") for name in external),
            *((name, "config") for name in found.present()),
        ),
    )


def to_artifact(header: OnnxHeader, files: Sequence[contract.ModelFile]) -> contract.Artifact:
    """Return the artifact that consists of `files`, which are in the order of `header.roles`."""
    return contract.Artifact(
        format="onnx",
        files=tuple(files),
        architecture=header.architecture,
        parameters=header.parameters,
        quantization=header.quantization,
        context_length=header.context_length,
        weights_bytes=header.weights_bytes,
        chat_template=header.chat_template,
        metadata=header.metadata,
    )


def _told(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values without those that a file does not say, which are 0 or empty."""
    return {key: value for key, value in values.items() if value or value is False}


def _choose(folder: Path, names: Sequence[str]) -> str:
    """Return the .onnx file to open."""
    found = [name for name in names if name.endswith(".onnx")]
    if named := sorted(n for n in names if PurePosixPath(n).name == configs.GENAI):
        told = genai.read(Configs(folder, names, named[0]).mapping(configs.GENAI))
        model = str(PurePosixPath(named[0]).parent / told.file)
        if model not in names:
            raise InvalidModelFile(f"{named[0]} names {told.file}, which is not in the folder")
        return model
    for name in _PREFERRED:
        if name in found:
            return name
    if len(found) != 1:
        what = (
            f"holds several ONNX models, {', '.join(found[:10])}"
            if found
            else "holds no .onnx file"
        )
        raise InvalidModelFile(f"{folder.name} {what}: leave the one to use, or name it model.onnx")
    return found[0]


def _common(facts: Graph, config: dict[str, Any]) -> dict[str, Any]:
    """Return what every kind of model tells."""
    hidden = configs.count(config, "hidden_size", "d_model", "dim", "n_embd")
    return {
        "onnx.ir_version": facts.ir_version,
        "onnx.opset": facts.opset,
        "onnx.resident_bytes": facts.resident_bytes,
        "onnx.hidden_size": hidden,
        "onnx.layers": configs.count(config, "num_hidden_layers", "n_layers", "n_layer"),
        "onnx.heads": configs.count(config, "num_attention_heads", "n_heads", "n_head"),
        "onnx.intermediate_size": configs.count(config, "intermediate_size", "hidden_dim"),
        "onnx.vocabulary": configs.count(config, "vocab_size"),
        "onnx.pad_token_id": config.get("pad_token_id")
        if type(config.get("pad_token_id")) is int
        else 0,
    }


def _text_facts(model: str, facts: Graph, config: dict[str, Any], found: Configs) -> dict[str, Any]:
    """Return the task of a model that reads whole texts, and what that needs."""
    if "input_ids" not in (port.name for port in facts.inputs):
        inputs = ", ".join(port.name for port in facts.inputs[:10])
        raise InvalidModelFile(f"{model} takes {inputs}: only models with input_ids can be run")
    batch = _fixed(facts, 0)
    if batch > 1:
        raise InvalidModelFile(
            f"{model} always takes {batch} texts at once: export it with a dynamic batch size"
        )
    # An engine scales activations by the largest number of a whole batch: texts that are computed
    # together change each other's vectors (cosine 0.97 instead of 1 on all-MiniLM-L6-v2).
    alone = batch == 1 or not _ROUNDING.isdisjoint(facts.operators)
    shared = {"onnx.alone": alone, "onnx.fixed_length": _fixed(facts, 1)}
    logits = facts.output(_LOGITS)
    if logits is not None and _is_head(logits, config):
        return shared | _head(logits, config, found)
    if logits is not None and not any(facts.output(n) for n in _TEXT_OUTPUTS + _TOKEN_OUTPUTS):
        raise InvalidModelFile(
            f"{model} answers every token with logits: to generate text, export it for "
            "onnxruntime-genai (then it has a genai_config.json); other such models are not run"
        )
    return shared | _embedding(model, facts, found)


def _is_head(logits: Port, config: dict[str, Any]) -> bool:
    names = config.get("architectures")
    named = isinstance(names, list) and any("ForSequenceClassification" in str(n) for n in names)
    return named or (logits.shape is not None and len(logits.shape) == 2)


def _head(logits: Port, config: dict[str, Any], found: Configs) -> dict[str, Any]:
    """Return the facts of a sequence-classification head: one label ranks, several classify."""
    labels = configs.labels(config)
    width = logits.shape[-1] if logits.shape else -1
    if width < 1:
        width = len(labels) or configs.count(config, "num_labels") or 1
    if width > configs.MAX_LABELS:
        raise InvalidModelFile(f"{found.find('config.json')} has {width} labels: that is too many")
    if len(labels) != width:
        labels = [f"LABEL_{number}" for number in range(width)]
    return {
        "onnx.task": "rerank" if width == 1 else "classify",
        "onnx.output": logits.name,
        "onnx.labels": labels,
        "onnx.multi_label": config.get("problem_type") == "multi_label_classification",
    }


def _embedding(model: str, facts: Graph, found: Configs) -> dict[str, Any]:
    modules = found.modules()
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    facts_of = {
        "onnx.task": "embed",
        "onnx.normalize": not modules or "Normalize" in kinds,
        "onnx.hidden_size": max([0, *(port.shape[-1] for port in facts.outputs if port.shape)]),
    }
    for name in _TEXT_OUTPUTS:
        if facts.output(name):
            return facts_of | {"onnx.output": name, "onnx.pooling": "none"}
    if others := [k for k in kinds if k not in ("Transformer", "Pooling", "Normalize")]:
        raise InvalidModelFile(
            f"modules.json has the step {others[0]}, which is not in {model}: export the model "
            "with its sentence_embedding output"
        )
    output = next((n for n in _TOKEN_OUTPUTS if facts.output(n)), facts.outputs[0].name)
    shape = next(port.shape for port in facts.outputs if port.name == output)
    if shape is not None and len(shape) == 2:
        return facts_of | {"onnx.output": output, "onnx.pooling": "none"}
    if shape is not None and len(shape) != 3:
        raise InvalidModelFile(
            f"{model} has the output {output} of {len(shape)} dimensions: embeddings have 2 or 3"
        )
    pooling = "mean"
    for module, kind in zip(modules, kinds, strict=True):
        path = f"{module.get('path')}/config.json"
        if kind == "Pooling" and found.find(path):
            pooling = configs.pooling(found.mapping(path), path)
    if not modules and found.find(path := "1_Pooling/config.json"):
        pooling = configs.pooling(found.mapping(path), path)
    return facts_of | {"onnx.output": output, "onnx.pooling": pooling}


def _fixed(facts: Graph, axis: int) -> int:
    """Return a dimension of `input_ids` that the graph fixes; 0 for one that it does not."""
    for port in facts.inputs:
        if port.name == "input_ids" and port.shape is not None and len(port.shape) == 2:
            return max(0, port.shape[axis])
    return 0


def _context_length(facts: Graph, config: dict[str, Any], found: Configs) -> int:
    """Return the least of the lengths that the model's files give, in tokens; 0 for none."""
    positions = configs.count(config, "max_position_embeddings", "n_positions")
    if positions and config.get("model_type") in _OFFSET_POSITIONS:
        positions -= 1 + (configs.count(config, "pad_token_id") or 1)
    lengths = [
        positions,
        configs.count(found.mapping("sentence_bert_config.json"), "max_seq_length"),
        configs.count(found.mapping("tokenizer_config.json"), "model_max_length"),
        _fixed(facts, 1),
    ]
    return min((length for length in lengths if length > 0), default=0)
