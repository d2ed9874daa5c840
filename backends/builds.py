"""What a build of llama.cpp can compute on, from what it says of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from backends.contract import Hardware, Probe

# The names of ggml's device backends begin so, with the number of the device behind it.
_VENDORS = {
    "CUDA": ("nvidia",),
    "ROCm": ("amd",),
    "HIP": ("amd",),
    "MUSA": (),
    "Metal": ("apple",),
    "MTL": ("apple",),
    "SYCL": ("intel",),
    "Vulkan": ("nvidia", "amd", "intel"),
}
_GPU_BONUS = 30  # more than what lies between the engines on a CPU


def instruction_sets(system_info: str) -> tuple[str, ...]:
    """Return the names that are on in `CPU : SSE3 = 1 | AVX2 = 1 | …`, as llama.cpp prints it."""
    return tuple(re.findall(r"(\w+) = 1\b", system_info))


def lays_out_anew(system_info: str) -> bool:
    """Say whether a build may keep weights in layouts of its own for the CPU.

    What lays them out for Intel's AMX may crash at the first prompt (its threads load a broken tile
    configuration: github.com/ggml-org/llama.cpp/pull/26954), and there is one switch for all.
    """
    return "AMX_INT8" not in instruction_sets(system_info)


def gpu_vendors(devices: Iterable[str]) -> tuple[str, ...]:
    """Return the vendors whose GPUs the engine's `devices` (`CUDA0`, `Vulkan1`, `CPU`) are."""
    found = {
        vendor
        for device in devices
        for prefix, vendors in _VENDORS.items()
        if device.startswith(prefix)
        for vendor in vendors
    }
    return tuple(sorted(found))


def hide_gpus() -> None:
    """Keep an engine that is about to be imported off every GPU, for a model that the CPU computes.

    It would take memory of each for a context, and compute prompts there, which nobody has booked.
    """
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"):
        os.environ[variable] = ""


def gpu_bonus(probe: Probe, hardware: Hardware) -> tuple[int, str]:
    """Return what a build that can use a GPU of this computer scores on top, and the reason."""
    usable = [
        gpu.name
        for gpu in hardware.gpus
        # Other integrated GPUs are left alone: see placement.
        if gpu.vendor in probe.gpu_vendors and (not gpu.integrated or gpu.vendor == "apple")
    ]
    return (_GPU_BONUS, f", can use {usable[0]}") if usable else (0, "")
