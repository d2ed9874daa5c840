"""The control groups that this process is in, v1 and v2, and the limits they set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from backends.hardware import files

_DEPTH = 64


def _hierarchy(root: Path, controller: str) -> Path:
    """Return where v1 shows a controller: `cpu`, or with others, in any order: `cpu,cpuacct`."""
    top = root / "sys/fs/cgroup"
    found = (name for name in files.names(top) if controller in name.split(","))
    return top / next(found, controller)


def _groups(root: Path, controller: str) -> Iterator[tuple[bool, Path]]:
    """Yield the groups that may limit `controller`, innermost first, and whether each is v2.

    In a container the paths of /proc/self/cgroup may be the host's: then only the top one exists.
    """
    for line in (files.text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = controllers == ""
        if unified:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = _hierarchy(root, controller)
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")][:_DEPTH]
        for depth in range(len(parts), -1, -1):
            yield unified, top.joinpath(*parts[:depth])


def memory_limit(root: Path) -> tuple[int, str] | None:
    """Return the smallest memory limit in bytes, and the file that says so."""
    found = []
    for unified, group in _groups(root, "memory"):
        path = group / ("memory.max" if unified else "memory.limit_in_bytes")
        limit = files.number(path)
        if limit is not None:
            found.append((limit, f"/{path.relative_to(root)}"))
    return min(found, default=None)


def available_bytes(root: Path) -> int | None:
    """Return what the groups leave this process right now, or None without a limit.

    Page cache counts as free, as it does in /proc/meminfo's MemAvailable. The kernel gives up the
    inactive part of it first; the active part has the weights that models have mapped, and whoever
    counts those takes them off himself.
    """
    left = []
    for unified, group in _groups(root, "memory"):
        limit = files.number(group / ("memory.max" if unified else "memory.limit_in_bytes"))
        usage = files.number(group / ("memory.current" if unified else "memory.usage_in_bytes"))
        if limit is None or usage is None:
            continue
        counters = files.fields(group / "memory.stat", " ")
        cache = 0
        for name in ("inactive_file", "active_file"):
            count = counters.get(f"total_{name}") or counters.get(name)
            cache += files.integer(count) or 0
        left.append(max(0, limit - max(0, usage - cache)))
    return min(left, default=None)


def stalled_us(root: Path) -> tuple[int, int] | None:
    """Return what /proc/pressure/memory says, but of the innermost group that has it (v2)."""
    for unified, group in _groups(root, "memory"):
        if unified and (told := parse_stalls(files.text(group / "memory.pressure"))):
            return told
    return None


def parse_stalls(text: str | None) -> tuple[int, int] | None:
    """Return the microseconds that some, and that all tasks have waited for memory (PSI). Pure."""
    totals = []
    for kind in ("some", "full"):
        line = next((each for each in (text or "").splitlines() if each.startswith(kind)), "")
        total = files.integer(line.rpartition("total=")[2])
        if total is None:
            return None
        totals.append(total)
    return totals[0], totals[1]


def _quota_of(*, unified: bool, group: Path) -> tuple[float, Path] | None:
    if unified:
        path = group / "cpu.max"
        quota, _, period = (files.text(path) or "").partition(" ")
    else:
        path = group / "cpu.cfs_quota_us"
        quota = files.text(path) or ""
        period = files.text(group / "cpu.cfs_period_us") or ""
    time_us, every_us = files.integer(quota), files.integer(period)  # None: "max" and -1
    return (time_us / every_us, path) if time_us and every_us else None


def cpu_quota(root: Path) -> tuple[float, str] | None:
    """Return the smallest CPU quota in CPUs, such as 1.5, and the file that says so."""
    groups = _groups(root, "cpu")
    found = [_quota_of(unified=unified, group=group) for unified, group in groups]
    quotas = [(cpus, f"/{path.relative_to(root)}") for cpus, path in filter(None, found)]
    return min(quotas, default=None)
