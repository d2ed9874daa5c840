"""Files of saved conversations: whole, private, within the limit, and what was saved or nothing."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from backends import conversations
from backends.contract import BackendError
from backends.conversations import Held


def held(text: str, tokens: int | None = None, **facts) -> Held:
    """A conversation whose state is `text`."""
    return Held(
        tokens=len(text) if tokens is None else tokens,
        write=lambda path: path.write_text(text) and None,
        **facts,
    )


def broken(error: Exception, tokens: int = 5) -> Held:
    def write(path: Path) -> None:
        path.write_text("half of")
        raise error

    return Held(tokens=tokens, write=write)


def texts(folder: Path, saved) -> list[str]:
    return [(folder / each.name).read_text() for each in saved]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def restored(folder, saved, slots=4, refuses=()):
    """What is restored, and the texts of the slots."""
    contents = {}

    def read(slot: int, path: Path) -> None:
        if path.read_text() in refuses:
            raise BackendError("engine_error", "the engine refuses it")
        contents[slot] = path.read_text()

    return conversations.restore(str(folder), saved, slots, read), contents


def test_what_is_saved_is_what_comes_back(tmp_path):
    folder = tmp_path / "states" / "key"
    saved = conversations.save(str(folder), 100, [held("short"), held("much longer")])
    assert texts(folder, saved) == ["much longer", "short"]
    assert [(each.tokens, each.size_bytes) for each in saved] == [(11, 11), (5, 5)]
    assert saved[1].sha256 == hashlib.sha256(b"short").hexdigest()
    assert restored(folder, saved) == (
        (saved[0].name, saved[1].name),
        {0: "much longer", 1: "short"},
    )


def test_files_are_private_from_the_first_byte_on(tmp_path):
    seen = []

    def write(path: Path) -> None:
        seen.append((path.suffix, stat.S_IMODE(path.stat().st_mode)))
        path.write_text("x")

    before = os.umask(0)
    try:
        (saved,) = conversations.save(str(tmp_path / "new"), 10, [Held(tokens=1, write=write)])
    finally:
        os.umask(before)
    assert seen == [(".part", 0o600)]
    assert stat.S_IMODE((tmp_path / "new" / saved.name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("limit_bytes", "kept"),
    [(9, ["four", "two"]), (6, ["four"]), (5, ["four"]), (3, ["two"]), (2, []), (0, []), (-1, [])],
)
def test_the_limit_holds_for_all_together_and_the_longest_come_first(tmp_path, limit_bytes, kept):
    saved = conversations.save(str(tmp_path), limit_bytes, [held("two"), held("four")])
    assert texts(tmp_path, saved) == kept
    assert len(names(tmp_path)) == len(kept)


def test_what_is_known_to_be_too_large_is_not_written_at_all(tmp_path):
    too_large = broken(AssertionError("it was written"))
    held_ones = [replace(too_large, expected_bytes=101), held("fits", expected_bytes=4)]
    assert texts(tmp_path, conversations.save(str(tmp_path), 100, held_ones)) == ["fits"]


def test_an_empty_slot_has_nothing_to_save(tmp_path):
    assert conversations.save(str(tmp_path / "new"), 100, [held("", 0)]) == ()
    assert conversations.save(str(tmp_path / "new"), 100, []) == ()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError("no space"), BackendError("engine_error", "no space")])
def test_one_that_fails_costs_no_other_and_leaves_nothing(tmp_path, error, capsys):
    saved = conversations.save(str(tmp_path), 100, [broken(error, tokens=50), held("fine")])
    assert texts(tmp_path, saved) == ["fine"] and len(names(tmp_path)) == 1
    assert "no space" in capsys.readouterr().err


def test_if_none_can_be_saved_that_is_an_error(tmp_path):
    with pytest.raises(BackendError, match="no space") as failed:
        conversations.save(str(tmp_path), 100, [broken(OSError("no space"))])
    assert failed.value.code == "engine_error" and not names(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BackendError):
        conversations.save(str(tmp_path / "file" / "folder"), 100, [held("x")])


def flipped(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def shortened(path: Path) -> None:
    os.truncate(path, 3)


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def linked(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def foldered(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [flipped, shortened, grown, linked, piped, foldered, Path.unlink])
def test_a_file_that_is_not_what_was_saved_leaves_its_slot_to_the_next(tmp_path, spoil, capsys):
    saved = conversations.save(str(tmp_path), 100, [held("the first"), held("second")])
    spoil(tmp_path / saved[0].name)
    assert restored(tmp_path, saved, slots=1) == ((saved[1].name,), {0: "second"})
    assert saved[0].name in capsys.readouterr().err


def test_a_file_that_the_engine_refuses_leaves_its_slot_to_the_next(tmp_path):
    saved = conversations.save(str(tmp_path), 100, [held("the first"), held("second")])
    assert restored(tmp_path, saved, refuses={"the first"}) == ((saved[1].name,), {0: "second"})


def test_there_are_no_more_than_slots(tmp_path):
    saved = conversations.save(str(tmp_path), 100, [held("a"), held("ab"), held("abc")])
    assert restored(tmp_path, saved, slots=2)[1] == {0: "abc", 1: "ab"}
    assert restored(tmp_path / "gone", saved)[0] == ()


@pytest.mark.parametrize(
    "name", ["../{}", "{}/", "./{}", "x{}", "{}\n", "", ".", "..", "/etc/passwd"]
)
def test_only_names_that_were_given_are_read(tmp_path, name):
    folder = tmp_path / "key"
    (saved,) = conversations.save(str(folder), 100, [held("text")])
    (folder / saved.name).rename(tmp_path / saved.name)
    asked = replace(saved, name=name.format(saved.name))
    assert restored(folder, [asked])[0] == ()


def test_a_link_leads_to_the_file_while_it_is_needed(tmp_path):
    (tmp_path / "state").write_text("text")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with conversations.linked(tmp_path / "state", str(scratch)) as name:
        assert "/" not in name and (scratch / name).read_text() == "text"
    assert not names(scratch)
