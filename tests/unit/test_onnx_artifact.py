"""The reader of ONNX folders: what it says of real models, and what it refuses of damaged ones."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import onnx
import onnx_files
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import names, tensor, write_json

from daemon.artifacts import InvalidModelFile
from daemon.artifacts import onnx as reader
from daemon.artifacts.onnx import graph


def read(folder):
    return reader.read(folder, names(folder))


def refused(folder) -> str:
    with pytest.raises(InvalidModelFile) as error:
        read(folder)
    return error.value.message


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return onnx_files.embedder(tmp_path_factory.mktemp("minilm") / "model")


def test_an_embedder_says_how_it_pools_and_how_long_texts_may_be(embedder):
    header = read(embedder)
    assert header.architecture == "bert"
    assert header.context_length == 256  # sentence_bert_config.json; config.json says 512
    assert header.quantization == "INT8"
    told = {key.removeprefix("onnx."): value for key, value in header.metadata.items()}
    assert told["task"] == "embed"
    assert (told["pooling"], told["normalize"]) == ("mean", True)
    assert (told["hidden_size"], told["layers"], told["heads"]) == (384, 6, 12)
    assert (told["opset"], told["ir_version"]) == (17, 10)
    assert told["output"] == "last_hidden_state"


def test_files_are_in_the_order_in_which_an_engine_wants_them(embedder):
    roles = read(embedder).roles
    assert roles[:3] == (
        ("onnx/model.onnx", "weights"),
        ("tokenizer.json", "config"),
        ("config.json", "config"),
    )
    assert ("1_Pooling/config.json", "config") in roles
    assert len({name for name, _ in roles}) == len(roles) == 8


def test_sizes_and_ports_are_those_that_the_onnx_library_sees():
    path = onnx_files.minilm_graph()
    facts = graph.read(path.parent, path.name)
    model = onnx.load(path)
    arrays = [numpy_helper.to_array(entry) for entry in model.graph.initializer]
    assert facts.weights_bytes == sum(array.nbytes for array in arrays)
    weights = [a for a in arrays if a.dtype not in (np.int64, np.int32, np.bool_)]
    assert facts.parameters == sum(array.size for array in weights)
    for mine, theirs in ((facts.inputs, model.graph.input), (facts.outputs, model.graph.output)):
        assert [port.name for port in mine] == [port.name for port in theirs]
        assert [port.type for port in mine] == [p.type.tensor_type.elem_type for p in theirs]
    assert facts.outputs[0].shape == (-1, -1, 384)
    assert facts.operators == {node.op_type for node in model.graph.node}
    # its 8-bit weights are cast to 32 bits: every engine does that at once
    assert facts.resident_bytes > 3.9 * facts.weights_bytes


def test_one_label_ranks_and_several_classify(tmp_path):
    ranker = read(onnx_files.minilm_head(tmp_path / "one", {"0": "relevant"}))
    assert ranker.metadata["onnx.task"] == "rerank"
    assert ranker.context_length == 512
    labels = {"0": "good", "1": "bad", "2": "ugly"}
    config = {"problem_type": "multi_label_classification"}
    classifier = read(onnx_files.minilm_head(tmp_path / "three", labels, **config))
    assert classifier.metadata["onnx.task"] == "classify"
    assert classifier.metadata["onnx.labels"] == ["good", "bad", "ugly"]
    assert classifier.metadata["onnx.multi_label"] is True


def test_labels_that_do_not_fit_the_graph_are_numbered(tmp_path):
    folder = onnx_files.minilm_head(tmp_path / "m", {"0": "good", "1": "bad"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"id2label": {"0": "good"}})
    assert read(folder).metadata["onnx.labels"] == ["LABEL_0", "LABEL_1"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({}, "mean"),
    ],
)
def test_pooling_is_what_the_pooling_file_says(tmp_path, config, expected):
    folder = onnx_files.lookup(tmp_path / "m")
    write_json(folder / "1_Pooling/config.json", config)
    assert read(folder).metadata["onnx.pooling"] == expected


def test_pooling_of_two_kinds_is_refused(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m")
    config = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    write_json(folder / "1_Pooling/config.json", config)
    assert "cls + mean" in refused(folder)


def test_vectors_are_scaled_unless_the_modules_leave_that_out(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m")
    assert read(folder).metadata["onnx.normalize"] is True
    steps = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    write_json(folder / "modules.json", steps)
    assert read(folder).metadata["onnx.normalize"] is False
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    write_json(folder / "modules.json", [*steps, dense])
    assert "the step Dense" in refused(folder)


def test_positions_that_count_from_the_padding_are_fewer(tmp_path):
    given = {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    folder = onnx_files.lookup(tmp_path / "m", **given)
    (folder / "tokenizer_config.json").unlink()
    assert read(folder).context_length == 512


def test_a_graph_of_fixed_shape_says_so(tmp_path):
    header = read(onnx_files.lookup(tmp_path / "m", batch=1, length=32))
    assert header.context_length == 32
    assert (header.metadata["onnx.alone"], header.metadata["onnx.fixed_length"]) == (True, 32)
    assert "always takes 4 texts" in refused(onnx_files.lookup(tmp_path / "four", batch=4))


def test_a_graph_that_rounds_by_the_batch_computes_texts_alone(tmp_path):
    assert read(onnx_files.lookup(tmp_path / "a", dynamic=True)).metadata["onnx.alone"] is True
    assert read(onnx_files.lookup(tmp_path / "b")).metadata["onnx.alone"] is False


def test_sixteen_bit_weights_take_twice_their_size_on_a_cpu(tmp_path):
    folder = tmp_path / "m"
    onnx_files.tokenizer(folder)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    onnx_files.save(
        folder / "model.onnx",
        nodes,
        [tensor("input_ids", TensorProto.INT64, ["b", "s"])],
        [tensor("last_hidden_state", TensorProto.FLOAT16, ["b", "s", 8])],
        {"table": np.ones((100, 8), np.float16)},
    )
    header = read(folder)
    assert (header.weights_bytes, header.metadata["onnx.resident_bytes"]) == (1600, 3200)
    assert (header.parameters, header.quantization) == (800, "F16")
    assert header.metadata["onnx.hidden_size"] == 8  # of its output: there is no config.json


# which file


def test_of_several_graphs_the_one_named_model_is_opened(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m")
    shutil.copy(folder / "model.onnx", folder / "model_q4.onnx")
    assert read(folder).roles[0] == ("model.onnx", "weights")
    (folder / "model.onnx").rename(folder / "model_fp16.onnx")
    message = refused(folder)
    assert "model_fp16.onnx, model_q4.onnx" in message and "model.onnx" in message
    (folder / "model_q4.onnx").unlink()
    assert read(folder).roles[0] == ("model_fp16.onnx", "weights")


def test_a_folder_without_a_graph_or_tokenizer_is_refused(tmp_path):
    onnx_files.tokenizer(tmp_path / "m")
    assert "holds no .onnx file" in refused(tmp_path / "m")
    folder = onnx_files.lookup(tmp_path / "n")
    (folder / "tokenizer.json").write_text("[]")
    assert refused(folder) == "tokenizer.json is damaged: it is not a JSON object"
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(folder)


# data in other files


@pytest.fixture
def split(tmp_path):
    """A model whose weights are in a file beside it."""
    folder = onnx_files.lookup(tmp_path / "m", rows=1000)
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    return folder


def moved(folder, location: str) -> None:
    """Say that the weights are elsewhere."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in model.graph.initializer:
        for pair in entry.external_data:
            if pair.key == "location":
                pair.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_data_beside_the_graph_belongs_to_the_model(split):
    header = read(split)
    assert header.roles[:2] == (("model.onnx", "weights"), ("model.onnx_data", "weights"))
    assert header.weights_bytes == 1000 * 8 * 4


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b", "", "..\\b"])
def test_data_outside_the_folder_is_refused(split, location):
    moved(split, location)
    assert "only files beside the model are read" in refused(split)


