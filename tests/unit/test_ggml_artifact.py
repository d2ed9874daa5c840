"""GGML headers: what a file says, which architecture it is for, and what is refused."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest
from ggml_files import ARCHITECTURES, END, vocabulary, write_ggml

from backends.contract import ModelFile
from daemon.artifacts import InvalidModelFile, ggml, ggml_reading

OF_THE_SAME_LAYOUT = {"gpt2": "starcoder", "gpt_neox": "dolly-v2"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def damage(path: Path, at: int, value: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_told_by_its_file(path, architecture):
    header = ggml.read(write_ggml(path, architecture, layers=3, context_length=96))
    assert header.architecture == architecture
    assert header.quantization == "F32"
    assert header.weights_bytes == 4 * header.parameters
    assert header.metadata["ggml.layers"] == 3
    assert header.metadata["ggml.heads"] == 4
    assert header.metadata["ggml.embedding"] == 64
    assert header.metadata["ggml.vocabulary"] == len(vocabulary(architecture))
    unsaid = architecture in ("llama", "falcon")
    assert header.context_length == (2048 if unsaid else 96)
    size_bytes = path.stat().st_size
    assert size_bytes - 20_000 < header.weights_bytes < size_bytes


@pytest.mark.parametrize(
    ("file_type", "name", "bits"),
    [(1, "F16", 16), (2, "Q4_0", 4.5), (3, "Q4_1", 5), (7, "Q8_0", 8.5)],
)
def test_quantized_files_are_smaller_by_what_they_say(path, file_type, name, bits):
    header = ggml.read(write_ggml(path, "gptj", file_type=file_type))
    assert header.quantization == name
    assert header.metadata["ggml.quantization_version"] == (2 if file_type > 1 else 0)
    matrices = sum(64 * n for n in (264, 264, *(2 * [64] * 4), *(2 * [256] * 2)))
    vectors_bytes = 4 * (header.parameters - matrices)
    assert header.weights_bytes == vectors_bytes + matrices * bits / 8


def test_a_head_that_is_the_embedding_is_counted_for_what_engines_copy(path):
    whole = ggml.read(write_ggml(path, "gpt2"))
    tied = ggml.read(write_ggml(path, "gpt2", leave_out="model/lm_head"))
    assert whole.metadata["ggml.tied_bytes"] == 0
    assert tied.metadata["ggml.tied_bytes"] == 4 * 64 * len(vocabulary("gpt2"))
    assert whole.parameters - tied.parameters == 64 * len(vocabulary("gpt2"))


@pytest.mark.parametrize(("marked", "plain"), [("starcoder", "gpt2"), ("dolly-v2", "gpt_neox")])
def test_of_two_with_one_layout_the_vocabulary_decides_and_the_catalog_can(path, marked, plain):
    write_ggml(path, plain, tokens=vocabulary(plain))
    assert ggml.read(path).architecture == plain
    assert ggml.read(path, marked).architecture == marked
    write_ggml(path, plain, tokens=vocabulary(marked))
    assert ggml.read(path).architecture == marked
    assert ggml.read(path, plain).architecture == plain


@pytest.mark.parametrize(
    ("said", "architecture"),
    [("gpt_bigcode", "starcoder"), ("GPT-2", "gpt2"), ("Dolly_V2", "dolly-v2"), ("mpt", "mpt")],
)
def test_names_of_architectures_are_taken_in_any_spelling(path, said, architecture):
    assert ggml.read(write_ggml(path, architecture), said).architecture == architecture


def test_an_architecture_that_the_file_does_not_fit_is_refused(path):
    write_ggml(path, "gpt2")
    with pytest.raises(InvalidModelFile, match=r"model\.bin .*as the architecture field says"):
        ggml.read(path, "gptj")
    with pytest.raises(InvalidModelFile, match=r"said to be for 'bloom'.*gpt2, starcoder"):
        ggml.read(path, "bloom")


def test_the_artifact_has_the_file_and_its_facts(path):
    header = ggml.read(write_ggml(path, "mpt"))
    file = ModelFile(path=str(path), size_bytes=1, mtime_ns=2, sha256="3")
    artifact = ggml.to_artifact(header, [file])
    assert (artifact.format, artifact.architecture, artifact.files) == ("ggml", "mpt", (file,))
    assert artifact.chat_template == ""
    assert ggml.to_artifact(header, [file], "{{ 1 }}").chat_template == "{{ 1 }}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ggml_files_are_known_by_their_first_bytes(path, architecture):
    assert ggml.is_ggml(write_ggml(path, architecture))


@pytest.mark.parametrize("start", [b"", b"GGUF", b"ggml", b"lmg", b"PK\x03\x04"])
def test_other_files_are_not_ggml(path, start):
    path.write_bytes(start)
    assert not ggml.is_ggml(path)
    with pytest.raises(InvalidModelFile, match="not a GGML file"):
        ggml.read(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_cut_short_anywhere_is_refused(path, architecture):
    raw = write_ggml(path, architecture, layers=1, embedding=32).read_bytes()
    for size in random.Random(1).sample(range(len(raw)), 30) + [len(raw) - 1]:
        path.write_bytes(raw[:size])
        with pytest.raises(InvalidModelFile, match=r"^model\.bin "):
            ggml.read(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_damage_to_a_header_does_anything_but_a_clear_refusal(path, architecture):
    raw = write_ggml(path, architecture, layers=1, embedding=32, tokens=None).read_bytes()
    chance = random.Random(2)
    for _ in range(80):
        torn = bytearray(raw)
        at = chance.choice(
            (chance.randrange(48), chance.randrange(4000), chance.randrange(len(raw)))
        )
        value = chance.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, chance.getrandbits(32)))
        torn[at : at + 4] = struct.pack("<I", value)
        path.write_bytes(torn)
        try:
            header = ggml.read(path)
        except InvalidModelFile as error:
            assert str(error).startswith("model.bin ")
        else:  # it hit what is not checked: a weight, a token, a score
            assert header.weights_bytes < len(raw)


def test_the_closest_layout_explains_what_is_wrong(path):
    write_ggml(path, "gpt2", leave_out="model/h1/mlp/c_fc/w")
    with pytest.raises(
        InvalidModelFile, match=r"1 of its 29 tensors.*h1/mlp/c_fc/w.*gpt2"
    ) as error:
        ggml.read(path)
    assert "resembles most" in str(error.value)


def test_a_file_of_something_else_that_begins_alike_is_refused(path):
    """Whisper's and others' files are of the same time and have the same magic."""
    path.write_bytes(b"lmgg" + bytes(4096))
    with pytest.raises(InvalidModelFile, match="no architecture.*gpt2.*replit"):
        ggml.read(path)


def test_a_tensor_that_nobody_knows_is_named(path):
    raw = write_ggml(path, "gptj").read_bytes()
    path.write_bytes(raw + struct.pack("<4i", 1, 5, 0, 4) + b"extra" + bytes(16))
    with pytest.raises(InvalidModelFile, match="unknown tensor 'extra'"):
        ggml.read(path)


def test_a_tensor_with_many_dimensions_never_gets_to_an_engine(path):
    """It would write over the engine's stack."""
    raw = write_ggml(path, "gpt2").read_bytes()
    path.write_bytes(raw + struct.pack("<3i100i", 100, 5, 0, *[1] * 100) + b"extra")
    with pytest.raises(InvalidModelFile, match="100 dimensions"):
        ggml.read(path)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        (0, 0, "vocabulary is 0"),
        (0, 2**31 - 1, "vocabulary is 2147483647"),
        (1, 0, "context is 0"),
        (2, 65, "4 heads cannot share an embedding of 65"),
        (3, 0, "heads is 0"),
        (4, 2**20, "layers is 1048576"),
        (5, 99, "type is 99"),
    ],
)
def test_numbers_that_cannot_be_are_named(path, field, value, problem):
    write_ggml(path, "gpt2")
    damage(path, 4 + 4 * field, struct.pack("<i", value))
    with pytest.raises(InvalidModelFile, match=problem):
        ggml.read(path, "gpt2")


