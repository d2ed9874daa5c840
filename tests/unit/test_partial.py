"""An unfinished file: how much a crash of the machine may cost at any moment."""

from __future__ import annotations

import threading

import pytest

from daemon.downloads import journal
from daemon.downloads.journal import Identity, Journal
from daemon.downloads.partial import MAX_LOST_BYTES, Partial
from daemon.downloads.unfinished import locked, missing_bytes, models_of, note_model

MIB = 1024**2
WHOSE = Identity(address="https://host/x.gguf", size_bytes=64 * MIB, sha256="0" * 64)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "key").mkdir()
    return tmp_path / "key"


def test_while_the_journal_is_synced_no_more_is_taken_than_may_be_lost(folder, monkeypatch):
    """What the disk knows counts, not what it is about to be told."""
    going, go_on, sync = threading.Event(), threading.Event(), Journal.sync
    partial = Partial(folder, WHOSE)
    lasting: list[int] = []

    def slow(self: Journal) -> None:
        going.set()
        go_on.wait(20)
        sync(self)
        lasting.append(partial._synced.total)

    monkeypatch.setattr(Journal, "sync", slow)
    landed = 0
    full = False
    while not full:  # the daemon waits once it is told to
        full = partial.land(landed, bytes(256 * 1024))
        landed += 256 * 1024
        if landed == 4 * MIB:
            assert going.wait(20)
        assert landed <= MAX_LOST_BYTES, "a crash now would cost all of it: nothing is synced"
    go_on.set()
    partial.settle()
    partial.close()


def test_after_a_crash_what_was_synced_is_gone_on_with(folder, monkeypatch):
    partial = Partial(folder, WHOSE)
    for at in range(16):
        if partial.land(at * MIB, bytes(MIB)):
            partial.settle()
    lost = partial.spans.total - partial._synced.total
    partial.close()
    monkeypatch.setattr(journal, "_boot_id", lambda: "another boot")
    again = Partial(folder, WHOSE)
    assert 0 <= lost <= MAX_LOST_BYTES
    assert again.spans.total >= 16 * MIB - lost
    again.close()


def test_who_wants_an_unfinished_file_is_noted_once(folder):
    assert models_of(folder) == ()
    with locked(folder, lambda: None):
        for model_id in ("one", "two", "one"):
            note_model(folder, model_id)
    assert models_of(folder) == ("one", "two")


def test_room_that_was_taken_for_what_comes_counts(folder):
    assert missing_bytes(folder, 10 * MIB) == 10 * MIB
    partial = Partial(folder, WHOSE)
    partial.prepare(0, 8 * MIB)
    assert missing_bytes(folder, 10 * MIB) <= 2 * MIB
    assert missing_bytes(folder, MIB) == 0
    partial.close()
