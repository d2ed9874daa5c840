"""What this computer offers: CPU cores that may be used, RAM, and limits set on the process.

Detection never raises: what can't be read falls back to what the operating system's library says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from backends.contract import Hardware


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # not there, or "max"


def _memory_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the memory cgroups that this process is in, innermost first.

    Each with the names of its limit and its usage, which differ between cgroup v1 and v2. In a
    container the paths of /proc/self/cgroup may be the host's: then only the top one exists.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = top / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(top):
                yield (group, *names)


def _inactive_file(group: Path) -> int:
    """Return the bytes of page cache that the kernel would give up first."""
    try:
        text = (group / "memory.stat").read_text(encoding="ascii")
    except OSError:
        return 0
    fields = dict(line.split(" ", 1) for line in text.splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown CPU"


def ram_bytes(root: Path = Path("/")) -> int:
    """Return the RAM that this process may ever use: physical, or its cgroups' limit if less.

    `root` is where /proc and /sys are.
    """
    physical = int(psutil.virtual_memory().total)
    limits = [_number(group / limit) for group, limit, _ in _memory_groups(root)]
    return min([physical, *(limit for limit in limits if limit is not None)])


def available_bytes(root: Path = Path("/")) -> int:
    """Return the RAM that could be used right now without pushing anything out."""
    available = [int(psutil.virtual_memory().available)]
    for group, limit_name, usage_name in _memory_groups(root):
        limit, usage = _number(group / limit_name), _number(group / usage_name)
        if limit is not None and usage is not None:
            available.append(limit - (usage - _inactive_file(group)))
    return max(0, min(available))


def detect() -> Hardware:
    """Return this computer's facts."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    logical = logical or 1
    physical = psutil.cpu_count(logical=False) or logical
    return Hardware(
        cpu_model=_cpu_model(),
        physical_cores=max(1, min(physical, logical)),
        logical_cores=logical,
        ram_bytes=ram_bytes(),
    )
