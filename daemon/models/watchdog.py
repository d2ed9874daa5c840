"""Watches the machine's memory, and has idle models leave in time.

In time is before the kernel swaps or kills: when less RAM than the watermark is available, whoever
took it; when programs wait for memory (PSI); and when models have outgrown what they may take
together. If nobody is idle and it gets critical, new requests wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from daemon.memory.ledger import Book, Ledger
from daemon.memory.plan import Gone, Occupant, Standing, cheapest
from daemon.units import size

PERIOD_S = 0.5
# Parts of the time in which some, or all, programs waited for memory. A single period may be the
# loading of a file; two in a row are not.
_SOME, _ALL = 0.2, 0.1
_PERIODS = 2
_CRITICAL = 0.5  # of the watermark
log = logging.getLogger(__name__)

Stalls = Callable[[], tuple[int, int] | None]


class Models(Protocol):
    """What the watchdog sees of models and can have done."""

    def occupants(self) -> list[Occupant]:
        """Return all models that hold memory."""
        ...

    def evict(self, model_id: str, *, hurry: bool = False) -> None:
        """Begin to unload an idle model; `hurry` if the memory is needed at once."""
        ...

    def note_growth(self) -> None:
        """Book what models have come to use."""
        ...

    def hold(self, *, critical: bool) -> None:
        """Have new requests wait while memory is critical."""
        ...

    def look_after(self) -> None:
        """Do what is due with time."""
        ...


class Watchdog:
    """See the module. `stalls` returns what `hardware.stalled_us` does."""

    def __init__(self, models: Models, ledger: Ledger, stalls: Stalls) -> None:
        self._models = models
        self._ledger = ledger
        self._stalls = stalls
        self._seen: tuple[float, tuple[int, int]] | None = None
        self._stalled_periods = 0
        self._critical = False
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Watch from now on."""
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                self.look()
            except Exception:  # the one who watches the others must go on
                log.exception("the watchdog failed")

    def look(self) -> None:
        """Look once, and do what has to be done."""
        self._models.look_after()
        if not self._ledger.reservations:
            self._hold(critical=False)
            return
        self._models.note_growth()
        book, stalled = self._ledger.book(), self._is_stalled()
        spare = book.spare_bytes()
        occupants = self._models.occupants()
        going = _ids(occupants, Standing.GOING)
        missing = max(
            book.watermark_bytes - spare,
            self._ledger.reserved_bytes - book.budget_bytes,
            1 if stalled else 0,
        ) - book.held_bytes(going)
        idle = [o for o in occupants if o.standing is Standing.IDLE]
        if missing > 0:
            self._evict(missing, book, idle, going)
        low = book.watermark_bytes * (1.0 if self._critical else _CRITICAL)
        self._hold(critical=spare < low and not idle and not going)

    def _evict(self, missing: int, book: Book, idle: list[Occupant], going: Gone) -> None:
        already = book.held_bytes(going)

        def enough(gone: Gone) -> bool:
            return book.held_bytes(gone | going) - already >= missing

        chosen = cheapest(idle, enough)
        for model_id in tuple(o.model_id for o in idle) if chosen is None else chosen:
            spare = size(max(0, book.spare_bytes()))
            unique = book.reservations[model_id].unique
            log.warning("model=%s leaves: memory is short, %s is spare", unique, spare)
            self._models.evict(model_id, hurry=True)

    def _hold(self, *, critical: bool) -> None:
        if critical != self._critical:
            text = "critical: new requests wait" if critical else "enough again"
            log.warning("memory is %s", text)
        if critical or self._critical:
            self._models.hold(critical=critical)
        self._critical = critical

    def _is_stalled(self) -> bool:
        """Say whether programs have kept waiting for memory for some periods."""
        now, told = asyncio.get_running_loop().time(), self._stalls()
        before, self._seen = self._seen, (now, told) if told is not None else None
        if told is None or before is None or now <= before[0]:
            return False
        passed_us = (now - before[0]) * 1e6
        some, full = ((told[kind] - before[1][kind]) / passed_us for kind in (0, 1))
        self._stalled_periods = self._stalled_periods + 1 if some > _SOME or full > _ALL else 0
        return self._stalled_periods >= _PERIODS


def _ids(occupants: list[Occupant], standing: Standing) -> Gone:
    return frozenset(o.model_id for o in occupants if o.standing is standing)
