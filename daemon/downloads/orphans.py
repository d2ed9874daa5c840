"""What is left in the store of downloads that nobody goes on with: listed, and removed when asked.

Blocks: reads folders, and the journals of unfinished files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from daemon.downloads.journal import look
from daemon.downloads.unfinished import models_of
from daemon.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What downloads that are not over go on with: unfinished files by key, and those of models."""

    keys: Collection[str]
    models: Collection[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """An unfinished file; `address` is where it is from, "" if that can't be told.

    `bytes` is what it takes on the disk, `modified` in seconds since the epoch. `models` are the
    ids of those that it is for, `wanted` is whether a download goes on with it, or will.
    """

    key: str
    address: str
    bytes: int
    total_bytes: int | None
    modified: float
    models: tuple[str, ...]
    wanted: bool


def find(store: Store, wanted: Wanted) -> list[Leftover]:
    """Return all unfinished files, the oldest first, without those that go meanwhile."""
    found = []
    for folder in store.unfinished():
        with contextlib.suppress(FileNotFoundError):
            found.append(_described(folder, wanted))
    return sorted(found, key=lambda each: each.modified)


def _described(folder: Path, wanted: Wanted) -> Leftover:
    data = folder / "data"
    facts = (data if data.exists() else folder).stat()
    identity = look(folder / "journal")
    models = models_of(folder)
    return Leftover(
        key=folder.name,
        address=identity.address if identity is not None else "",
        bytes=facts.st_blocks * 512,
        total_bytes=identity.size_bytes if identity is not None else None,
        modified=facts.st_mtime,
        models=models,
        wanted=folder.name in wanted.keys or any(model in wanted.models for model in models),
    )


def remove(store: Store, wanted: Wanted, among: Collection[str] | None = None) -> int:
    """Remove unfinished files that nobody wants, of those `among` if given; return the bytes."""
    return _remove(
        store,
        [left for left in find(store, wanted) if among is None or left.key in among],
    )


def remove_of(store: Store, wanted: Wanted, model_id: str) -> int:
    """Remove unfinished files that nobody wants and that are for one model alone."""
    return _remove(store, [left for left in find(store, wanted) if left.models == (model_id,)])


def _remove(store: Store, leftovers: list[Leftover]) -> int:
    freed = 0
    for left in leftovers:
        if not left.wanted and store.drop_partial(left.key):
            freed += left.bytes
    return freed
