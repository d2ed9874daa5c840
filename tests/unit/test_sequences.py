"""Files of sequences: parts of other slots come and go, and nothing else in them changes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from backends.gguf import refitted

SLOTS = [1, 2, 3, 4, 8]


@dataclass(frozen=True)
class Layout:
    """One way in which engines write such files."""

    version: int
    transposed: bool = False
    caches: int = 1
    checkpoints: int = 0
    values: bool = True
    rest: bytes = b""

    def part(self, cells: int, layers: int) -> bytes:
        raw = struct.pack("<I", cells)
        for position in range(cells):
            raw += struct.pack("<iIi", position, 1, 2)
        raw += struct.pack("<II", self.transposed, layers) + bytes(8 * (self.version == 4))
        for layer in range(layers):
            raw += struct.pack("<iQ", 1, 16) + bytes([layer + 1]) * 16 * cells
        for layer in range(layers if self.values else 0):
            kind = struct.pack("<iII", 1, 2, 8) if self.transposed else struct.pack("<iQ", 8, 34)
            raw += kind + bytes([layer + 101]) * (16 if self.transposed else 34) * cells
        return raw

    def cache(self, slot: int, slots: int, cells: int, layers: int = 2) -> bytes:
        parts = [bytes(4)] * slots
        if cells:
            parts[slot] = self.part(cells, layers)
        return struct.pack("<I", slots) + b"".join(parts)

    def file(self, slot: int, slots: int, cells: int = 5) -> bytes:
        """The whole file of the sequence in `slot`, as an engine with so many `slots` writes it."""
        tokens = list(range(cells))
        raw = b"qsgg" + struct.pack(f"<II{cells}i", self.version, cells, *tokens)
        raw += b"".join(self.cache(slot, slots, cells - at, 1 + at) for at in range(self.caches))
        raw += self.rest
        if self.checkpoints:
            raw += b"SCKP" + struct.pack("<II", 1, self.checkpoints)
        for number in range(self.checkpoints):
            state = struct.pack("<II", 0xAF1C, 1) + self.cache(slot, slots, 2 + number)
            raw += struct.pack("<qiiQ", 4, 0, 3, len(state)) + state + bytes(16)
        return raw


LAYOUTS = [
    Layout(3),
    Layout(3, transposed=True, caches=2),
    Layout(4),
    Layout(4, caches=2),
    Layout(4, transposed=True, caches=2, checkpoints=3),
    Layout(3, values=False),
    Layout(4, values=False, caches=2),
    Layout(3, rest=struct.pack("<IiI", 1, 4, 0) + b"the state of recurrent layers"),
    Layout(4, rest=b"whatever else there may be in a file of a later version"),
]


def read(content: bytes, folder: Path, slots: int) -> bytes:
    """What an engine with so many slots is given, after which nothing is left behind."""
    path, scratch = folder / "file", folder / "scratch"
    path.write_bytes(content)
    scratch.mkdir(exist_ok=True)
    with refitted(path, str(scratch), slots) as fitting:
        found = fitting.read_bytes()
        assert fitting == path or fitting.parent == scratch
    assert path.read_bytes() == content and not list(scratch.iterdir())
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("slots", SLOTS)
def test_a_file_reads_as_if_it_had_been_written_with_so_many_slots(tmp_path, layout, slots):
    for before in SLOTS:
        for slot in range(before):
            wanted = layout.file(slot, slots) if before == slots else layout.file(0, slots)
            assert read(layout.file(slot, before), tmp_path, slots) == wanted


def test_an_empty_slot_s_file_is_one_of_an_empty_slot(tmp_path):
    assert read(Layout(3).file(1, 4, cells=0), tmp_path, 2) == Layout(3).file(0, 2, cells=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_file_whose_cache_is_cut_is_left_as_it_is(tmp_path, layout):
    whole = layout.file(0, 2)
    for size in range(12 + 4 * 5 + len(layout.cache(0, 2, 5, 1))):
        assert read(whole[:size], tmp_path, 4) == whole[:size]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"qsgg",
        b"GGUF" + Layout(3).file(1, 2)[4:],
        Layout(5).file(1, 2),
        b"qsgg" + struct.pack("<II", 3, 2**32 - 1),
        b"qsgg" + struct.pack("<III", 3, 0, 2**32 - 1),
        b"qsgg" + struct.pack("<IIII", 3, 0, 1, 2**32 - 1) + bytes(64),
    ],
)
def test_what_is_not_understood_is_left_as_it_is(tmp_path, content):
    assert read(content, tmp_path, 4) == content


def test_two_sequences_in_one_file_are_left_as_they_are(tmp_path):
    layout = Layout(3)
    content = b"qsgg" + struct.pack("<III", 3, 0, 2) + layout.part(2, 1) + layout.part(3, 1)
    assert read(content, tmp_path, 4) == content


def test_checkpoints_that_are_not_understood_are_left_as_they_are(tmp_path):
    plain, more = Layout(4), struct.pack("<QQ", 0, 1)
    content = Layout(4, checkpoints=1).file(1, 2)[:-16] + more
    checkpoints = content[len(plain.file(1, 2)) :]
    assert read(content, tmp_path, 4) == plain.file(0, 4) + checkpoints
