"""Embedding vectors as bytes: little-endian float32, of length 1. Pure."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence

from backends.contract import BackendError


def pack(values: Sequence[float], dimensions: int | None = None) -> bytes:
    """Return the first `dimensions` of `values` (None: all), scaled to length 1.

    Raises BackendError if there are fewer, and for numbers that are not finite.
    """
    if dimensions is not None and dimensions > len(values):
        raise BackendError(
            "invalid_request",
            f"dimensions is {dimensions}, but this model's vectors have {len(values)}",
        )
    kept = values[:dimensions]
    if not all(map(math.isfinite, kept)):
        raise BackendError("engine_error", "the model computed numbers that are none (NaN)")
    length = math.sqrt(math.fsum(value * value for value in kept)) or 1.0
    packed = array("f", (value / length for value in kept))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
