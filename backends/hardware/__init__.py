"""What this computer offers: CPU cores that may be used, RAM, limits set on the process, GPUs.

Detection never raises and takes no longer than its deadline: what can't be read falls back to what
the operating system's library says or is left out, with a reason. Everything is read below a root
directory, so that tests show it other computers. It starts no process and imports no engine, and
without `open_nvml` no vendor's library: what those do to their process is a prober's risk.
"""

from __future__ import annotations

import sys
from pathlib import Path

from backends.contract import Hardware
from backends.hardware import cgroups, cpu, darwin, files, gpus, memory, nvidia, processes
from backends.hardware.memory import (
    ROOT,
    available_bytes,
    pressure_percent,
    ram_bytes,
    stalled_us,
)

__all__ = [
    "ROOT",
    "available_bytes",
    "detect",
    "gpu_bytes",
    "gpu_fingerprint",
    "pressure_percent",
    "ram_bytes",
    "stalled_us",
]

_DEADLINE_S = 1.5  # for what may hang; the rest are reads of small files


def _platform(root: Path, system: str) -> str:
    release = (files.text(root / "proc/sys/kernel/osrelease") or "").lower()
    return "wsl" if system == "linux" and "microsoft" in release else system


def gpu_fingerprint(root: Path = ROOT) -> str:
    """Return a text that is another one once a GPU or its driver has changed. Never raises."""
    return gpus.fingerprint(root)


def gpu_bytes(pid: int, root: Path = ROOT) -> dict[str, int]:
    """Return what a process has of GPUs' own memory, by `Gpu.id`, as far as the kernel tells."""
    return processes.gpu_bytes(pid, root)


def detect(
    root: Path = ROOT,
    *,
    system: str = sys.platform,
    sysctl: darwin.Sysctl = darwin.sysctl,
    open_nvml: nvidia.Open | None = None,
    deadline_s: float = _DEADLINE_S,
) -> Hardware:
    """Return this computer's facts. Never raises; blocks for up to about `deadline_s`.

    `root` is where /proc, /sys and /dev are. `sysctl` is asked where `system` is darwin. Without
    `open_nvml` NVIDIA's GPUs have names, but no memory.
    """
    processor = cpu.detect(root, system=system, sysctl=sysctl)
    memsize = darwin.count(sysctl, "hw.memsize") if system == "darwin" else None
    installed, ram_source = (memsize, "sysctl hw.memsize") if memsize else memory.installed(root)
    swap, swap_source = memory.swap(root)
    limit = cgroups.memory_limit(root)
    limited = limit is not None and limit[0] < installed
    usable = min(installed, limit[0]) if limit else installed
    found, problems = gpus.detect(
        root,
        system=system,
        sysctl=sysctl,
        open_nvml=open_nvml,
        ram_bytes=usable,
        available_bytes=min(usable, available_bytes(root)),
        deadline_s=deadline_s,
    )
    sources = {
        **processor.sources,
        "installed_ram_bytes": ram_source,
        "ram_bytes": limit[1] if limit and limited else ram_source,
        "swap_bytes": swap_source,
        "memory_pressure": "/proc/pressure/memory",
    }
    if limit and limited:
        sources["memory_limit_bytes"] = limit[1]
    return Hardware(
        cpu_model=processor.cpu_model,
        physical_cores=processor.physical_cores,
        logical_cores=processor.logical_cores,
        ram_bytes=usable,
        platform=_platform(root, system),
        installed_cores=processor.installed_cores,
        affinity=processor.affinity,
        cpu_quota=processor.cpu_quota,
        cpu_features=processor.cpu_features,
        installed_ram_bytes=installed,
        memory_limit_bytes=limit[0] if limit and limited else None,
        swap_bytes=swap,
        memory_pressure=memory.pressure(root),
        gpus=found,
        problems=problems,
        sources=sources,
    )
