"""What a computer offers, and what an engine can do on it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. None and "" are facts that could not be had.

    `id` tells it from the others: NVIDIA's UUID or the PCI address. `vendor` is `nvidia`, `amd`,
    `intel` or `apple`. An `integrated` GPU uses the computer's RAM: its memory comes off that.
    `free_bytes` is what was free when it was looked at, and `processes` the bytes that each process
    had, by its id, where the driver tells that. `sources` says where a field came from.
    """

    id: str
    vendor: str
    name: str
    pci: str = ""
    driver: str = ""
    integrated: bool = False
    total_bytes: int | None = None
    free_bytes: int | None = None
    compute_capability: str = ""
    processes: dict[int, int] = field(default_factory=dict, hash=False)
    sources: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a computer offers: the facts a backend may base `fit` and `estimate` on.

    `physical_cores` is how many threads may compute: the physical cores that this process may run
    on, or its CPU quota rounded down if that is less. `logical_cores` counts the CPUs it may run
    on, `affinity` names them, `installed_cores` are all that the machine has (0: not known).
    `ram_bytes` is what this process may use: `installed_ram_bytes`, or `memory_limit_bytes` of its
    cgroups if there is one. `sources` says where a field came from, `problems` what could not be
    found out and, where something can be done, what.
    """

    cpu_model: str
    physical_cores: int
    logical_cores: int
    ram_bytes: int
    platform: str = ""
    installed_cores: int = 0
    affinity: tuple[int, ...] = ()
    cpu_quota: float | None = None
    cpu_features: tuple[str, ...] = ()
    installed_ram_bytes: int = 0
    memory_limit_bytes: int | None = None
    swap_bytes: int = 0
    memory_pressure: bool = False
    gpus: tuple[Gpu, ...] = ()
    problems: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one backend can do on this computer, as its prober found it.

    `reason` is empty for a backend that works; otherwise it says, for a person, why it does not
    and which command would change that. `devices` are the engine's own names for what it can
    compute on. `gpu_vendors` are the vendors (as in `Gpu.vendor`) whose GPUs this build can use.
    """

    backend: str
    available: bool
    version: str = ""
    devices: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    gpu_vendors: tuple[str, ...] = ()
    reason: str = ""
