"""RAM, swap, the limits set on this process, and whether the kernel reports memory pressure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil

from backends.hardware import cgroups, files

ROOT = Path("/")
_PSUTIL = "psutil"


def _meminfo(root: Path, name: str) -> int | None:
    kib = files.integer(files.fields(root / "proc/meminfo", ":").get(name, "").removesuffix(" kB"))
    return None if kib is None else kib * 1024


def _told(ask: Callable[[], int]) -> int:
    """Return what the operating system's library says, 0 if it can't."""
    try:
        return int(ask())
    except Exception:  # noqa: BLE001 - it raises all kinds where /proc is not as it expects
        return 0


def installed(root: Path = ROOT) -> tuple[int, str]:
    """Return the computer's RAM in bytes, whoever may use it, and where that was read."""
    total = _meminfo(root, "MemTotal")
    if total:
        return total, "/proc/meminfo MemTotal"
    return _told(lambda: psutil.virtual_memory().total), _PSUTIL


def swap(root: Path = ROOT) -> tuple[int, str]:
    """Return the bytes of swap, and where that was read."""
    total = _meminfo(root, "SwapTotal")
    if total is not None:
        return total, "/proc/meminfo SwapTotal"
    return _told(lambda: psutil.swap_memory().total), _PSUTIL


def pressure(root: Path = ROOT) -> bool:
    """Say whether /proc/pressure/memory can be read: it is there but fails if PSI is off."""
    return (files.text(root / "proc/pressure/memory") or "").startswith("some ")


def pressure_percent(root: Path = ROOT) -> float | None:
    """Return the part of the last 10 s in which some program waited for memory, in percent.

    None where the kernel does not tell.
    """
    for word in (files.text(root / "proc/pressure/memory") or "").split():
        name, _, value = word.partition("=")
        if name == "avg10":
            try:
                return max(0.0, min(100.0, float(value)))
            except ValueError:
                return None
    return None


def stalled_us(root: Path = ROOT) -> tuple[int, int] | None:
    """Return the microseconds that some, and that all tasks have waited for memory since the start.

    Those of this process's own cgroup where the kernel has them, else those of the computer; None
    where it has neither.
    """
    own = cgroups.stalled_us(root)
    return own or cgroups.parse_stalls(files.text(root / "proc/pressure/memory"))


def _available(root: Path) -> int | None:
    """Return the RAM that /proc/meminfo calls available.

    Kernels before 3.14 and WSL 1 do not say it: there it is what is free and the page cache.
    """
    available = _meminfo(root, "MemAvailable")
    free = _meminfo(root, "MemFree")
    if available is not None or free is None:
        return available
    return free + sum(_meminfo(root, name) or 0 for name in ("Buffers", "Cached"))


def ram_bytes(root: Path = ROOT) -> int:
    """Return the RAM that this process may ever use: physical, or its cgroups' limit if less.

    `root` is where /proc and /sys are.
    """
    total, _ = installed(root)
    limit = cgroups.memory_limit(root)
    return min(total, limit[0]) if limit else total


def available_bytes(root: Path = ROOT) -> int:
    """Return the RAM that could be used right now without pushing anything out."""
    available = _available(root)
    if available is None:
        available = _told(lambda: psutil.virtual_memory().available)
    left = cgroups.available_bytes(root)
    return available if left is None else min(available, left)
