"""The line of loads that wait for memory.

Owns whose turn it is, that nobody waits for ever, and that nobody waits in vain again and again.
What to do is decided by `memory.plan`; doing it is the business of whoever made this (`Effects`).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from backends.contract import MemoryEstimate
from daemon.errors import InsufficientMemory, ModeldError
from daemon.memory.ledger import Book, Ledger
from daemon.memory.plan import Decision, Gone, Occupant, Standing, Way, decide
from daemon.models.refusals import refusal
from daemon.models.turns import Ticket

# A busy model goes on as before for this long, or for so many times as long as its own load took,
# before it gives way to one that waits for its memory: a swap costs both of them a load, and in the
# meantime many requests are answered. Never for more than a part of the longest wait.
_PATIENCE_S = 2.0
_LOADS_OF_PATIENCE = 2.0
_PART_OF_WAIT = 1 / 3
# Who was refused after a wait keeps the place in the line for so long, if somebody comes again.
_CLAIM_S = 120.0
log = logging.getLogger(__name__)

Place = tuple[float, int]


class Effects(Protocol):
    """What the line can see and have done."""

    def occupants(self) -> list[Occupant]:
        """Return all models that hold memory."""
        ...

    def evict(self, model_id: str) -> None:
        """Begin to unload an idle model; `Admission.poke` is called once its memory is back."""
        ...

    def drain(self, model_id: str, before: int | None) -> None:
        """Have a busy model run no requests but those with lower numbers; None: all again."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Demand:
    """One load that wants memory.

    `ladder` holds what it could be loaded with, the best first; `files` the keys of the files that
    it maps. `first` returns the ticket that has waited for it the longest; None if nobody waits.
    """

    model_id: str
    unique: str
    ladder: Sequence[MemoryEstimate]
    files: Collection[str]
    first: Callable[[], Ticket | None]
    since: float
    deadline: float
    granted: asyncio.Future[MemoryEstimate] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def needs(self) -> list[int]:
        """The bytes of each step of the ladder."""
        return [estimate.total_bytes for estimate in self.ladder]


@dataclass(frozen=True, slots=True)
class _Claim:
    place: Place
    number: int
    until: float