def test_data_behind_a_link_that_leaves_the_folder_is_refused(split, tmp_path):
    (split / "model.onnx_data").rename(tmp_path / "elsewhere")
    (split / "model.onnx_data").symlink_to(tmp_path / "elsewhere")
    assert "leads out of its folder" in refused(split)


def test_data_that_is_missing_or_cut_short_is_named(split):
    data = split / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "does not fit model.onnx_data" in refused(split)
    data.unlink()
    assert "needs model.onnx_data" in refused(split)


# damaged files


@pytest.mark.parametrize(
    "content", [b"", b"GGUF\x03\0\0\0", b"<html>not found</html>", b"\xff" * 64]
)
def test_what_is_no_onnx_file_is_refused(tmp_path, content):
    folder = onnx_files.lookup(tmp_path / "m")
    (folder / "model.onnx").write_bytes(content)
    assert refused(folder).startswith("model.onnx is no ONNX file")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m", rows=4)
    whole = (folder / "model.onnx").read_bytes()
    assert read(folder).parameters == 32
    # the last part is the list of opsets, without which a graph can be read
    for length in range(whole.rindex(b"last_hidden_state")):
        (folder / "model.onnx").write_bytes(whole[:length])
        assert refused(folder).startswith("model.onnx ")


def test_damaged_bytes_never_do_more_than_refuse(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m", rows=4)
    whole = (folder / "model.onnx").read_bytes()
    source = random.Random(11)
    outcomes = set()
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        (folder / "model.onnx").write_bytes(damaged)
        try:
            read(folder)
        except InvalidModelFile:
            outcomes.add("refused")
        else:
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


def changed(folder, change) -> None:
    """Change the tensor of a graph that `lookup` wrote."""
    model = onnx.load(folder / "model.onnx")
    change(model.graph.initializer[0])
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.dims.__setitem__(0, 2**40), "needs"),
        (lambda t: t.dims.__setitem__(0, 2**62), "impossible dimensions"),
        (lambda t: t.dims.__setitem__(0, -1), "impossible dimensions"),
        (lambda t: t.dims.extend([1] * 40), "impossible dimensions"),
        (lambda t: setattr(t, "data_type", 99), "unknown type 99"),
        (lambda t: t.ClearField("raw_data"), "has no data"),
        (lambda t: setattr(t, "name", "x" * 5000), "5000 bytes"),
        (lambda t: t.string_data.extend([b"x"] * 10_001), "more than 10000 fields"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path, change, expected):
    folder = onnx_files.lookup(tmp_path / "m", rows=4)
    changed(folder, change)
    assert expected in refused(folder)


