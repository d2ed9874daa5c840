"""Headers read from wherever they are: bytes that come in pieces, or not at all."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from ggml_files import write_ggml
from gguf_files import Tensor, write_gguf

from backends.contract import ModelFile
from daemon.artifacts import InvalidModelFile, cursor, folder, ggml, gguf
from daemon.artifacts.cursor import Cursor, OpenFile, read_at_least
from daemon.errors import DownloadFailed

NAME = "far.gguf"
WORDS = [f"word {number}" for number in range(50_000)]
METADATA = {
    "general.architecture": "llama",
    "llama.context_length": 2048,
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.chat_template": "{{ messages }}" * 30_000,
}


class Far:
    """A Reader of `raw`, of which it gives at most `most(count)` bytes at a time."""

    def __init__(
        self, raw: bytes, most: Callable[[int], int] = lambda count: count, size: int | None = None
    ) -> None:
        self.size_bytes = len(raw) if size is None else size
        self.asked: list[tuple[int, int]] = []
        self._raw = raw
        self._most = most

    def read_at(self, offset: int, count: int) -> bytes:
        self.asked.append((offset, count))
        return self._raw[offset : offset + min(count, self._most(count))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / NAME, METADATA, [Tensor(dimensions=(256, 40))])


@pytest.mark.parametrize("most", [1, 7, 4096, 10**9])
def test_a_header_in_pieces_says_what_the_file_does(path: Path, most: int) -> None:
    raw = path.read_bytes() if most > 1 else write_gguf(path).read_bytes()

    assert gguf.read_from(Far(raw, lambda _: most), NAME) == gguf.read(path)


def test_pieces_of_any_size_come_together(path: Path) -> None:
    dice = random.Random(3)
    far = Far(path.read_bytes(), lambda count: dice.randint(1, count))

    assert gguf.read_from(far, NAME) == gguf.read(path)
    assert all(0 < count <= 512 * 1024 for _, count in far.asked)


def test_a_header_is_read_once_and_forwards(path: Path) -> None:
    far = Far(path.read_bytes())

    gguf.read_from(far, NAME)

    offsets = [offset for offset, _ in far.asked]
    assert offsets == sorted(offsets)
    assert len(offsets) < 10


def test_nothing_after_the_header_is_wanted(tmp_path: Path) -> None:
    header = write_gguf(tmp_path / NAME, METADATA, [Tensor(dimensions=(1024, 10**6))], data=b"")
    size = header.stat().st_size
    far = Far(header.read_bytes() + bytes(10**6), size=size + 64 + 4 * 1024 * 10**6)

    assert gguf.read_from(far, NAME).weights_bytes == 4 * 1024 * 10**6
    assert max(offset for offset, _ in far.asked) < size


def test_the_real_size_bounds_what_a_header_may_claim(path: Path) -> None:
    raw = path.read_bytes()

    with pytest.raises(InvalidModelFile, match=r"far\.gguf is truncated: .* bytes, the file has"):
        gguf.read_from(Far(raw, size=len(raw) - 1), NAME)


@pytest.mark.parametrize("kept", [0, 3, 10, 5000, 300_000])
def test_bytes_that_end_before_the_file_does_are_a_file_that_became_shorter(
    path: Path, kept: int
) -> None:
    raw = path.read_bytes()

    with pytest.raises(InvalidModelFile, match=r"far\.gguf has become shorter while it was read"):
        gguf.read_from(Far(raw[:kept], size=len(raw)), NAME)


@pytest.mark.parametrize("error", [DownloadFailed("the line is dead"), OSError(5, "I/O error")])
def test_what_the_reader_raises_passes_through(path: Path, error: Exception) -> None:
    class Broken(Far):
        def read_at(self, offset: int, count: int) -> bytes:
            if offset:
                raise error
            return super().read_at(offset, count)

    with pytest.raises(type(error)) as caught:
        gguf.read_from(Broken(path.read_bytes()), NAME)
    assert caught.value is error


def test_a_header_elsewhere_is_no_longer_than_one_here(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor, "MAX_HEADER_BYTES", 100_000)

    with pytest.raises(InvalidModelFile, match="its header would be longer than 100000 bytes"):
        gguf.read_from(Far(path.read_bytes()), NAME)


def test_a_file_here_is_read_like_one_elsewhere(path: Path) -> None:
    with path.open("rb") as file:
        reader = OpenFile(descriptor=file.fileno(), size_bytes=os.fstat(file.fileno()).st_size)

        assert reader.read_at(0, 4) == b"GGUF"
        assert reader.read_at(reader.size_bytes, 4) == b""
        assert Cursor(reader, NAME).size == path.stat().st_size
        assert gguf.read_from(reader, NAME) == gguf.read(path)


def test_at_least_what_is_needed_is_read_and_no_more_than_is_allowed() -> None:
    raw = bytes(range(100))

    assert read_at_least(Far(raw, lambda _: 3), 10, 7, 50) == raw[10:19]
    assert read_at_least(Far(raw, lambda _: 3), 10, 7, 8) == raw[10:18]
    assert read_at_least(Far(raw), 10, 7, 50) == raw[10:60]
    assert read_at_least(Far(raw), 98, 7, 50) == raw[98:]
    assert read_at_least(Far(raw), 100, 7, 50) == b""


@pytest.mark.parametrize("architecture", ["gpt2", "mpt", "llama", "falcon"])
@pytest.mark.parametrize("most", [5, 10**9])
def test_a_ggml_file_in_pieces_says_what_the_file_does(
    tmp_path: Path, architecture: str, most: int
) -> None:
    path = write_ggml(tmp_path / "far.bin", architecture)
    raw = path.read_bytes()

    assert ggml.read_from(Far(raw, lambda _: most), "far.bin") == ggml.read(path)
    with pytest.raises(InvalidModelFile, match=r"far\.bin has become shorter"):
        ggml.read_from(Far(raw[: len(raw) // 2], lambda _: most, len(raw)), "far.bin")


# several files


def far(path: Path) -> Far:
    return Far(path.read_bytes())


def test_the_parts_and_the_encoder_of_a_model_come_together(tmp_path: Path) -> None:
    parts = [f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    split = [{"split.no": number, "split.count": 2} for number in (0, 1)]
    write_gguf(tmp_path / parts[0], METADATA | split[0], [Tensor(name="token_embd.weight")])
    write_gguf(tmp_path / parts[1], split[1], [Tensor(name="blk.0.a.weight")])
    write_gguf(tmp_path / "eye.gguf", {"general.architecture": "clip"}, [Tensor()])
    names = [*parts, "eye.gguf"]
    files = tuple(ModelFile(path=n, size_bytes=1, mtime_ns=0, sha256="") for n in names)

    here = folder.read(tmp_path, names)
    there = folder.read_from({name: far(tmp_path / name) for name in reversed(names)})

    assert there.roles == here.roles
    assert [role for _, role in there.roles] == ["weights", "weights", "mmproj"]
    assert there.describe(files) == here.describe(files)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    name = "m-00001-of-00002.gguf"
    write_gguf(tmp_path / name, METADATA | {"split.no": 0, "split.count": 2}, [Tensor()])

    with pytest.raises(InvalidModelFile, match=r"1 of the 2 parts .* m-00002-of-00002\.gguf"):
        folder.read_from({name: far(tmp_path / name)})


def test_a_ggml_file_takes_the_architecture_that_the_catalog_says(tmp_path: Path) -> None:
    path = write_ggml(tmp_path / "far.bin", "gpt2")
    file = ModelFile(path="far.bin", size_bytes=1, mtime_ns=0, sha256="")

    model = folder.read_from({"far.bin": far(path)}, "starcoder")

    assert model.describe((file,)).architecture == "starcoder"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"x.gguf": b"<html>"}, "x.gguf is not a GGUF file: it begins with b'<htm'"),
        ({"x.gguf": b""}, "x.gguf is not a GGUF file: it is empty"),
        ({"x.bin": b"<html>"}, "x.bin holds no model of a known format: modeld reads GGUF"),
        ({"x.bin": b"G"}, "x.bin holds no model of a known format"),
        ({"x.onnx": b"\x08\x07"}, "x.onnx is an ONNX model, which needs a tokenizer"),
        ({"a.bin": b"lmgg", "b.bin": b"GGUF"}, "a.bin, b.bin holds models of several formats"),
        ({"a.bin": b"lmgg", "b.bin": b"lmgg"}, "a.bin, b.bin holds several models"),
    ],
)
def test_what_is_no_model_is_named(files: dict[str, bytes], words: str) -> None:
    with pytest.raises(InvalidModelFile) as caught:
        folder.read_from({name: Far(raw) for name, raw in files.items()})

    assert caught.value.message.startswith(words), caught.value.message
