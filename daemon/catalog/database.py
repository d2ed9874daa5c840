"""The catalog: model records in SQLite (WAL), true after a kill at any moment.

Statements are short and run on the event loop's thread; each change is one transaction. Listeners
hear of every change, so that APIs can push it on.
"""

from __future__ import annotations

import logging
import sqlite3
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec

from daemon.catalog.record import KeptDownload, Measurement, ModelRecord, SeedRecord
from daemon.errors import ConfigError, Conflict, InvalidRequest, ModelNotFound
from daemon.sources import UNIQUE_NAME, public

# What brings a database from each version to the next.
_MIGRATIONS = (
    """
    CREATE TABLE models (
        id TEXT PRIMARY KEY,
        unique_name TEXT NOT NULL UNIQUE,
        record TEXT NOT NULL
    ) STRICT;
    CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    """,
    """
    CREATE TABLE measurements (
        files TEXT NOT NULL,
        backend TEXT NOT NULL,
        version TEXT NOT NULL,
        settings TEXT NOT NULL,
        measurement TEXT NOT NULL,
        PRIMARY KEY (files, backend, version, settings)
    ) STRICT;
    """,
    """
    CREATE TABLE downloads (model_id TEXT PRIMARY KEY, download TEXT NOT NULL) STRICT;
    """,
)
SCHEMA_VERSION = len(_MIGRATIONS)
_MEASUREMENTS = 1000  # the latest are kept
log = logging.getLogger(__name__)
# Built-in models keep their id for ever, on every machine: it is made from their unique name. So do
# those of upstreams: theirs is made from their source.
_NAMESPACE = uuid.UUID("6d0de1d0-5b1c-4f0a-9a53-6d6f64656c64")


class Listener(Protocol):
    """What is called after a change of a model."""

    def __call__(self, model_id: str, *, deleted: bool) -> None:
        """Take note; must not raise."""


