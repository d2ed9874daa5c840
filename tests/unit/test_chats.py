"""Conversations in SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from disks import small_disk

from daemon.chats import Chats
from daemon.errors import ConfigError, InsufficientDisk


def test_what_was_said_is_kept_in_its_order(tmp_path):
    path = tmp_path / "chats.db"
    chats = Chats(path)
    first, second = chats.create("one"), chats.create("two", "m")
    for number in range(3):
        chats.say(first.id, "user", f"question {number}", "model")
        chats.say(first.id, "assistant", f"answer {number}", "model")
    chats.close()
    chats = Chats(path)
    assert [chat.name for chat in chats.all()] == ["one", "two"]  # the last one changed is first
    said = chats.messages(first.id)
    assert [each.text for each in said][:3] == ["question 0", "answer 0", "question 1"]
    assert chats.message(said[1].id) == said[1] and said[1].role == "assistant"
    assert chats.messages(second.id) == [] and chats.get("nobody") is None
    assert chats.get(first.id).model == "model"
    chats.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_changes_are_told_and_a_deleted_conversation_stays_so(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    told: list[tuple[str, bool]] = []
    end = chats.listen(lambda chat_id, *, deleted: told.append((chat_id, deleted)))
    chat = chats.create("one")
    chats.say(chat.id, "user", "hi", "m")
    chats.rename(chat.id, "other")
    said = chats.messages(chat.id)[0]
    chats.delete(chat.id)
    chats.say(chat.id, "assistant", "too late", "m")
    assert told == [(chat.id, False)] * 3 + [(chat.id, True)]
    assert chats.all() == [] and chats.message(said.id) is None
    end()
    chats.create("two")
    assert len(told) == 4
    chats.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from daemon.chats import Chats
chats = Chats(Path(sys.argv[1]))
chat = chats.create("kept")
for number in range(50):
    chats.say(chat.id, "user", str(number), "m")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_said_outlives_a_kill(tmp_path):
    path = tmp_path / "chats.db"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=root, check=False)
    assert done.returncode == -9
    chats = Chats(path)
    (chat,) = chats.all()
    assert [each.text for each in chats.messages(chat.id)] == [str(n) for n in range(50)]
    chats.close()


def test_a_database_that_cannot_be_used_is_named(tmp_path):
    path = tmp_path / "chats.db"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match=r"chats\.db"):
        Chats(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer modeld"):
        Chats(path)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        chats = Chats(disk / "chats.db")
        kept = chats.create("kept")
        assert chats.say(kept.id, "user", "hello", "m")
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(InsufficientDisk, match="see that its disk has room"):
            for number in range(1000):
                chats.create(f"{number}")
        assert chats.say(kept.id, "assistant", "y" * 100_000, "m") is None
        assert [each.text for each in chats.messages(kept.id)] == ["hello"]
        filler.unlink()
        assert chats.say(kept.id, "assistant", "there", "m")
        assert [each.text for each in chats.messages(kept.id)] == ["hello", "there"]
        chats.close()
