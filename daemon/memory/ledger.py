"""The ledger: what is booked for each model, and whether one more fits. Effects: none.

`budget_bytes` is what all models together may take. A reservation is made before a load starts and
kept until the model's process is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from daemon.errors import InsufficientMemory

GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What is booked for one model. `measured_bytes` is 0 until its first measurement."""

    unique: str
    estimate_bytes: int
    measured_bytes: int = 0

    @property
    def reserved_bytes(self) -> int:
        """The larger of what was estimated and what was measured."""
        return max(self.estimate_bytes, self.measured_bytes)


def budget(limit_bytes: int | None, reserve_bytes: int, ram_bytes: int) -> int:
    """Return what models may take: the explicit limit, else the RAM less the reserve."""
    return limit_bytes if limit_bytes is not None else max(0, ram_bytes - reserve_bytes)


class Ledger:
    """Reservations by model id. `available` returns the RAM that is free right now, in bytes."""

    def __init__(self, budget_bytes: int, available: Callable[[], int]) -> None:
        self.budget_bytes = budget_bytes
        self._available = available
        self.reservations: dict[str, Reservation] = {}

    @property
    def reserved_bytes(self) -> int:
        """What is booked for all models."""
        return sum(entry.reserved_bytes for entry in self.reservations.values())

    def available_bytes(self) -> int:
        """Return what another load may take now.

        That is what is left of the budget, and of the RAM that is free once the loads that go on
        have taken what was booked for them.
        """
        untouched = sum(
            max(0, entry.reserved_bytes - entry.measured_bytes)
            for entry in self.reservations.values()
        )
        return max(0, min(self.budget_bytes - self.reserved_bytes, self._available() - untouched))

    def reserve(self, model_id: str, unique: str, estimate_bytes: int) -> None:
        """Book a load. Raises InsufficientMemory, with the numbers, if it does not fit."""
        if estimate_bytes > self.budget_bytes:
            raise InsufficientMemory(
                f"{unique} needs {_gib(estimate_bytes)}, but all models together may take "
                f"{_gib(self.budget_bytes)}: raise [memory] limit, or use a smaller model or a "
                "smaller context_length",
                should_retry=False,
            )
        available = self.available_bytes()
        if estimate_bytes > available:
            raise InsufficientMemory(
                f"{unique} needs {_gib(estimate_bytes)}, but only {_gib(available)} is free now; "
                f"{self._holders()}: unload a model or close other programs",
                retry_after_s=10,
            )
        self.reservations[model_id] = Reservation(unique=unique, estimate_bytes=estimate_bytes)

    def _holders(self) -> str:
        if not self.reservations:
            return "no model is loaded"
        parts = [f"{r.unique} {_gib(r.reserved_bytes)}" for r in self.reservations.values()]
        return f"loaded are {', '.join(parts)}"

    def measured(self, model_id: str, measured_bytes: int) -> None:
        """Note what a model was seen to use; its booking never shrinks below its peak."""
        if entry := self.reservations.get(model_id):
            peak = max(entry.measured_bytes, measured_bytes)
            self.reservations[model_id] = replace(entry, measured_bytes=peak)

    def release(self, model_id: str) -> None:
        """Give back what was booked, once the process is gone."""
        self.reservations.pop(model_id, None)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
