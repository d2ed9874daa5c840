"""Computers that this is not, for tests of what depends on hardware: see tests/unit/hardware."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from backends import hardware

TREES = Path(__file__).parent / "unit" / "hardware"
GIB = 1024**3


class NotSupported(Exception):
    """As pynvml raises it."""


class RecordedNvml:
    """The functions of pynvml, with the answers of another computer."""

    def __init__(self, driver, gpus):
        self.driver, self.gpus = driver, gpus
        self.open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.gpus[index]

    def nvmlDeviceGetName(self, gpu):
        return gpu["name"]

    def nvmlDeviceGetUUID(self, gpu):
        return gpu["uuid"]

    def nvmlDeviceGetPciInfo(self, gpu):
        return SimpleNamespace(busId=gpu["busId"])

    def nvmlDeviceGetMemoryInfo(self, gpu):
        if "total" not in gpu:
            raise NotSupported("Not Supported")
        return SimpleNamespace(total=gpu["total"], free=gpu["free"])

    def nvmlDeviceGetCudaComputeCapability(self, gpu):
        return tuple(gpu["capability"])

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        if "processes" not in gpu:
            raise NotSupported("Not Supported")
        return [
            SimpleNamespace(pid=int(pid), usedGpuMemory=used)
            for pid, used in gpu["processes"].items()
        ]


def lay_out(root, name):
    """Write a computer's files below `root`."""
    for section in (TREES / f"{name}.tree").read_text().split("=== ")[1:]:
        path, _, text = section.partition("\n")
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def recorded_nvml(root):
    return RecordedNvml(**json.loads((root / "nvml.json").read_text()))


def no_nvml():
    raise ModuleNotFoundError("No module named 'pynvml'")


def no_sysctl(name):
    raise AssertionError(f"sysctl {name} asked on Linux")


def see(root, name, *, nvml=None):
    """Detect a Linux computer; `nvml` replaces its recorded answers."""
    lay_out(root, name)
    if nvml is None:
        nvml = no_nvml
        if (root / "nvml.json").exists():
            recorded = recorded_nvml(root)
            nvml = lambda: recorded  # noqa: E731
    return hardware.detect(root, system="linux", sysctl=no_sysctl, open_nvml=nvml)


def see_apple(root, **changed):
    """Detect a Mac; `changed` replaces answers of sysctl."""
    lay_out(root, "apple_silicon")
    lines = (root / "sysctl").read_text().splitlines()
    answers = dict(line.split(": ", 1) for line in lines) | changed
    return hardware.detect(root, system="darwin", sysctl=answers.get, open_nvml=no_sysctl)
