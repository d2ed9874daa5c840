"""What earlier loads were seen to use corrects what is computed for the next one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backends.contract import MemoryEstimate
from daemon.catalog.record import Measurement

# A load that was used little has not touched all that it may: so much more than its peak is kept.
_MARGIN = 1.1


def corrected(
    estimate: MemoryEstimate, settings: str, past: Sequence[Measurement]
) -> MemoryEstimate:
    """Return the estimate as earlier loads of the same files and engine correct it.

    Where one had the same `settings` and was asked something, the estimate ends up between its peak
    and a tenth more. Else, if others took more than was computed for them, it grows by as large a
    part as the worst of them did. The difference is the part `correction`, which may be negative.
    """
    same = next((m for m in past if m.settings == settings and m.served), None)
    total = estimate.total_bytes
    if same is not None:
        wanted = min(max(total, same.peak_bytes), round(same.peak_bytes * _MARGIN))
    else:
        ratios = [m.peak_bytes / m.estimate_bytes for m in past if m.estimate_bytes > 0]
        wanted = round(total * max([1.0, *ratios]))
    if wanted == total:
        return estimate
    return replace(estimate, parts=estimate.parts | {"correction": wanted - total})