def test_a_cache_that_overflows_the_engine_s_integers_is_refused(path):
    write_ggml(path, "gptj", layers=1)
    damage(path, 8, struct.pack("<i", 4 * 1024 * 1024))
    damage(path, 20, struct.pack("<i", 1024))
    with pytest.raises(InvalidModelFile, match="31 bits"):
        ggml.read(path, "gptj")


@pytest.mark.parametrize(
    ("architecture", "kind", "changes"),
    [
        ("llama", 2, {"magic": (0x67676A74, 2)}),
        ("llama", 3, {"magic": (0x67676A74, 1)}),
    ],
)
def test_quantization_of_before_it_was_settled_is_refused(path, architecture, kind, changes):
    write_ggml(path, architecture, file_type=kind, **changes)
    with pytest.raises(InvalidModelFile, match="would misread.*GGUF"):
        ggml.read(path)


def test_unquantized_llama_files_of_all_versions_are_read(path):
    for version in (1, 2, 3):
        write_ggml(path, "llama", magic=(0x67676A74, version))
        assert ggml.read(path).metadata["ggml.container"] == f"ggjt v{version}"
    write_ggml(path, "llama", magic=(0x67676A74, 4))
    with pytest.raises(InvalidModelFile, match="ggjt file of version 4"):
        ggml.read(path)


def test_an_endless_token_is_refused(path):
    write_ggml(
        path, "gpt2", tokens=[*vocabulary("gpt2"), b"x" * (ggml_reading.MAX_TOKEN_BYTES + 1)]
    )
    with pytest.raises(InvalidModelFile, match="token 264 is 4097 bytes long"):
        ggml.read(path)


def test_a_vocabulary_of_fewer_tokens_than_engines_ask_for_is_refused(path):
    write_ggml(path, "gpt2", tokens=[b"a", b"b", END])
    with pytest.raises(InvalidModelFile, match="only 3 tokens"):
        ggml.read(path, "gpt2")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    for name, problem in (("pipe.bin", "not a regular file"), ("none.bin", "No such file")):
        with pytest.raises(InvalidModelFile, match=f"{name} .*{problem}"):
            ggml.read(tmp_path / name)
    with pytest.raises(InvalidModelFile, match="none.bin cannot be read"):
        ggml.is_ggml(tmp_path / "none.bin")