def now() -> str:
    """Return the present time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def cloud_id(source: str) -> str:
    """Return the id of the model of an upstream."""
    return str(uuid.uuid5(_NAMESPACE, source))


def check_unique(unique: str) -> str:
    """Return `unique` if it is a valid unique name. Raises InvalidRequest."""
    if not UNIQUE_NAME.fullmatch(unique):
        raise InvalidRequest(
            f"{unique!r} is not a valid unique name: letters, digits and . _ : - only, the first "
            "of them a letter or a digit",
            param="unique",
        )
    return unique


def name_taken(known: ModelRecord) -> Conflict:
    """Return the error for a new model whose unique name is that of `known`, another one."""
    return Conflict(
        f"{known.unique!r} is another model already, from {public(known.source) or 'no source'}: "
        "give this one a unique name of its own",
        param="unique",
    )


class Catalog:
    """All models by id and by unique name. Raises ConfigError if the database can't be used."""

    def __init__(self, path: Path) -> None:
        self._listeners: list[Listener] = []
        self._on_lookup: Callable[[str], None] = lambda _: None
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._migrate()
            (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        except sqlite3.Error as error:
            raise ConfigError(f"the catalog {path} cannot be used: {error}") from error

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"the catalog was written by a newer modeld (schema {version}, this one knows "
                f"{SCHEMA_VERSION}): install that version again, or use another --data-dir"
            )
        for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
            self._db.executescript(f"BEGIN; {statements} PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        """Write everything back into one file."""
        self._db.close()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` after every change; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def on_lookup(self, callback: Callable[[str], None]) -> None:
        """Have `callback` hear of each look at all models (""), and of each name not found.

        What comes from elsewhere may have changed by then; it must neither raise nor wait.
        """
        self._on_lookup = callback

    def all(self) -> list[ModelRecord]:
        """Return every record, by unique name."""
        self._on_lookup("")
        rows = self._db.execute("SELECT record FROM models ORDER BY unique_name")
        return [_decode(row[0]) for row in rows]

    def cloud(self) -> list[ModelRecord]:
        """Return the records of the models that upstreams run."""
        rows = self._db.execute("SELECT record FROM models WHERE json_extract(record, '$.cloud')")
        return [_decode(row[0]) for row in rows]

    def get(self, key: str) -> ModelRecord:
        """Return the model with this id or unique name (exact, else without case).

        Raises ModelNotFound.
        """
        queries = ("id = ?", "unique_name = ?", "unique_name = ? COLLATE NOCASE", "id = lower(?)")
        for condition in queries:
            row = self._db.execute(
                f"SELECT record FROM models WHERE {condition}",  # noqa: S608  fixed conditions
                (key,),
            ).fetchone()
            if row is not None:
                return _decode(row[0])
        self._on_lookup(key)
        raise ModelNotFound(f"no model has the id or name {key!r}; `modeld list` shows all models")

    def find(self, key: str) -> ModelRecord | None:
        """Return the model with this id or unique name, or None."""
        try:
            return self.get(key)
        except ModelNotFound:
            return None

    def add(self, record: ModelRecord) -> ModelRecord:
        """Add a new model. Raises Conflict if the unique name is taken, in any case."""
        check_unique(record.unique)
        if self.find(record.unique) is not None:
            raise Conflict(f"a model named {record.unique!r} is there already", param="unique")
        self._write("INSERT INTO models (record, unique_name, id) VALUES (?, ?, ?)", record)
        return record

    def update(self, model_id: str, **changes: Any) -> ModelRecord:
        """Change fields of a model and return the new record. Raises ModelNotFound, Conflict."""
        record = msgspec.structs.replace(self.get(model_id), **changes)
        if "unique" in changes:
            check_unique(record.unique)
            other = self.find(record.unique)
            if other is not None and other.id != record.id:
                raise Conflict(f"a model named {record.unique!r} is there already", param="unique")
        self._write("UPDATE models SET record = ?, unique_name = ? WHERE id = ?", record)
        return record

    def remove(self, model_id: str) -> None:
        """Forget a model."""
        self._db.execute("DELETE FROM models WHERE id = ?", (model_id,))
        self._notify(model_id, deleted=True)

    def _write(self, statement: str, record: ModelRecord) -> None:
        text = msgspec.json.encode(record).decode()
        self._db.execute(statement, (text, record.unique, record.id))
        self._notify(record.id, deleted=False)

    def _notify(self, model_id: str, *, deleted: bool) -> None:
        for listener in list(self._listeners):
            listener(model_id, deleted=deleted)

    def changed(self, model_id: str) -> None:
        """Tell listeners that something outside the record changed, such as the model's state."""
        self._notify(model_id, deleted=False)

    def seed(self, entries: Iterable[SeedRecord]) -> None:
        """Bring the built-in models up to date; one that is gone stays if it is downloaded."""
        wanted = {str(uuid.uuid5(_NAMESPACE, entry.unique)): entry for entry in entries}
        known = {record.id: record for record in self.all()}
        for model_id, entry in wanted.items():
            fields = msgspec.structs.asdict(entry)
            if model_id in known:
                if any(getattr(known[model_id], key) != value for key, value in fields.items()):
                    self.update(model_id, **fields)
            elif self.find(entry.unique) is None:  # a user's own model of that name stays
                self.add(ModelRecord(id=model_id, created=now(), **fields))
        for record in known.values():
            if not record.custom and record.id not in wanted and not record.downloaded:
                self.remove(record.id)

    def identity(self) -> str:
        """Return this installation's uuid, made at its first start."""
        identity = self.setting("identity")
        if identity is None:
            identity = str(uuid.uuid4())
            self.set_setting("identity", identity)
        return identity

    def setting(self, key: str) -> str | None:
        """Return a text that was kept under `key`, or None."""
        row = self._db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_setting(self, key: str, value: str) -> None:
        """Keep a text under `key`."""
        self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, value))

    def downloads(self) -> list[KeptDownload]:
        """Return the downloads that are not over, the oldest first."""
        rows = self._db.execute("SELECT download FROM downloads")
        kept = [msgspec.json.decode(row[0], type=KeptDownload) for row in rows]
        return sorted(kept, key=lambda each: each.created)

    def keep_download(self, download: KeptDownload) -> None:
        """Keep a download for the next daemon. Never raises: it can do without."""
        row = (download.model_id, msgspec.json.encode(download).decode())
        try:
            self._db.execute("INSERT OR REPLACE INTO downloads VALUES (?, ?)", row)
        except sqlite3.Error as error:
            log.warning("a download could not be noted: %s", error)

    def forget_download(self, model_id: str) -> None:
        """Forget a download that is over."""
        try:
            self._db.execute("DELETE FROM downloads WHERE model_id = ?", (model_id,))
        except sqlite3.Error as error:
            log.warning("a download could not be forgotten: %s", error)

    def measurements(self, files: str, backend: str, version: str) -> list[Measurement]:
        """Return what loads of these files by this version of a backend used."""
        rows = self._db.execute(
            "SELECT measurement FROM measurements WHERE files = ? AND backend = ? AND version = ?",
            (files, backend, version),
        )
        return [msgspec.json.decode(row[0], type=Measurement) for row in rows]

    def remember(self, measurement: Measurement) -> None:
        """Keep a measurement, in place of one of the same load. Never raises: it can do without."""
        row = (
            measurement.files,
            measurement.backend,
            measurement.version,
            measurement.settings,
            msgspec.json.encode(measurement).decode(),
        )
        try:
            self._db.execute("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?)", row)
            self._db.execute(
                "DELETE FROM measurements WHERE rowid <= (SELECT max(rowid) FROM measurements) - ?",
                (_MEASUREMENTS,),
            )
        except sqlite3.Error as error:
            log.warning("a measurement could not be kept: %s", error)


def _decode(text: str) -> ModelRecord:
    return msgspec.json.decode(text, type=ModelRecord)
