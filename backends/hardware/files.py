"""Bounded reads below a root directory: what the other modules know of /proc and /sys.

Nothing here raises, blocks on a pipe, or reads more than it was told to.
"""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

_SMALL_BYTES = 64 * 1024
_ENTRIES = 4096


def raw(path: Path, limit_bytes: int = _SMALL_BYTES) -> bytes | None:
    """Return the beginning of a regular file, or None if it can't be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit_bytes)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def text(path: Path, limit_bytes: int = _SMALL_BYTES) -> str | None:
    """Return the beginning of a text file, or None if it can't be read."""
    content = raw(path, limit_bytes)
    return None if content is None else content.decode("utf-8", "replace").strip("\0 \t\r\n")


def integer(value: str | None, base: int = 10) -> int | None:
    """Return a number of up to 64 bits that is not negative, or None for anything else."""
    try:
        number = int(value or "", base)
    except ValueError:
        return None
    return number if 0 <= number < 2**64 else None


def number(path: Path) -> int | None:
    """Return the number that a file holds, or None: not there, or something like "max"."""
    return integer(text(path))


def fields(path: Path, separator: str) -> dict[str, str]:
    """Return the `name<separator>value` lines of a file; later ones of a name count."""
    lines = (text(path) or "").splitlines()
    pairs = (line.partition(separator) for line in lines if separator in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted; [] if it can't be read."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, _ENTRIES))
    except (OSError, ValueError):
        return []


def exists(path: Path) -> bool:
    """Say whether something is there that this process may see."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def cpu_list(value: str | None) -> frozenset[int]:
    """Return the CPUs of a kernel list such as "0-3,8"; what isn't one is left out."""
    cpus: set[int] = set()
    for part in (value or "").split(","):
        first, _, last = part.partition("-")
        start = integer(first)
        end = integer(last) if last else start
        if start is not None and end is not None and end < _ENTRIES:
            cpus.update(range(start, end + 1))
    return frozenset(cpus)
