"""Files of saved conversations: their names, their modes, their checksums.

What every backend that saves its KV state has in common. Knows no engine: that one writes and reads
the files themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.contract import BackendError, SavedConversation

_NAME = re.compile(r"[0-9a-f]{32}\.kv")


@dataclass(frozen=True, slots=True)
class Held:
    """A conversation in an engine's KV cache: its tokens, and what writes it to a file.

    The file is there already, empty and private. `write` raises OSError or BackendError.
    `expected_bytes` is what the file is going to take, 0 if that is not known.
    """

    tokens: int
    write: Callable[[Path], None]
    expected_bytes: int = 0


def save(folder: str, limit_bytes: int, held: Iterable[Held]) -> tuple[SavedConversation, ...]:
    """Write conversations into `folder`, under the rules of Resumes.save_state.

    A file that turns out to be too large is there for a moment.
    """
    saved: list[SavedConversation] = []
    failure: Exception | None = None
    room = limit_bytes
    for conversation in sorted(held, key=lambda each: -each.tokens):
        if conversation.tokens <= 0 or room <= 0 or conversation.expected_bytes > room:
            continue
        try:
            kept = _write(Path(folder), conversation, room)
        except (OSError, BackendError) as error:
            print(f"a conversation was not saved: {error}", file=sys.stderr)
            failure = error
            continue
        if kept is not None:
            saved.append(kept)
            room -= kept.size_bytes
    if failure is not None and not saved:
        raise BackendError("engine_error", f"no conversation could be saved: {failure}")
    return tuple(saved)


def _write(folder: Path, held: Held, room: int) -> SavedConversation | None:
    """Write one conversation, or nothing if it takes more than `room` bytes."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = secrets.token_hex(16)
    part = folder / f"{name}.part"
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        held.write(part)
        size_bytes = part.stat().st_size
        if size_bytes > room:
            return None
        with part.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(part, folder / f"{name}.kv")
    finally:
        part.unlink(missing_ok=True)
    return SavedConversation(
        name=f"{name}.kv", size_bytes=size_bytes, sha256=sha256, tokens=held.tokens
    )


def restore(
    folder: str,
    conversations: Sequence[SavedConversation],
    slots: int,
    read: Callable[[int, Path], None],
) -> tuple[str, ...]:
    """Give the files to `slots` slots, under the rules of Resumes.restore_state.

    `read` has a slot, from 0 on, go on from a file; it raises OSError or BackendError for one that
    the engine refuses, and leaves the slot empty then.
    """
    restored: list[str] = []
    for conversation in conversations:
        if len(restored) == slots:
            break
        try:
            path = Path(folder) / conversation.name
            _check(path, conversation)
            read(len(restored), path)
        except (OSError, BackendError) as error:
            print(f"{conversation.name} was not restored: {error}", file=sys.stderr)
        else:
            restored.append(conversation.name)
    return tuple(restored)


def _check(path: Path, conversation: SavedConversation) -> None:
    """Raise OSError or BackendError unless `path` is the very file that was saved."""
    if not _NAME.fullmatch(conversation.name):
        raise BackendError("engine_error", "this is no name of a saved conversation")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != conversation.size_bytes:
            raise BackendError("engine_error", f"it does not have {conversation.size_bytes} bytes")
        if hashlib.file_digest(file, "sha256").hexdigest() != conversation.sha256:
            raise BackendError("engine_error", "its checksum is not the one that it was saved with")


@contextlib.contextmanager
def linked(path: Path, scratch: str) -> Iterator[str]:
    """Yield a name in the folder `scratch` that leads to `path`, for engines bound to a folder."""
    name = secrets.token_hex(16)
    link = Path(scratch) / name
    link.symlink_to(path.absolute())
    try:
        yield name
    finally:
        link.unlink(missing_ok=True)
