"""What is known of an unfinished file, after a kill or a crash of the machine at any moment."""

from __future__ import annotations

import pytest

from daemon.downloads import journal
from daemon.downloads.journal import Identity, Journal
from daemon.downloads.spans import Spans

WHOSE = Identity(address="https://host/x.gguf", size_bytes=10_000, version="v1")
SLOT = journal._SLOT_BYTES


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def write(path, written, synced=(), identity=WHOSE, *, lasting=False) -> None:
    opened = Journal(path)
    opened.read()
    opened.write(identity, Spans(written), Spans(synced), lasting=lasting)
    opened.close()


def read(path):
    opened = Journal(path)
    try:
        return opened.read()
    finally:
        opened.close()


def test_what_was_noted_last_is_known(path):
    assert read(path) is None
    for end in (10, 20, 30):
        write(path, [(0, end)])
    assert read(path) == (WHOSE, Spans([(0, 30)]))


def test_a_note_that_was_cut_short_leaves_the_one_before(path):
    write(path, [(0, 10)], lasting=True)
    write(path, [(0, 20)])
    content = bytearray(path.read_bytes())
    (slot,) = [at for at in range(0, 3 * SLOT, SLOT) if b"[[0,20]]" in content[at : at + SLOT]]
    for cut in range(slot, slot + 200):
        torn = content.copy()
        torn[cut : slot + SLOT] = bytes(slot + SLOT - cut)
        path.write_bytes(torn)
        assert read(path) in ((WHOSE, Spans([(0, 10)])), (WHOSE, Spans([(0, 20)])))
    path.write_bytes(bytes(3 * SLOT))
    assert read(path) is None


def test_after_a_crash_of_the_machine_only_what_was_synced_counts(path, monkeypatch):
    write(path, [(0, 20), (50, 60)], [(0, 10)])
    monkeypatch.setattr(journal, "_boot_id", lambda: "another boot")
    assert read(path) == (WHOSE, Spans([(0, 10)]))
    monkeypatch.setattr(journal, "_boot_id", lambda: "")  # nobody knows: the same
    write(path, [(0, 20)], [(0, 5)])
    assert read(path) == (WHOSE, Spans([(0, 5)]))


@pytest.mark.parametrize("syncs", [1, 2, 3])
@pytest.mark.parametrize("notes", [1, 2, 3, 10])
def test_a_crash_that_tears_all_that_was_not_synced_leaves_what_was(path, syncs, notes):
    for number in range(1, syncs + 1):
        write(path, [(0, 10 * number)], [(0, 10 * number)], lasting=True)
        if number == syncs - 1:
            write(path, [(0, 10 * number + 5)], [(0, 10 * number)])
    on_the_disk = path.read_bytes()
    for number in range(notes):
        write(path, [(0, 100 + number)], [(0, 10 * syncs)])
    in_memory = path.read_bytes()
    torn = [
        bytes(SLOT) if in_memory[at : at + SLOT] != was else was
        for at in range(0, 3 * SLOT, SLOT)
        if (was := on_the_disk[at : at + SLOT]) is not None
    ]
    path.write_bytes(b"".join(torn))
    assert read(path) == (WHOSE, Spans([(0, 10 * syncs)]))
    write(path, [(0, 200)], [(0, 200)], lasting=True)
    assert read(path) == (WHOSE, Spans([(0, 200)]))


def test_a_crash_amid_a_sync_leaves_the_one_before(path):
    for number in range(1, 5):
        write(path, [(0, number)], [(0, number)], lasting=True)
        before = path.read_bytes()
        write(path, [(0, 9)], [(0, 9)], lasting=True)
        after = path.read_bytes()
        torn = bytearray(after)
        for at in range(0, 3 * SLOT, SLOT):
            if after[at : at + SLOT] != before[at : at + SLOT]:
                torn[at : at + SLOT] = bytes(SLOT)
        path.write_bytes(torn)
        assert read(path) == (WHOSE, Spans([(0, number)]))


def test_so_many_holes_that_a_slot_cannot_hold_them_cost_the_smallest_ranges(path):
    far = 10**15
    spans = [(far + 10 * n, far + 10 * n + 2) for n in range(5000)] + [(0, 100)]
    write(path, spans, spans)
    _, kept = read(path)
    assert kept.covers(0, 100) and len(kept) == journal._MAX_SPANS


def test_a_journal_that_somebody_wrote_over_is_none(path):
    path.write_bytes(b"12345678 0000000a\n" + b"x" * SLOT)
    assert read(path) is None
