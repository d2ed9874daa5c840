"""What would make models run faster on a computer, or run at all. Pure.

Commands are those of the engines' own install pages: llama-cpp-python's README ("Installation
Configuration"), xllamacpp's README ("Installation"), onnxruntime's "Install ONNX Runtime".
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.contract import Gpu, Hardware, Probe

_GIB = 1024**3
_VENDORS = {"nvidia": "CUDA", "amd": "ROCm", "intel": "Vulkan", "apple": "Metal"}
_NEEDED = {
    "nvidia": "the CUDA toolkit",
    "amd": "ROCm's development packages",
    "intel": "the Vulkan SDK",
    "apple": "Xcode's command line tools",
}
_FLAGS = {
    "nvidia": "-DGGML_CUDA=on",
    "amd": "-DGGML_HIP=on",
    "intel": "-DGGML_VULKAN=on",
    "apple": "-DGGML_METAL=on",
}
_ANEW = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
# The engines for language models: one of them that can use a GPU is enough.
_GGUF = ("xllamacpp", "llama_cpp")
_MOST_PRESSURE_PERCENT = 10.0


def advice(
    hardware: Hardware, probes: Sequence[Probe], *, pressure_percent: float | None = None
) -> list[str]:
    """Return what a person could change, the most useful first.

    `pressure_percent` is the part of the time in which some program waits for memory.
    """
    return [
        *_about_gpus(hardware, [probe for probe in probes if probe.available]),
        *hardware.problems,
        *_about_limits(hardware),
        *_about_builds(hardware, probes),
        *_about_pressure(pressure_percent),
    ]


def _about_gpus(hardware: Hardware, working: Sequence[Probe]) -> list[str]:
    """Name the builds that would use a GPU that none of the engines uses now."""
    texts = []
    worth = [gpu for gpu in hardware.gpus if not gpu.integrated or gpu.vendor == "apple"]
    first = {gpu.vendor: gpu for gpu in reversed(worth)}
    for vendor, gpu in sorted(first.items()):
        engines = [probe for probe in working if probe.backend in _GGUF]
        if engines and not any(vendor in probe.gpu_vendors for probe in engines):
            texts += [_install(probe.backend, gpu) for probe in engines]
        texts += [
            f"onnxruntime is installed without CUDA, and an {gpu.name} is there: for ONNX models "
            "on it, replace it: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
            for probe in working
            if probe.backend == "onnx" and vendor == "nvidia" and vendor not in probe.gpu_vendors
        ]
    return texts


def _install(backend: str, gpu: Gpu) -> str:
    kind = _VENDORS[gpu.vendor]
    if backend == "llama_cpp":
        return (
            f"llama-cpp-python is installed without {kind}, and {gpu.name} is there: with "
            f'{_NEEDED[gpu.vendor]} installed, build it anew: CMAKE_ARGS="{_FLAGS[gpu.vendor]}" '
            f"{_ANEW}"
        )
    if gpu.vendor == "apple":
        command = "pip install --force-reinstall xllamacpp, whose wheel for Macs has it"
    else:
        command = (
            "pip install --force-reinstall xllamacpp --index-url INDEX, where INDEX is the one "
            f"for {kind} on xllamacpp's page"
        )
    return f"xllamacpp is installed without {kind}, and {gpu.name} is there: {command}"


def _about_limits(hardware: Hardware) -> list[str]:
    texts = []
    cores, installed = hardware.physical_cores, hardware.installed_cores
    if hardware.platform == "darwin":
        installed = cores  # the slow cores are left out on purpose
    if cores < installed:
        if hardware.cpu_quota is not None and int(hardware.cpu_quota) <= cores:
            source = hardware.sources.get("cpu_quota", "a control group")
            limit = f"a CPU quota of {hardware.cpu_quota:g} CPUs ({source})"
            change = "raise it (CPUQuota= of a systemd unit, --cpus of a container)"
        else:
            limit = f"the CPUs that it may run on ({_ranges(hardware.affinity)})"
            change = "allow it more (CPUAffinity= or AllowedCPUs= of a systemd unit, taskset)"
        texts.append(
            f"modeld may compute on {cores} of {installed} cores because of {limit}: {change}"
        )
    if hardware.memory_limit_bytes is not None:
        source = hardware.sources.get("memory_limit_bytes", "a control group")
        texts.append(
            f"modeld may use {hardware.memory_limit_bytes / _GIB:.1f} of "
            f"{hardware.installed_ram_bytes / _GIB:.1f} GiB of RAM ({source}): raise that limit "
            "(MemoryMax= of a systemd unit, --memory of a container) for larger models"
        )
    return texts


def _ranges(numbers: Sequence[int]) -> str:
    """Return `0-3,8` for the CPUs 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _about_builds(hardware: Hardware, probes: Sequence[Probe]) -> list[str]:
    """Find engines without instructions that this CPU has, where the difference is large."""
    texts = []
    for probe in probes:
        if probe.backend not in _GGUF or not probe.available or not probe.features:
            continue
        for feature, name in (("avx2", "AVX2"), ("dotprod", "DOTPROD")):
            if feature in hardware.cpu_features and name not in probe.features:
                texts.append(
                    f"{probe.backend} {probe.version} does not use {name}, which this CPU has: "
                    f"llama-cpp-python that is compiled here does: {_ANEW}"
                )
    return texts


def _about_pressure(percent: float | None) -> list[str]:
    if percent is None or percent < _MOST_PRESSURE_PERCENT:
        return []
    text = f"programs waited for memory {percent:.0f} % of the last 10 s"
    return [f"{text}: unload models, close programs, or lower [memory] limit"]
