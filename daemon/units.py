"""Sizes in words."""

from __future__ import annotations


def size(size_bytes: int) -> str:
    """Return bytes for people, in units of 1024."""
    amount, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if abs(amount) >= 100 or unit == "B" else f"{amount:.1f} {unit}"
