"""NVIDIA's GPUs: through NVML, or from what the driver shows below /proc when that fails.

NVML is the module `pynvml` of nvidia-ml-py, which need not be installed. An object with the same
functions stands for it in the tests. Its calls may hang with the driver, or take the process down:
they are for a prober, and there for a thread.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backends.contract import Gpu
from backends.hardware import files

Open = Callable[[], Any]
Answer = tuple[list[Gpu], list[str]]  # and what is wrong, in words
_GPUS = 64
_SIGNS = (
    "proc/driver/nvidia",
    "dev/nvidiactl",
    "usr/lib/wsl/lib/libnvidia-ml.so.1",  # where Windows puts its driver's libraries for WSL
)
_DRIVER_GPUS = "proc/driver/nvidia/gpus"


def pynvml() -> Any:
    """Import NVML's module. Raises ImportError."""
    return importlib.import_module("pynvml")


def expected(root: Path) -> bool:
    """Say whether there is a sign of NVIDIA's driver, without which NVML is not worth asking."""
    return any(files.exists(root / sign) for sign in _SIGNS)


def _text(value: object) -> str:
    """Return NVML's text: bytes in its older versions."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _asked(call: Callable[[], Any]) -> Any:
    """Return an answer, or None: each call may be unsupported on some cards and systems."""
    try:
        return call()
    except Exception:  # noqa: BLE001 - NVML has an exception for each of its 30 errors
        return None


def _gpu(nvml: Any, index: int, driver: str) -> Gpu:
    """Describe one GPU. Raises what NVML raises if the card does not answer at all."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _asked(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    capability = _asked(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    bus = _asked(lambda: _text(nvml.nvmlDeviceGetPciInfo(handle).busId)) or ""
    pci = bus.lower()[-len("0000:00:00.0") :]  # the kernel writes a domain of 4 digits, not 8
    return Gpu(
        id=pci or _asked(lambda: _text(nvml.nvmlDeviceGetUUID(handle))) or f"nvidia:{index}",
        vendor="nvidia",
        name=_asked(lambda: _text(nvml.nvmlDeviceGetName(handle))) or "NVIDIA GPU",
        pci=pci,
        driver=driver,
        total_bytes=_asked(lambda: int(memory.total)),
        free_bytes=_asked(lambda: int(memory.free)),
        compute_capability=_asked(lambda: "{}.{}".format(*capability)) or "",
        processes=_processes(nvml, handle),
        sources=dict.fromkeys(
            ("name", "driver", "total_bytes", "free_bytes", "compute_capability", "processes"),
            "NVML",
        ),
    )


def _processes(nvml: Any, handle: Any) -> dict[int, int]:
    """Return the bytes of each process that computes; Windows and old drivers do not tell them."""
    running = _asked(lambda: list(nvml.nvmlDeviceGetComputeRunningProcesses(handle))) or []
    told = {process.pid: process.usedGpuMemory for process in running}
    return {int(pid): int(size) for pid, size in told.items() if size is not None}


def ask(open_nvml: Open) -> Answer:
    """Return the GPUs that NVML knows, and what is wrong, in words. Never raises; may hang."""
    try:
        nvml = open_nvml()
    except Exception as error:  # noqa: BLE001 - a broken package raises anything on import
        advice = "`pip install nvidia-ml-py` into modeld's environment brings it"
        return [], [f"NVML can't be asked about NVIDIA's GPUs ({error!r}): {advice}"]
    try:
        nvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - as above
        return [], [f"NVML does not start: {error!r}"]
    try:
        return _all(nvml)
    finally:
        _asked(nvml.nvmlShutdown)


def _all(nvml: Any) -> Answer:
    found: list[Gpu] = []
    problems: list[str] = []
    driver = _asked(lambda: _text(nvml.nvmlSystemGetDriverVersion())) or ""
    count = _asked(lambda: int(nvml.nvmlDeviceGetCount()))
    if count is None:
        problems.append("NVML does not say how many GPUs there are")
    for index in range(min(count or 0, _GPUS)):
        try:
            gpu = _gpu(nvml, index, driver)
        except Exception as error:  # noqa: BLE001 - as above
            problems.append(f"NVIDIA GPU {index} does not answer: {error!r}")
            continue
        found.append(gpu)
        if gpu.total_bytes is None:
            problems.append(f"{gpu.name}: NVML does not tell its memory")
    return found, problems


def of_driver(root: Path) -> list[Gpu]:
    """Return the GPUs below /proc/driver/nvidia: names, but no memory."""
    found = []
    for address in files.names(root / _DRIVER_GPUS)[:_GPUS]:
        path = f"{_DRIVER_GPUS}/{address}/information"
        told = files.fields(root / path, ":")
        if "Model" in told:
            found.append(
                Gpu(
                    id=address.lower(),
                    vendor="nvidia",
                    name=told["Model"],
                    pci=address.lower(),
                    driver="nvidia",
                    sources={"name": f"/{path}"},
                )
            )
    return found


def merged(asked: list[Gpu], *others: list[Gpu]) -> list[Gpu]:
    """Return each GPU once, as the first list that knows it describes it."""
    found = list(asked)
    for gpu in (gpu for other in others for gpu in other):
        known = {name for one in found for name in (one.id, one.pci) if name}
        if gpu.id not in known and gpu.pci not in known:
            found.append(gpu)
    return found
