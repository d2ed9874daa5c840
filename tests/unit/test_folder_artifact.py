"""Which files of a folder are taken, and what model they make up, by their headers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ggml_files import write_ggml
from gguf_files import F16, MINIMAL, Q8_0, Tensor, write_gguf

from backends.contract import Artifact, ModelFile
from daemon.artifacts import InvalidModelFile, folder
from daemon.errors import InvalidRequest

WEIGHT = (Tensor(dimensions=(32, 4), type=Q8_0),)
CLIP = {"general.architecture": "clip", "clip.has_vision_encoder": True}
LORA = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}


def gguf(path: Path, metadata: dict[str, Any] = MINIMAL, size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_gguf(path, metadata, (Tensor(dimensions=(32, size), type=Q8_0),))


def part(root: Path, stem: str, number: int, count: int, tensors: int | None = None) -> Path:
    """Write a part as llama.cpp's gguf-split does: only the first has the model's metadata."""
    split = {
        "split.no": number - 1,
        "split.count": count,
        "split.tensors.count": count if tensors is None else tensors,
    }
    metadata = {"llama.context_length": 99, **MINIMAL} if number == 1 else {}
    return gguf(root / f"{stem}-{number:05}-of-{count:05}.gguf", metadata | split)


def read(root: Path) -> Artifact:
    """Return the artifact of a whole folder, as an import makes it."""
    seen = folder.scan(root)
    model = folder.read(root, list(seen))
    files = tuple(
        ModelFile(
            path=str(root / name),
            size_bytes=seen[name].st_size,
            mtime_ns=seen[name].st_mtime_ns,
            sha256="",
            role=role,
        )
        for name, role in model.roles
    )
    return model.describe(files)


def roles(root: Path) -> list[tuple[str, str]]:
    return [(os.path.relpath(file.path, root), file.role) for file in read(root).files]


def problem(root: Path) -> str:
    with pytest.raises((InvalidModelFile, InvalidRequest)) as caught:
        read(root)
    return caught.value.message


# which files there are


def test_only_visible_regular_files_of_known_suffixes_are_taken(tmp_path):
    taken = [
        "a.gguf",
        "a.bin",
        "model.onnx",
        "model.onnx_data",
        "model.onnx_data_1",
        "model.onnx.data",
        "sub/config.json",
        "sub/deeper/merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "UPPER.GGUF",
    ]
    others = [
        "model.safetensors",
        "setup.py",
        "README.md",
        "gguf",
        ".hidden.gguf",
        ".git/config.json",
        "sub/.cache/a.gguf",
        "a.gguf.part",
    ]
    for name in taken + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    (tmp_path / "folder.gguf").mkdir()

    seen = folder.scan(tmp_path)

    assert list(seen) == sorted(taken)
    assert all(facts.st_size == 1 for facts in seen.values())


def test_links_are_followed_inside_the_folder_and_never_out_of_it(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    (root / "blobs").mkdir(parents=True)
    (outside / "secret.json").write_text("{}")
    gguf(root / "blobs" / "0123")
    (root / "named.gguf").symlink_to("blobs/0123")
    (root / "out.json").symlink_to(outside / "secret.json")
    (root / "also-out.json").symlink_to("../outside/secret.json")
    (root / "linked").symlink_to(outside)
    (root / "again").symlink_to(".")
    (root / "dangling.json").symlink_to("nothing")

    assert list(folder.scan(root)) == ["named.gguf"]
    assert roles(root) == [("named.gguf", "weights")]


def test_a_folder_of_nothing_but_links_out_says_so(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "m.gguf").symlink_to(gguf(tmp_path / "m.gguf"))

    message = problem(tmp_path / "model")

    assert "m.gguf in" in message and "lead out of it" in message and "cp -rL" in message


def test_a_link_out_beside_a_model_is_not_left_out_silently(tmp_path):
    """Such as an image encoder: the model would be blind, and nobody would know why."""
    (tmp_path / "model").mkdir()
    gguf(tmp_path / "model" / "m.gguf")
    (tmp_path / "model" / "mmproj.gguf").symlink_to(gguf(tmp_path / "e.gguf"))
    assert "mmproj.gguf in" in problem(tmp_path / "model")


@pytest.mark.parametrize("make", ["nothing", "others"])
def test_a_folder_without_a_model_says_what_is_read(tmp_path, make):
    if make == "others":
        (tmp_path / "model.safetensors").write_bytes(b"x")
    message = problem(tmp_path)
    assert str(tmp_path) in message
    assert all(word in message for word in ("holds no model", "GGUF", "GGML", "ONNX"))


def test_there_are_bounds_on_what_is_looked_at(tmp_path, monkeypatch):
    for number in range(4):
        gguf(tmp_path / f"{number}.gguf")
    monkeypatch.setattr(folder, "MAX_FILES", 3)
    assert "4 files that may be part of a model, and at most 3 are taken" in problem(tmp_path)
    monkeypatch.setattr(folder, "MAX_ENTRIES", 3)
    assert "more than 3 entries" in problem(tmp_path)


def test_folders_in_folders_have_a_bound(tmp_path):
    gguf(tmp_path / "1/2/3/4/5/6/7/m.gguf")
    assert roles(tmp_path) == [("1/2/3/4/5/6/7/m.gguf", "weights")]
    gguf(tmp_path / "1/2/3/4/5/6/7/8/m.gguf")
    assert "over 8 deep (1/2/3/4/5/6/7/8)" in problem(tmp_path)


@pytest.mark.parametrize("name", [b"new\nline.gguf", b"not\xffutf8.gguf", b"x" * 250 + b".gguf"])
def test_a_name_that_cannot_be_used_is_refused(tmp_path, name):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"GGUF")
    message = problem(tmp_path)
    assert "no usable name" in message and message.isprintable()


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "../x.json", "a/../x.json", "a//b", "a/", "./a", "a\0b"]
)
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(InvalidRequest):
        folder.relative_name(name)


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    assert f"cannot read {tmp_path / 'gone'}: No such file" in problem(tmp_path / "gone")


# GGUF: parts, encoders, adapters


def test_the_header_decides_what_a_file_is_for(tmp_path):
    model = gguf(tmp_path / "mmproj-adapter.gguf", MINIMAL | {"modeld.mmproj_bytes": 10**15}, 8)
    gguf(tmp_path / "b.gguf", LORA, 1)
    gguf(tmp_path / "a.gguf", LORA, 2)
    gguf(tmp_path / "big-model.gguf", CLIP, 16)
    (tmp_path / "config.json").write_text("{}")  # GGUF files need none

    artifact = read(tmp_path)

    assert roles(tmp_path) == [
        (model.name, "weights"),
        ("big-model.gguf", "mmproj"),
        ("a.gguf", "adapter"),
        ("b.gguf", "adapter"),
    ]
    assert artifact.path == str(model)
    assert artifact.architecture == "llama"
    assert (artifact.parameters, artifact.weights_bytes) == (32 * 8, 34 * 8)
    assert artifact.metadata["modeld.mmproj_bytes"] == 34 * 16
    assert artifact.metadata["modeld.adapter_bytes"] == 34 * 3


def test_what_is_not_there_is_not_counted(tmp_path):
    gguf(tmp_path / "m.gguf", MINIMAL | {"modeld.adapter_bytes": 7})
    own = {"modeld.layer_bytes", "modeld.embedding_bytes", "modeld.output_bytes"}
    assert {key for key in read(tmp_path).metadata if key.startswith("modeld.")} == own


def test_a_table_of_tokens_that_is_the_last_matrix_too_counts_as_one(tmp_path):
    table = Tensor(name="token_embd.weight", dimensions=(32, 64), type=Q8_0)
    output = Tensor(name="output.weight", dimensions=(32, 64), type=Q8_0)
    write_gguf(tmp_path / "tied.gguf", MINIMAL, [table])
    tied = folder.read(tmp_path, ["tied.gguf"]).describe(())
    assert tied.metadata["modeld.matrix_bytes.Q8_0"] == 34 * 64
    write_gguf(tmp_path / "own.gguf", MINIMAL, [table, output])
    own = folder.read(tmp_path, ["own.gguf"]).describe(())
    assert own.metadata["modeld.matrix_bytes.Q8_0"] == 34 * 64


def test_what_decides_the_size_of_an_image_is_kept(tmp_path):
    gguf(tmp_path / "m.gguf")
    facts = {"clip.projector_type": "mlp", "clip.vision.image_size": 336}
    facts |= {"clip.vision.patch_size": 14, "clip.vision.image_mean": [0.5]}
    gguf(tmp_path / "e.gguf", CLIP | facts, 16)
    metadata = read(tmp_path).metadata
    assert metadata["modeld.mmproj.projector_type"] == "mlp"
    assert metadata["modeld.mmproj.image_size"] == 336
    assert metadata["modeld.mmproj.patch_size"] == 14
    assert "modeld.mmproj.image_mean" not in metadata


def test_a_newer_image_encoder_says_so_by_its_type(tmp_path):
    gguf(tmp_path / "m.gguf")
    gguf(tmp_path / "e.gguf", {"general.architecture": "other", "general.type": "mmproj"})
    assert roles(tmp_path) == [("m.gguf", "weights"), ("e.gguf", "mmproj")]


def test_the_parts_of_a_model_are_one_model(tmp_path):
    for number in (3, 1, 2):
        part(tmp_path / "sub", "m", number, 3)
    gguf(tmp_path / "e.gguf", CLIP)

    artifact = read(tmp_path)

    names = [f"sub/m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert roles(tmp_path) == [*((name, "weights") for name in names), ("e.gguf", "mmproj")]
    assert (artifact.architecture, artifact.context_length) == ("llama", 99)
    assert (artifact.parameters, artifact.weights_bytes) == (3 * 128, 3 * 136)
    assert artifact.quantization == "Q8_0"


def test_a_first_part_may_have_no_tensors(tmp_path):
    split = {"split.count": 2, "split.tensors.count": 1}
    write_gguf(tmp_path / "m-00001-of-00002.gguf", MINIMAL | split | {"split.no": 0})
    write_gguf(
        tmp_path / "m-00002-of-00002.gguf",
        split | {"split.no": 1},
        [Tensor(dimensions=(8, 8), type=F16)],
    )
    artifact = read(tmp_path)
    assert (artifact.quantization, artifact.parameters) == ("F16", 64)


@pytest.mark.parametrize("present", [(1, 3), (2,), (2, 3), (1,)])
def test_missing_parts_are_named(tmp_path, present):
    for number in present:
        part(tmp_path, "m", number, 3)
    message = problem(tmp_path)
    assert f"holds {len(present)} of the 3 parts" in message
    for number in (1, 2, 3):
        assert (f"m-0000{number}-of-00003.gguf" in message) is (
            number not in present or len(present) == 1
        )


def test_parts_of_another_model_are_noticed(tmp_path):
    part(tmp_path, "m", 1, 2, tensors=5)
    part(tmp_path, "m", 2, 2)
    assert "5 tensors, and its 2 parts have 2" in problem(tmp_path)


def test_a_part_under_another_name_could_not_be_found_by_an_engine(tmp_path):
    part(tmp_path, "m", 1, 2)
    part(tmp_path, "m", 2, 2).rename(tmp_path / "second.gguf")
    message = problem(tmp_path)
    assert message.startswith("second.gguf is part 2 of 2")
    assert "rename it so that it ends in -00002-of-00002.gguf" in message


@pytest.mark.parametrize("split", [{"split.no": 2}, {"split.count": 65535}, {"split.count": 2.5}])
def test_impossible_parts_are_damage(tmp_path, split):
    gguf(tmp_path / "m.gguf", MINIMAL | {"split.no": 0, "split.count": 2} | split)
    assert problem(tmp_path).startswith("m.gguf is damaged: it says that it is part")


def test_a_split_of_one_is_an_ordinary_file(tmp_path):
    gguf(tmp_path / "m.gguf", MINIMAL | {"split.no": 0, "split.count": 1})
    assert roles(tmp_path) == [("m.gguf", "weights")]


def test_several_language_models_are_listed(tmp_path):
    gguf(tmp_path / "b.gguf")
    gguf(tmp_path / "a.gguf")
    part(tmp_path, "m", 1, 2)
    part(tmp_path, "m", 1, 3)
    message = problem(tmp_path)
    listed = "a.gguf, b.gguf, m-00001-of-00002.gguf, m-00001-of-00003.gguf"
    assert f"holds several models: {listed};" in message and "its own path" in message


def test_an_error_does_not_list_everything(tmp_path):
    for number in range(30):
        gguf(tmp_path / f"{number:02}.gguf")
    assert "08.gguf, 09.gguf and 20 more;" in problem(tmp_path)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"e.gguf": CLIP}, ["no language model", "e.gguf is an image encoder"]),
        ({"l.gguf": LORA}, ["no language model", "l.gguf is an adapter"]),
        ({"m.gguf": MINIMAL, "e.gguf": CLIP, "f.gguf": CLIP}, ["several image", "e.gguf, f.gguf"]),
        (
            {"m.gguf": MINIMAL, "l.gguf": LORA | {"general.architecture": "gemma"}},
            ["l.gguf is an adapter for 'gemma'", "'llama'"],
        ),
        (
            {"m.gguf": MINIMAL, "l.gguf": LORA | {"adapter.type": "ia3"}},
            ["l.gguf is an adapter of type 'ia3'"],
        ),
        (
            {"m.gguf": MINIMAL, "imatrix.gguf": {"general.type": "imatrix"}},
            ["imatrix.gguf is an importance matrix"],
        ),
        ({"m.gguf": MINIMAL, "x.gguf": {}}, ["x.gguf does not say which architecture"]),
    ],
)
def test_files_that_make_no_model_say_why(tmp_path, others, words):
    for name, metadata in others.items():
        gguf(tmp_path / name, metadata)
    message = problem(tmp_path)
    assert all(word in message for word in words), message


def test_a_damaged_file_is_named(tmp_path):
    gguf(tmp_path / "m.gguf")
    gguf(tmp_path / "e.gguf", CLIP)
    os.truncate(tmp_path / "e.gguf", 60)
    assert problem(tmp_path).startswith("e.gguf is truncated")


# other formats


def test_two_formats_in_one_folder_are_two_models(tmp_path):
    gguf(tmp_path / "m.gguf")
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08")
    message = problem(tmp_path)
    assert "several formats: m.gguf (GGUF), m.onnx (ONNX)" in message


@pytest.mark.parametrize("name", ["archive.zip", "pytorch_model.bin", "config.json"])
def test_a_file_of_no_known_format_says_which_are_known(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(InvalidModelFile) as caught:
        folder.read(tmp_path, [name])
    message = caught.value.message
    assert message.startswith(f"{name} holds no model of a known format")
    assert all(word in message for word in ("GGUF", "GGML", "ONNX"))


def test_a_file_is_known_by_its_first_bytes_whatever_its_name(tmp_path):
    gguf(tmp_path / "0123abcd")
    assert folder.read(tmp_path, ["0123abcd"]).roles == (("0123abcd", "weights"),)


def test_a_ggml_file_is_known_among_others_of_its_suffix(tmp_path):
    write_ggml(tmp_path / "ggml-model.bin")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert roles(tmp_path) == [("ggml-model.bin", "weights")]
    assert (read(tmp_path).format, read(tmp_path).architecture) == ("ggml", "gpt2")


def test_the_configuration_beside_a_ggml_file_says_its_architecture(tmp_path):
    write_ggml(tmp_path / "m.bin", "gpt_neox")
    (tmp_path / "config.json").write_text('{"model_type": "gpt-neox"}')
    assert roles(tmp_path) == [("m.bin", "weights"), ("config.json", "config")]
    assert read(tmp_path).architecture == "gpt_neox"
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert problem(tmp_path).startswith("m.bin ")
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert problem(tmp_path).startswith("config.json cannot be read as JSON")


def test_several_ggml_files_are_several_models(tmp_path):
    for name in ("a.bin", "b.ggml"):
        write_ggml(tmp_path / name)
    assert "holds several models: a.bin, b.ggml;" in problem(tmp_path)


def test_a_configuration_file_has_a_bound(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10**12)
    message = problem(tmp_path)
    assert "tokenizer.json has 1,000,000,000,000 bytes, and at most 67,108,864" in message
