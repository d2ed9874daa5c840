"""What a worker's process really uses, read from outside.

Its anonymous memory, and the resident pages of its own weight files in full: PSS would halve when
two workers map one file, and RSS would count the shared libraries of every process. What the kernel
has swapped out is still its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_MAPPING = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Bytes that a process uses: of its own, and of files that others may map too, by path.

    `gpus` are bytes of GPU memory by `Gpu.id`, where the driver tells.
    """

    private_bytes: int = 0
    files: Mapping[str, int] = field(default_factory=dict, hash=False)
    gpus: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def total_bytes(self) -> int:
        """All of its RAM."""
        return self.private_bytes + sum(self.files.values())


def parse_smaps(smaps: bytes, files: Collection[str]) -> Use:
    """Return what a process with this /proc/PID/smaps uses. Pure.

    Its own is the sum of `Anonymous` and `Swap` over all mappings; of `files`, `Rss` less
    `Anonymous`: pages of a mapped file that were written to are its own.
    """
    wanted = {file.encode(): file for file in files}
    private = 0
    shared = dict.fromkeys(files, 0)
    of_wanted: str | None = None
    for line in smaps.splitlines():
        if match := _MAPPING.match(line):
            of_wanted = wanted.get(match[1])
        elif line.startswith((b"Anonymous:", b"Swap:")):
            kilobytes = int(line.split()[1])
            private += kilobytes
            if of_wanted is not None and line.startswith(b"Anonymous:"):
                shared[of_wanted] -= kilobytes
        elif of_wanted is not None and line.startswith(b"Rss:"):
            shared[of_wanted] += int(line.split()[1])
    return Use(
        private_bytes=private * 1024,
        files={file: size * 1024 for file, size in shared.items() if size > 0},
    )


def parse_private(status: bytes) -> int:
    """Return the bytes of its own that a process with this /proc/PID/status uses. Pure."""
    kilobytes = 0
    for line in status.splitlines():
        if line.startswith((b"RssAnon:", b"VmSwap:")):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024


def worker_use(pid: int, files: Collection[str]) -> Use:
    """Return what process `pid`, whose weights are `files`, uses of RAM; nothing if it has gone.

    Blocks while the kernel walks its page tables: call it off the event loop.
    """
    try:
        if sys.platform == "linux":
            return parse_smaps(Path(f"/proc/{pid}/smaps").read_bytes(), files)
        return Use(private_bytes=int(psutil.Process(pid).memory_info().rss))
    except (OSError, psutil.Error):
        return Use()


def private_bytes(pid: int) -> int:
    """Return the RAM of its own that process `pid` uses, 0 if it has gone. Takes microseconds."""
    try:
        if sys.platform == "linux":
            return parse_private(Path(f"/proc/{pid}/status").read_bytes())
        return int(psutil.Process(pid).memory_info().rss)
    except (OSError, psutil.Error):
        return 0
