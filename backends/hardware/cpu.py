"""The CPU: its model, its instruction sets, and how much of it this process may use."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from backends.hardware import cgroups, darwin, files

_CPUINFO_BYTES = 4 * 1024 * 1024  # 1.5 KB a CPU
_THREADS_OF_A_CORE = ("core_cpus_list", "thread_siblings_list")  # the new name and the old one
_CORE_IDS = "/proc/cpuinfo physical id, core id"
_FEATURES = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
    "amx_tile": "amx",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "neon",
    "asimd": "neon",  # its name on 64-bit ARM
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The CPU's part of `Hardware`: the fields mean the same."""

    cpu_model: str
    physical_cores: int
    logical_cores: int
    installed_cores: int = 0
    affinity: tuple[int, ...] = ()
    cpu_quota: float | None = None
    cpu_features: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)


def _processors(root: Path) -> dict[int, dict[str, str]]:
    """Return the fields of each CPU in /proc/cpuinfo, and under -1 those that came before any."""
    found: dict[int, dict[str, str]] = {}
    current = found.setdefault(-1, {})
    for line in (files.text(root / "proc/cpuinfo", _CPUINFO_BYTES) or "").splitlines():
        name, colon, value = line.partition(":")
        name, value = name.strip(), value.strip()
        if name == "processor" and (number := files.integer(value)) is not None:
            current = found.setdefault(number, {})
        elif colon:
            current[name] = value
    return found


def _affinity(root: Path, online: frozenset[int]) -> tuple[frozenset[int], str]:
    """Return the CPUs that this process may run on."""
    if root == Path("/") and hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0)), "sched_getaffinity(2)"
    status = files.fields(root / "proc/self/status", ":")
    allowed = files.cpu_list(status.get("Cpus_allowed_list"))
    if allowed & online or (allowed and not online):  # it may name CPUs that are not there
        return allowed & online or allowed, "/proc/self/status Cpus_allowed_list"
    if online:
        return online, "/proc/cpuinfo"
    return frozenset(range(os.cpu_count() or 1)), "os.cpu_count"


def _core_of(root: Path, cpu: int, processor: dict[str, str]) -> tuple[str, str] | None:
    """Return a name of the core that a CPU is a thread of, and where that was read."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in _THREADS_OF_A_CORE:
        if siblings := files.cpu_list(files.text(topology / name)):
            return str(min(siblings)), "/sys/devices/system/cpu/*/topology"
    if "core id" in processor:
        core = f"{processor.get('physical id')}.{processor['core id']}"
        return core, _CORE_IDS
    return None


def _alike(cpus: list[dict[str, str]]) -> bool:
    """Say whether several CPUs claim to be the same one: WSL 1 gives each the ids of the first."""
    ids = {cpu.get("apicid") for cpu in cpus}
    return len(cpus) > 1 and len(ids) == 1 and None not in ids


def _cores(
    root: Path, cpus: frozenset[int], processors: dict[int, dict[str, str]]
) -> tuple[int, str]:
    """Count the physical cores behind `cpus`."""
    found = [_core_of(root, cpu, processors.get(cpu, {})) for cpu in cpus]
    known = [core for core in found if core]
    if found and len(known) == len(found):
        source = known[0][1]
        told = [processors.get(cpu, {}) for cpu in cpus]
        if source != _CORE_IDS or not _alike(told):
            return len({name for name, _ in known}), source
        if cores := files.integer(told[0].get("cpu cores")):
            return min(cores, len(cpus)), "/proc/cpuinfo cpu cores"
    return len(cpus), "one for each CPU: no topology is known"


def _linux(root: Path) -> Cpu:
    processors = _processors(root)
    online = frozenset(cpu for cpu in processors if cpu >= 0)
    affinity, affinity_source = _affinity(root, online)
    cores, cores_source = _cores(root, affinity, processors)
    installed, _ = _cores(root, online or affinity, processors)
    sources = {
        "affinity": affinity_source,
        "logical_cores": affinity_source,
        "physical_cores": cores_source,
        "installed_cores": cores_source,
        "cpu_features": "/proc/cpuinfo",
    }
    quota = cgroups.cpu_quota(root)
    if quota:
        sources["cpu_quota"] = quota[1]
        if int(quota[0]) < cores:
            # Rounded down: threads beyond a quota stop all of them, the daemon's too, until the
            # next period.
            cores, sources["physical_cores"] = max(1, int(quota[0])), quota[1]
    model, sources["cpu_model"] = _model(root, processors)
    return Cpu(
        cpu_model=model,
        physical_cores=cores,
        logical_cores=len(affinity),
        installed_cores=installed,
        affinity=tuple(sorted(affinity)),
        cpu_quota=quota[0] if quota else None,
        cpu_features=_features(processors),
        sources=sources,
    )


def _model(root: Path, processors: dict[int, dict[str, str]]) -> tuple[str, str]:
    for name in ("model name", "Model", "Hardware"):
        for processor in processors.values():
            if processor.get(name):
                return processor[name], f"/proc/cpuinfo {name}"
    if board := files.text(root / "proc/device-tree/model"):
        return board, "/proc/device-tree/model"
    return "unknown CPU", "not found"


def _features(processors: dict[int, dict[str, str]]) -> tuple[str, ...]:
    """Return what every CPU can do: the cores of one computer may differ."""
    flags = [p.get("flags") or p.get("Features") or "" for p in processors.values()]
    each = [
        {_FEATURES[word] for word in text.split() if word in _FEATURES} for text in flags if text
    ]
    return tuple(sorted(set.intersection(*each))) if each else ()


def _darwin(ask: darwin.Sysctl) -> Cpu:
    """Ask macOS. Only the fast cores compute: the slow ones would make them wait."""
    fast = darwin.count(ask, "hw.perflevel0.physicalcpu")
    installed = darwin.count(ask, "hw.physicalcpu")
    logical = darwin.count(ask, "hw.logicalcpu") or psutil.cpu_count() or 1
    cores = fast or installed or logical
    return Cpu(
        cpu_model=ask("machdep.cpu.brand_string") or "unknown CPU",
        physical_cores=min(cores, logical),
        logical_cores=logical,
        installed_cores=installed or 0,
        cpu_features=darwin.features(ask),
        sources={
            "cpu_model": "sysctl machdep.cpu.brand_string",
            "physical_cores": f"sysctl hw.{'perflevel0.' if fast else ''}physicalcpu",
            "logical_cores": "sysctl hw.logicalcpu",
            "installed_cores": "sysctl hw.physicalcpu",
            "cpu_features": "sysctl hw.optional",
        },
    )


def detect(root: Path, *, system: str, sysctl: darwin.Sysctl) -> Cpu:
    """Return the CPU's facts. Never raises."""
    return _darwin(sysctl) if system == "darwin" else _linux(root)