def test_graphs_nested_too_deep_are_refused(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m", rows=4)
    inner = b""
    for _ in range(40):  # graph{node{attribute{graph …
        for key in (0x32, 0x2A, 0x0A):
            inner = bytes([key]) + _varint(len(inner)) + inner
    (folder / "model.onnx").write_bytes(b"\x08\x08\x3a" + _varint(len(inner)) + inner)
    assert "nested more than" in refused(folder)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize("name", ["config.json", "modules.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("content", ["{", "[" * 100_000, " " * (1024 * 1024 + 1)])
def test_damaged_configuration_is_refused_by_name(tmp_path, name, content):
    folder = onnx_files.lookup(tmp_path / "m", rows=4)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    assert refused(folder).startswith(name)


def test_numbers_that_cannot_be_are_as_if_they_were_not_there(tmp_path):
    given = {"max_position_embeddings": -5, "num_hidden_layers": True, "num_attention_heads": "x"}
    header = read(onnx_files.lookup(tmp_path / "m", **given))
    assert header.context_length == 512  # tokenizer_config.json
    assert "onnx.layers" not in header.metadata and "onnx.heads" not in header.metadata


def test_a_graph_that_cannot_be_asked_in_words_is_refused(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m", rows=4)
    model = onnx.load(folder / "model.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "logits"
    onnx.save(model, folder / "model.onnx")
    assert "genai_config.json" in refused(folder)
    model.graph.input[0].name = "pixel_values"
    onnx.save(model, folder / "model.onnx")
    assert "pixel_values" in refused(folder)


# generation


@pytest.fixture
def decoder(tmp_path):
    return onnx_files.decoder(tmp_path / "m")


def told(folder, change) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    change(config)
    write_json(folder / "genai_config.json", config)


def test_a_decoder_says_what_generation_needs(decoder):
    header = read(decoder)
    assert header.metadata["onnx.task"] == "generate"
    assert header.metadata["onnx.eos_token_ids"] == [2]
    assert (header.metadata["onnx.kv_heads"], header.metadata["onnx.head_size"]) == (2, 4)
    assert header.context_length == 256
    assert "messages" in header.chat_template
    assert header.roles[0] == ("model.onnx", "weights")
    assert ("genai_config.json", "config") in header.roles


def test_the_graph_is_the_one_that_the_configuration_names(decoder):
    (decoder / "model.onnx").rename(decoder / "decoder.onnx")
    shutil.copy(decoder / "decoder.onnx", decoder / "model.onnx")
    told(decoder, lambda c: c["model"]["decoder"].update(filename="decoder.onnx"))
    assert read(decoder).roles[0] == ("decoder.onnx", "weights")
    told(decoder, lambda c: c["model"]["decoder"].update(filename="gone.onnx"))
    assert "gone.onnx, which is not in the folder" in refused(decoder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda c: c["model"]["decoder"]["session_options"].update(custom_ops_library="a.so"),
            "would load code",
        ),
        (lambda c: c["model"]["decoder"].update(filename="../m.onnx"), "no .onnx file beside it"),
        (lambda c: c["model"]["decoder"].update(filename="/m.onnx"), "no .onnx file beside it"),
        (lambda c: c["model"]["decoder"].update(pipeline=[{"a": {}}]), "no single graph"),
        (lambda c: c["model"].update(vision={"filename": "v.onnx"}), "part for vision"),
        (lambda c: c.update(model=[]), "no model.decoder"),
    ],
)
def test_a_configuration_that_asks_for_too_much_is_refused(decoder, change, expected):
    told(decoder, change)
    assert expected in refused(decoder)
