"""From the vectors of a text's tokens to one vector, and from logits to scores.

Works on numpy arrays; knows no engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from backends.contract import BackendError


def pool(hidden: Any, mask: Any, mode: str) -> Any:
    """Return a vector (float32) for each text.

    `hidden` is texts × tokens × size, `mask` is 1 for tokens and 0 for padding, which may be on
    either side. `mode` is `mean`, `cls`, `last` or `max`.
    """
    import numpy as np

    rows = np.arange(len(mask))
    if mode == "cls":
        return hidden[rows, mask.argmax(axis=1)]
    if mode == "last":
        return hidden[rows, mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)]
    if mode == "max":
        return np.where(mask[:, :, None] > 0, hidden, -np.inf).max(axis=1)
    weights = mask[:, :, None].astype(np.float32)
    return (hidden * weights).sum(axis=1) / weights.sum(axis=1)


def vector(row: Any, dimensions: int | None, *, normalize: bool) -> bytes:
    """Return a vector as little-endian float32 numbers, cut to its first `dimensions`.

    What was cut is scaled to length 1 anew. Raises BackendError if there are not as many.
    """
    import numpy as np

    if dimensions is not None and not 1 <= dimensions <= len(row):
        raise BackendError(
            "invalid_request",
            f"dimensions is {dimensions}, but this model's vectors have {len(row)}",
        )
    kept = row[:dimensions]
    if normalize or dimensions is not None:
        kept = kept / (np.linalg.norm(kept.astype(np.float64)) or 1.0)
    return bytes(kept.astype("<f4").tobytes())


def sigmoid(logit: float) -> float:
    """Return the score from 0 to 1 of one logit."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))


def probabilities(logits: Sequence[float], *, independent: bool) -> list[float]:
    """Return a score from 0 to 1 for each label; those of labels that exclude each other sum to 1.

    `independent` labels may hold all at once.
    """
    if independent:
        return [sigmoid(logit) for logit in logits]
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return [power / math.fsum(powers) for power in powers]
