"""What a worker's process really uses, read from outside.

Its anonymous memory, plus the resident pages of its own weight files in full: PSS would halve when
two workers map one file, and RSS would count the shared libraries of every process.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from pathlib import Path

import psutil

_MAPPING = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)$")


def parse_smaps(smaps: bytes, files: Collection[str]) -> int:
    """Return the bytes that a process with this /proc/PID/smaps uses. Pure.

    Sums `Anonymous` over all mappings and `Rss` less `Anonymous` over those of `files`.
    """
    wanted = {file.encode() for file in files}
    kilobytes, of_wanted = 0, False
    for line in smaps.splitlines():
        if match := _MAPPING.match(line):
            of_wanted = match[1] in wanted
        elif line.startswith(b"Anonymous:"):
            anonymous = int(line.split()[1])
            # Pages of a mapped file that were written to are anonymous and stand in Rss as well.
            kilobytes += 0 if of_wanted else anonymous
        elif of_wanted and line.startswith(b"Rss:"):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024


def worker_memory(pid: int, files: Collection[str]) -> int:
    """Return the bytes of RAM that process `pid` uses, whose weights are `files`.

    0 if it has gone. Blocks while the kernel walks its page tables: call it off the event loop.
    """
    try:
        if sys.platform == "linux":
            return parse_smaps(Path(f"/proc/{pid}/smaps").read_bytes(), files)
        return int(psutil.Process(pid).memory_info().rss)
    except (OSError, psutil.Error):
        return 0