class Admission:
    """Books memory for one load after another, in the order of those who wait for them."""

    def __init__(self, ledger: Ledger, effects: Effects, *, wait_s: float) -> None:
        self._ledger = ledger
        self._effects = effects
        self._wait_s = wait_s
        self._line: list[Demand] = []
        self._claims: dict[str, _Claim] = {}
        self._draining: dict[str, int] = {}
        self._promised: Demand | None = None  # others are drained for it: nobody overtakes it
        self._passed: set[str] = set()  # loads that passed the one who is at the head
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None

    async def room(self, demand: Demand) -> MemoryEstimate:
        """Book memory for a load and return what it is to be loaded with.

        Waits while others hold what it needs and can be expected to give it back. Raises
        InsufficientMemory with the numbers, or what `leave` was given.
        """
        self._line.append(demand)
        self.poke()
        try:
            return await demand.granted
        except asyncio.CancelledError:
            if demand.granted.done() and not demand.granted.cancelled():
                self._ledger.release(demand.model_id)  # it was granted a moment too late
            raise
        finally:
            self._line.remove(demand)
            if self._promised is demand:
                self._promised = None
            self.poke()

    def leave(self, model_id: str, error: ModeldError) -> None:
        """Take a model's load out of the line, if it is in it, and have it fail with `error`."""
        for demand in self._line:
            if demand.model_id == model_id and not demand.granted.done():
                demand.granted.set_exception(error)

    def waits(self, model_id: str) -> bool:
        """Say whether the model's load is in the line."""
        return any(demand.model_id == model_id for demand in self._waiting())

    def could_ever(self, need_bytes: int, model_id: str) -> bool:
        """Say whether a load of the model might get so much once everybody else made room."""
        return need_bytes <= self._ledger.book().room(self._all_but_fixed() | {model_id})

    def could_now(self, need_bytes: int, model_id: str) -> bool:
        """Say whether a load in place of this model would get so much, with idle ones evicted."""
        gone = {o.model_id for o in self._effects.occupants() if o.standing in _AT_ONCE}
        return need_bytes <= self._ledger.book().room(gone | {model_id})

    def poke(self) -> None:
        """Look at the line again soon: something changed, or is about to."""
        if self._soon is None and self._line:
            self._soon = asyncio.get_running_loop().call_soon(self._look)

    def close(self) -> None:
        """Look no more."""
        for handle in (self._soon, self._timer):
            if handle is not None:
                handle.cancel()

    def _look(self) -> None:
        self._soon = None
        now = asyncio.get_running_loop().time()
        drains: dict[str, int] = {}
        ahead: list[Demand] = []
        for demand in sorted(self._waiting(), key=lambda each: self._place(each, now)):
            if ahead:
                self._serve_behind(demand, ahead, now)
            else:
                drains = self._serve_first(demand, now)
                if demand.granted.done():
                    self._passed.clear()
            if not demand.granted.done():
                ahead.append(demand)
        before, self._draining = self._draining, drains
        for model_id in {*before, *drains}:
            if before.get(model_id) != drains.get(model_id):
                self._effects.drain(model_id, drains.get(model_id))
        self._look_again_later(now)

    def _waiting(self) -> list[Demand]:
        return [demand for demand in self._line if not demand.granted.done()]

    # places

    def _place(self, demand: Demand, now: float) -> Place:
        """Return a demand's place in the line: the smaller comes first."""
        if demand is self._promised:
            return -math.inf, 0
        first, claim = demand.first(), self._claim(demand, now)
        places = [ticket.order for ticket in (first,) if ticket is not None]
        places += [claim.place] if claim is not None else []
        return min(places, default=(math.inf, 0))

    def _claim(self, demand: Demand, now: float) -> _Claim | None:
        claim = self._claims.get(demand.model_id)
        return claim if claim is not None and now < claim.until else None

    def _number(self, demand: Demand, now: float) -> int | None:
        """Return the number of the ticket that others have to give way to."""
        first, claim = demand.first(), self._claim(demand, now)
        numbers = [ticket.number for ticket in (first,) if ticket is not None]
        numbers += [claim.number] if claim is not None else []
        return min(numbers, default=None)

    def _remember(self, demand: Demand, now: float) -> None:
        """Have who comes again after a refusal go on waiting where that one has waited."""
        number = self._number(demand, now)
        place = self._place(demand, now)
        self._claims = {key: each for key, each in self._claims.items() if now < each.until}
        if number is not None:
            self._claims[demand.model_id] = _Claim(place, number, now + _CLAIM_S)

    # serving

    def _all_but_fixed(self) -> Gone:
        return frozenset(
            o.model_id for o in self._effects.occupants() if o.standing is not Standing.FIXED
        )

    def _serve_first(self, demand: Demand, now: float) -> dict[str, int]:
        """Do what can be done for the head of the line; return whom to drain for it, and how."""
        book, occupants = self._ledger.book(), self._effects.occupants()
        decision = self._decided(demand, book, occupants)
        by_id = {occupant.model_id: occupant for occupant in occupants}
        if decision.way is Way.FITS:
            self._grant(demand, decision.level)
        elif decision.way is Way.REFUSE:
            demand.granted.set_exception(self._refusal(demand, book, now))
        elif decision.way is Way.EVICT:
            for model_id in decision.models:
                unique = book.reservations[model_id].unique
                log.info("model=%s makes room for %s", unique, demand.unique)
                self._effects.evict(model_id)
        elif any(by_id[model_id].standing not in _AT_ONCE for model_id in decision.models):
            if now >= demand.deadline:
                self._remember(demand, now)
                demand.granted.set_exception(self._refusal(demand, book, now))
            else:
                return self._drains(demand, [by_id[m] for m in decision.models], now)
        return {}

    def _drains(self, demand: Demand, occupants: Sequence[Occupant], now: float) -> dict[str, int]:
        place, number = self._place(demand, now), self._number(demand, now)
        if number is None or now < place[0]:  # in the background, and others go before it still
            return {}
        drains = {
            occupant.model_id: number
            for occupant in occupants
            if occupant.standing is Standing.BUSY and now >= self._patient_until(demand, occupant)
        }
        if drains:
            self._promised = demand
        return drains

    def _patient_until(self, demand: Demand, occupant: Occupant) -> float:
        patience = max(_PATIENCE_S, _LOADS_OF_PATIENCE * occupant.reload_s)
        return demand.since + min(patience, _PART_OF_WAIT * self._wait_s)

    def _decided(self, demand: Demand, book: Book, occupants: Collection[Occupant]) -> Decision:
        return decide(demand.needs, lambda gone: book.room(gone, demand.files), occupants)

    def _serve_behind(self, demand: Demand, ahead: Sequence[Demand], now: float) -> None:
        """Let a load pass those ahead of it if it takes nothing that they wait for."""
        book = self._ledger.book()
        free = book.room((), demand.files)
        # Who passed before is taken to stay: its memory is not theirs either.
        in_the_end = book.room(self._all_but_fixed() - self._passed)
        spoken_for = sum(min(other.needs) for other in ahead)
        for level, need in enumerate(demand.needs):
            if need <= free and need + spoken_for <= in_the_end:
                self._passed.add(demand.model_id)
                self._grant(demand, level)
                return
        decision = self._decided(demand, book, self._effects.occupants())
        if decision.way is Way.REFUSE or now >= demand.deadline:
            self._remember(demand, now)
            demand.granted.set_exception(self._refusal(demand, book, now))

    def _grant(self, demand: Demand, level: int) -> None:
        estimate = demand.ladder[level]
        gpus = {gpu: sum(parts.values()) for gpu, parts in estimate.gpu_parts.items()}
        self._ledger.reserve(
            demand.model_id, demand.unique, estimate.total_bytes, demand.files, gpus
        )
        self._claims.pop(demand.model_id, None)
        demand.granted.set_result(estimate)

    def _refusal(self, demand: Demand, book: Book, now: float) -> InsufficientMemory:
        return refusal(
            demand.unique,
            demand.ladder,
            demand.files,
            book,
            self._effects.occupants(),
            rule=self._ledger.rule,
            waited_s=now - demand.since,
        )

    def _look_again_later(self, now: float) -> None:
        """Have the line looked at when patience or a wait ends, should nothing change before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = self._waiting()
        busy = [o for o in self._effects.occupants() if o.standing is Standing.BUSY]
        times = [demand.deadline for demand in waiting]
        times += [self._place(demand, now)[0] for demand in waiting]
        times += [self._patient_until(demand, o) for demand in waiting for o in busy]
        later = [when for when in times if now < when < math.inf]
        if later:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(min(later) + 0.001, self.poke)


_AT_ONCE = frozenset({Standing.IDLE, Standing.GOING})  # whose memory needs no waiting for others
