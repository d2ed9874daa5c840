"""What macOS says of itself through sysctl(3), and Apple's GPU, which shares the RAM."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from backends.contract import Gpu
from backends.hardware import files

Sysctl = Callable[[str], str | None]
_LIMIT_BYTES = 64 * 1024
_MIB = 1024 * 1024
# What Metal recommends at most (recommendedMaxWorkingSetSize) only Metal tells. As llama.cpp logs
# it, it is two thirds up to here (10922.67 MiB of 16 GiB, 21845.34 of 32), then three quarters
# (27648 MiB of 36 GiB, 49152 of 64). Newer systems recommend more (107.52 of 128 GiB).
_LARGE_BYTES = 36 * 1024 * _MIB
_FEATURES = {
    "hw.optional.neon": "neon",
    "hw.optional.arm64": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512",
}


def sysctl(name: str) -> str | None:
    """Return the value of `name` as text, or None where there is no such thing.

    The call itself is used since the daemon starts no program for this.
    """
    try:
        ask = ctypes.CDLL(None).sysctlbyname
        size = ctypes.c_size_t(0)
        if ask(name.encode(), None, ctypes.byref(size), None, ctypes.c_size_t(0)):
            return None
        if not 0 < size.value <= _LIMIT_BYTES:
            return None
        buffer = ctypes.create_string_buffer(size.value)
        if ask(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0)):
            return None
    except (AttributeError, OSError, ValueError):
        return None
    raw = buffer.raw[: size.value]
    if name.endswith("_string"):
        return raw.rstrip(b"\0").decode("utf-8", "replace")
    return str(int.from_bytes(raw, "little"))


def count(ask: Sysctl, name: str) -> int | None:
    """Return a number greater than 0, or None."""
    return files.integer(ask(name)) or None


def features(ask: Sysctl) -> tuple[str, ...]:
    """Return the instruction sets, under the names that Linux machines get too."""
    return tuple(sorted({feature for name, feature in _FEATURES.items() if ask(name) == "1"}))


def gpu(ask: Sysctl, available_bytes: int) -> Gpu | None:
    """Return the GPU of Apple silicon, or None on another Mac.

    Its memory is the part of the RAM that Metal recommends, unless the system was told a limit.
    """
    total = count(ask, "hw.memsize")
    if ask("hw.optional.arm64") != "1" or total is None:
        return None
    wired = files.integer(ask("iogpu.wired_limit_mb"))
    recommended = total * 3 // 4 if total >= _LARGE_BYTES else total * 2 // 3
    usable = min(total, wired * _MIB) if wired else recommended
    return Gpu(
        id="metal:0",
        vendor="apple",
        name=ask("machdep.cpu.brand_string") or "Apple GPU",
        driver="metal",
        integrated=True,
        total_bytes=usable,
        free_bytes=min(usable, available_bytes),
        sources={
            "name": "sysctl machdep.cpu.brand_string",
            "integrated": "sysctl hw.optional.arm64",
            "total_bytes": "sysctl iogpu.wired_limit_mb"
            if wired
            else "Metal's share of sysctl hw.memsize",
            "free_bytes": "the RAM that is available",
        },
    )
