"""The folder of a file that is not whole yet: who works on it, and for which models it is.

partial/<key>/data      the bytes, where they belong: see `partial`
partial/<key>/journal   which of them are here: see `journal`
partial/<key>/lock      held by the fetcher that works on it
partial/<key>/models    the ids of the models that it is for, a line each
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from daemon.downloads import publish

_FOR = "models"


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Be the only one that works on the partial file in `folder`, which is made.

    Waits for whoever does already, after it called `waiting`.
    """
    while True:
        publish.make_dir(folder)
        path = folder / "lock"
        try:
            lock = path.open("ab")
        except FileNotFoundError:  # the folder was removed this very moment
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(path.stat(), os.fstat(lock.fileno()))
            except FileNotFoundError:  # who had it was done, and has removed the folder
                current = False
            if current:
                yield
                return


def note_model(folder: Path, model_id: str) -> None:
    """Note that the partial file in `folder`, which the caller holds the lock of, is for a model.

    Other jobs than the one that fetches it go by that: those of the next daemon, and `modeld gc`.
    """
    if model_id not in models_of(folder):
        with (folder / _FOR).open("a", encoding="ascii") as file:
            file.write(f"{model_id}\n")


def models_of(folder: Path) -> tuple[str, ...]:
    """Return the ids of the models that the partial file in `folder` is for."""
    try:
        return tuple((folder / _FOR).read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):
        return ()


def missing_bytes(folder: Path, size_bytes: int) -> int:
    """Return how many bytes the disk must have for the rest of the partial file in `folder`.

    Room that was taken for what is on its way is there already.
    """
    try:
        here = (folder / "data").stat().st_blocks * 512
    except FileNotFoundError:
        here = 0
    return max(0, size_bytes - here)
