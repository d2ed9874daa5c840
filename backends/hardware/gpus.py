"""Every GPU of the computer, from whatever knows of it, before a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from backends.contract import Gpu
from backends.hardware import darwin, drm, files, nvidia

_T = TypeVar("_T")
_MODULES = ("nvidia", "amdgpu", "i915", "xe")


class _Asked(Generic[_T]):
    """A call that may hang, in a thread of its own. The thread is left behind if it does."""

    def __init__(self, call: Callable[[], _T], otherwise: _T) -> None:
        self._call = call
        self._answer = otherwise
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="hardware", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            self._problem = f"failed: {error!r}"

    def _run(self) -> None:
        try:
            self._answer = self._call()
        except Exception as error:  # noqa: BLE001 - whatever it is, the rest can be told
            self._problem = f"failed: {error!r}"

    def answer(self, until: float) -> tuple[_T, str]:
        """Return the answer that is there at `until`, of time.monotonic, and what is wrong."""
        otherwise = self._answer
        if self._thread.ident is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            return otherwise, "did not answer in time"
        return self._answer, self._problem


def fingerprint(root: Path) -> str:
    """Return a text that is another one once a GPU or its driver has changed. Fast; never raises.

    The kernel's own drivers have no version but the kernel's.
    """
    loaded = [
        f"{name} {files.text(root / 'sys/module' / name / 'version') or ''}".strip()
        for name in _MODULES
        if files.exists(root / "sys/module" / name)
    ]
    cards = files.names(root / "proc/driver/nvidia/gpus") + files.names(root / "sys/class/drm")
    kernel = files.text(root / "proc/sys/kernel/osrelease") or ""
    return ", ".join([kernel, *loaded, *cards])


def detect(
    root: Path,
    *,
    system: str,
    sysctl: darwin.Sysctl,
    open_nvml: nvidia.Open | None,
    ram_bytes: int,
    available_bytes: int,
    deadline_s: float,
) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """Return the GPUs, and what could not be found out, in words. Never raises."""
    if system == "darwin":
        gpu = darwin.gpu(sysctl, available_bytes)
        return (gpu,) if gpu else (), ()
    until = time.monotonic() + deadline_s
    none: list[Gpu] = []
    kernel = _Asked(
        lambda: drm.gpus(root, ram_bytes=ram_bytes, available_bytes=available_bytes), none
    )
    unasked: nvidia.Answer = ([], [])
    driven = nvidia.expected(root)
    nvml = _Asked(lambda: nvidia.ask(open_nvml), unasked) if driven and open_nvml else None
    listed, kernel_problem = kernel.answer(until)
    problems = [f"/sys/class/drm {kernel_problem}"] if kernel_problem else []
    nvidias = none
    if nvml:
        (nvidias, nvml_problems), nvml_problem = nvml.answer(until)
        problems += nvml_problems
        if nvml_problem:
            problems.append(f"NVML {nvml_problem}: the memory of NVIDIA's GPUs is not known")
    elif not driven and any(gpu.vendor == "nvidia" for gpu in listed):
        problems.append("an NVIDIA GPU is there without NVIDIA's driver: install it to compute")
    found = nvidia.merged(nvidias, nvidia.of_driver(root) if driven else [], listed)
    return tuple(found), tuple(problems)
