"""Conversations of the Pieces API, in SQLite (WAL): true after a kill at any moment.

They are the user's words: the database is for nobody else's eyes. Listeners hear of every change.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from daemon.errors import ConfigError, InsufficientDisk

_MIGRATIONS = (
    """
    CREATE TABLE chats (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        model TEXT NOT NULL,
        created TEXT NOT NULL,
        updated TEXT NOT NULL
    ) STRICT;
    CREATE TABLE messages (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        chat TEXT NOT NULL REFERENCES chats ON DELETE CASCADE,
        role TEXT NOT NULL,
        text TEXT NOT NULL,
        created TEXT NOT NULL
    ) STRICT;
    CREATE INDEX messages_of_chat ON messages (chat);
    """,
)
_SCHEMA = len(_MIGRATIONS)
_ALL = "SELECT id, name, model, created, updated FROM chats ORDER BY updated DESC, rowid DESC"
log = logging.getLogger(__name__)


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation. Times are ISO 8601 in UTC; `model` is the id of the model asked last."""

    id: str
    name: str
    model: str
    created: str
    updated: str


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What was said in a conversation, by the `user` or the `assistant`."""

    id: str
    chat: str
    role: str
    text: str
    created: str


class Listener(Protocol):
    """What is called after a change of a conversation."""

    def __call__(self, chat_id: str, *, deleted: bool) -> None:
        """Take note; must not raise."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Chats:
    """All conversations. Raises ConfigError if the database can't be used.

    What changes something raises InsufficientDisk if it can't be written, unless it says otherwise.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listeners: list[Listener] = []
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA:
                raise sqlite3.DatabaseError(f"a newer modeld wrote it (schema {version})")
            for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
                script = f"BEGIN; {statements} PRAGMA user_version = {number}; COMMIT;"
                self._db.executescript(script)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the conversations in {path} cannot be used: {error}") from error

    def close(self) -> None:
        """Write everything back into one file."""
        self._db.close()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` after every change; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _notify(self, chat_id: str, *, deleted: bool = False) -> None:
        for listener in list(self._listeners):
            listener(chat_id, deleted=deleted)

    def _write(self, statement: str, *values: str) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise InsufficientDisk(
                f"conversations can't be written to {self._path} ({error}): see that its disk has "
                "room, and that modeld may write there"
            ) from error

    def all(self) -> list[Chat]:
        """Return every conversation, the last one changed first."""
        return [_chat(row) for row in self._db.execute(_ALL)]

    def contents(self) -> list[tuple[Chat, list[str]]]:
        """Return the same with the ids of what was said in each, in its order. For any thread."""
        with contextlib.closing(sqlite3.connect(self._path, isolation_level=None)) as db:
            db.execute("BEGIN")  # one state of both tables
            chats = [_chat(row) for row in db.execute(_ALL)]
            said: dict[str, list[str]] = {chat.id: [] for chat in chats}
            for chat_id, message_id in db.execute("SELECT chat, id FROM messages ORDER BY number"):
                said[chat_id].append(message_id)
        return [(chat, said[chat.id]) for chat in chats]

    def get(self, chat_id: str) -> Chat | None:
        """Return a conversation, or None."""
        row = self._db.execute(
            "SELECT id, name, model, created, updated FROM chats WHERE id = ?", (chat_id,)
        ).fetchone()
        return None if row is None else _chat(row)

    def create(self, name: str, model: str = "") -> Chat:
        """Begin a conversation."""
        now = _now()
        chat = Chat(id=str(uuid.uuid4()), name=name, model=model, created=now, updated=now)
        self._write(
            "INSERT INTO chats (id, name, model, created, updated) VALUES (?, ?, ?, ?, ?)",
            *(chat.id, name, model, now, now),
        )
        self._notify(chat.id)
        return chat

    def rename(self, chat_id: str, name: str) -> None:
        """Give a conversation another name."""
        self._write("UPDATE chats SET name = ?, updated = ? WHERE id = ?", name, _now(), chat_id)
        self._notify(chat_id)

    def delete(self, chat_id: str) -> None:
        """Remove a conversation and all that was said in it."""
        self._write("DELETE FROM chats WHERE id = ?", chat_id)
        self._notify(chat_id, deleted=True)

    def say(self, chat_id: str, role: str, text: str, model: str) -> ChatMessage | None:
        """Add to a conversation what somebody said; one that was deleted meanwhile stays so.

        Never raises for a full disk: the answer is worth more than its record. None: it could not
        be kept.
        """
        now = _now()
        said = ChatMessage(id=str(uuid.uuid4()), chat=chat_id, role=role, text=text, created=now)
        try:
            self._db.execute(
                "INSERT INTO messages (id, chat, role, text, created) VALUES (?, ?, ?, ?, ?)",
                (said.id, chat_id, role, text, now),
            )
            self._db.execute(
                "UPDATE chats SET updated = ?, model = ? WHERE id = ?", (now, model, chat_id)
            )
        except sqlite3.IntegrityError:  # it was deleted
            return None
        except sqlite3.Error as error:
            log.warning("a message of a conversation could not be kept: %s", error)
            return None
        self._notify(chat_id)
        return said

    def messages(self, chat_id: str) -> list[ChatMessage]:
        """Return what was said in a conversation, in its order."""
        rows = self._db.execute(
            "SELECT id, chat, role, text, created FROM messages WHERE chat = ? ORDER BY number",
            (chat_id,),
        )
        return [_message(row) for row in rows]

    def message_ids(self, chat_id: str) -> list[str]:
        """Return the ids of what was said in a conversation, in its order."""
        rows = self._db.execute(
            "SELECT id FROM messages WHERE chat = ? ORDER BY number", (chat_id,)
        )
        return [str(row[0]) for row in rows]

    def named(self, message_ids: Sequence[str]) -> list[ChatMessage]:
        """Return what has these ids, in the order of its being said; what is gone is left out."""
        rows = self._db.execute(
            "SELECT id, chat, role, text, created FROM messages "
            "WHERE id IN (SELECT value FROM json_each(?)) ORDER BY number",
            (msgspec.json.encode(message_ids).decode(),),
        )
        return [_message(row) for row in rows]

    def message(self, message_id: str) -> ChatMessage | None:
        """Return one thing that was said, or None."""
        row = self._db.execute(
            "SELECT id, chat, role, text, created FROM messages WHERE id = ?", (message_id,)
        ).fetchone()
        return None if row is None else _message(row)

    def reword(self, said: ChatMessage, text: str) -> ChatMessage:
        """Have something else have been said, and return that."""
        self._write("UPDATE messages SET text = ? WHERE id = ?", text, said.id)
        self._touch(said.chat)
        return msgspec.structs.replace(said, text=text)

    def unsay(self, said: ChatMessage) -> None:
        """Remove one thing that was said."""
        self._write("DELETE FROM messages WHERE id = ?", said.id)
        self._touch(said.chat)

    def _touch(self, chat_id: str) -> None:
        self._write("UPDATE chats SET updated = ? WHERE id = ?", _now(), chat_id)
        self._notify(chat_id)


def _chat(row: tuple[str, str, str, str, str]) -> Chat:
    key, name, model, created, updated = row
    return Chat(id=key, name=name, model=model, created=created, updated=updated)


def _message(row: tuple[str, str, str, str, str]) -> ChatMessage:
    key, chat, role, text, created = row
    return ChatMessage(id=key, chat=chat, role=role, text=text, created=created)
