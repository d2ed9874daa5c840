"""What one process has of GPUs' own memory, as the kernel tells it.

DRM drivers (amdgpu, i915, xe) say it for each open file of a process: Documentation/gpu/
drm-usage-stats.rst. What ROCm allocates is told by amdkfd, in /sys/class/kfd/kfd/proc. NVIDIA's
driver tells only NVML: see `nvidia`.
"""

from __future__ import annotations

import re
from pathlib import Path

from backends.hardware import files

_KFD = "sys/class/kfd/kfd"
_UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
# vram, vram0, local0: what is on the card; system, gtt and stolen are RAM.
_ON_CARD = re.compile(r"drm-(resident|memory)-((?:vram|local)\d*)")


def gpu_bytes(pid: int, root: Path) -> dict[str, int]:
    """Return the bytes of GPU memory that a process has, by `Gpu.id`; never raises.

    `root` is where /proc and /sys are.
    """
    found = _of_open_files(pid, root)
    for gpu, size in _of_kfd(pid, root).items():
        found[gpu] = max(size, found.get(gpu, 0))
    return found


def _of_open_files(pid: int, root: Path) -> dict[str, int]:
    folder = root / f"proc/{pid}/fdinfo"
    clients: dict[tuple[str, str], int] = {}
    for name in files.names(folder):
        told = files.fields(folder / name, ":")
        pci = told.get("drm-pdev")
        if pci is None:
            continue
        # Copies of one descriptor tell the same client again.
        clients[pci.lower(), told.get("drm-client-id", name)] = _on_card(told)
    totals: dict[str, int] = {}
    for (pci, _), size in clients.items():
        totals[pci] = totals.get(pci, 0) + size
    return totals


def _on_card(told: dict[str, str]) -> int:
    """Return the bytes on the card; amdgpu of before Linux 6.14 calls them `memory`."""
    regions: dict[str, dict[str, int]] = {}
    for key, value in told.items():
        if match := _ON_CARD.fullmatch(key):
            number, _, unit = value.partition(" ")
            size = (files.integer(number) or 0) * _UNITS.get(unit.strip(), 0)
            regions.setdefault(match[2], {})[match[1]] = size
    return sum(sizes.get("resident", sizes.get("memory", 0)) for sizes in regions.values())


def _of_kfd(pid: int, root: Path) -> dict[str, int]:
    folder = root / _KFD / "proc" / str(pid)
    vram = {
        name.removeprefix("vram_"): files.number(folder / name)
        for name in files.names(folder)
        if name.startswith("vram_")
    }
    if not vram:
        return {}
    found: dict[str, int] = {}
    nodes = root / _KFD / "topology" / "nodes"
    for node in files.names(nodes):
        gpu_id = files.text(nodes / node / "gpu_id")
        size = vram.get(gpu_id or "")
        told = files.fields(nodes / node / "properties", " ")
        where = files.integer(told.get("location_id"))
        if size and where is not None:
            domain = files.integer(told.get("domain")) or 0
            pci = f"{domain:04x}:{where >> 8 & 0xFF:02x}:{where >> 3 & 0x1F:02x}.{where & 7:x}"
            found[pci] = size
    return found
