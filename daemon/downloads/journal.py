"""What is known of an unfinished file, true after any end: of the fetcher, the daemon, the machine.

A journal is one file of three slots; the newest one that is whole counts. What was written to the
file is there after a process was killed, but after a crash of the machine only what was synced
before: a slot tells both, and the boot that the former holds for. Slots that are about to be synced
are written in turn, and no others there: a crash may tear the one, and whatever was not synced.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import msgspec

from daemon.downloads.spans import Span, Spans

_SLOT_BYTES = 64 * 1024
_SLOTS = 3
_MAX_SPANS = 500  # some 40 bytes each, twice


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Which file it is; None is not said. `version` is its server's word for this content."""

    address: str
    size_bytes: int | None = None
    sha256: str | None = None
    version: str | None = None


class _Slot(msgspec.Struct, frozen=True):
    number: int
    boot: str
    identity: Identity
    written: list[Span]
    synced: list[Span]


class Journal:
    """The journal at `path`, which is made if it is not there. Blocks."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        # Now: noting what is here must not need room on a disk that is full by then.
        os.posix_fallocate(self._fd, 0, _SLOTS * _SLOT_BYTES)
        self._number = 0
        self._lasting = 0  # which of the first two slots is the next to be synced
        self._boot = _boot_id()

    def read(self) -> tuple[Identity, Spans] | None:
        """Return whose bytes are here for sure, and which. None: nothing is known."""
        found = [(slot, which) for which in range(_SLOTS) if (slot := self._slot(which))]
        if not found:
            return None
        latest, _ = max(found, key=lambda each: each[0].number)
        self._number = latest.number
        synced = [(slot.number, which) for slot, which in found if which < 2]
        self._lasting = 1 - max(synced)[1] if synced else 0
        same_boot = latest.boot == self._boot != ""
        return latest.identity, Spans(latest.written if same_boot else latest.synced)

    def write(
        self, identity: Identity, written: Spans, synced: Spans, *, lasting: bool = False
    ) -> None:
        """Note what is here now: `written` to the file, and `synced` to the disk before.

        A note that is `lasting` has to be synced next.
        """
        self._number += 1
        slot = _Slot(self._number, self._boot, identity, _longest(written), _longest(synced))
        body = msgspec.json.encode(slot)
        head = f"{zlib.crc32(body):08x} {len(body):08x}\n".encode()
        data = head + body
        if len(data) > _SLOT_BYTES:
            raise ValueError("the journal's entry is too long")
        which = 2
        if lasting:
            which, self._lasting = self._lasting, 1 - self._lasting
        os.pwrite(self._fd, data, which * _SLOT_BYTES)

    def sync(self) -> None:
        """Have what was noted on the disk."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _slot(self, which: int) -> _Slot | None:
        return _parsed(os.pread(self._fd, _SLOT_BYTES, which * _SLOT_BYTES))


def _parsed(data: bytes) -> _Slot | None:
    """Return what a slot tells, None if it is not whole."""
    head, newline, rest = data[:17], data[17:18], data[18:]
    try:
        crc, length = (int(word, 16) for word in head.split(b" "))
    except ValueError:
        return None
    body = rest[:length]
    if newline != b"\n" or len(body) != length or zlib.crc32(body) != crc:
        return None
    try:
        return msgspec.json.decode(body, type=_Slot)
    except msgspec.DecodeError:
        return None


def _longest(spans: Spans) -> list[Span]:
    """Return so many of the ranges as a slot holds: the rest is fetched again."""
    if len(spans) <= _MAX_SPANS:
        return list(spans)
    return sorted(sorted(spans, key=lambda span: span[0] - span[1])[:_MAX_SPANS])


def _boot_id() -> str:
    """Return what tells this boot of the machine from others; empty where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def look(path: Path) -> Identity | None:
    """Return whose bytes the journal at `path` tells of, None if of none. Changes nothing."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    slots = range(0, _SLOTS * _SLOT_BYTES, _SLOT_BYTES)
    known = [slot for at in slots if (slot := _parsed(content[at : at + _SLOT_BYTES]))]
    return max(known, key=lambda slot: slot.number).identity if known else None
