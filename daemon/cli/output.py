"""How the commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from daemon.units import size


def known(size_bytes: int | None) -> str:
    """Return a size for people, `-` for one that is not known."""
    return size(size_bytes) if size_bytes else "-"


def count(value: int) -> str:
    """Return a number of parameters for people, such as 135M or 7.2B."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if value >= unit:
            amount = value / unit
            return f"{amount:.0f}{name}" if amount >= 100 else f"{amount:.1f}{name}"
    return str(value) if value else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return left-aligned columns under a header."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_json(data: Any) -> str:
    """Return data for programs."""
    return json.dumps(data, indent=2, ensure_ascii=False)
