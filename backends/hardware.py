"""What this computer offers: CPU cores that may be used, RAM, and limits set on the process.

Detection never raises: what can't be read falls back to what the operating system's library says.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from backends.contract import Hardware

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_CGROUP_USAGE = (
    Path("/sys/fs/cgroup/memory.current"),
    Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _read_number(paths: tuple[Path, ...]) -> int | None:
    for path in paths:
        try:
            return int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue  # not there, or "max"
    return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown CPU"


def ram_bytes() -> int:
    """Return the RAM that this process may ever use: physical, or its cgroup's limit if less."""
    physical = int(psutil.virtual_memory().total)
    return min(physical, _read_number(_CGROUP_LIMITS) or physical)


def available_bytes() -> int:
    """Return the RAM that could be used right now without pushing anything out."""
    available = int(psutil.virtual_memory().available)
    limit, used = _read_number(_CGROUP_LIMITS), _read_number(_CGROUP_USAGE)
    if limit is None or used is None:
        return available
    return max(0, min(available, limit - used))


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
