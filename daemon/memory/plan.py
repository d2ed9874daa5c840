"""How one more model gets its memory: whom it takes the place of, or that it must wait. Pure.

Knows models by id and by what it costs to lose them; knows neither processes nor bookings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

Gone = frozenset[str]
_SHORTEST_IDLE_S = 1.0


class Standing(StrEnum):
    """What may be done with a model that is in memory.

    `idle` may be evicted; `busy` may be once its requests have ended; `fixed` never (it is
    pinned); `coming` is being loaded, and `going` unloaded.
    """

    IDLE = "idle"
    BUSY = "busy"
    FIXED = "fixed"
    COMING = "coming"
    GOING = "going"


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """A model that holds memory: `size_bytes` of it.

    `idle_s` is how long nobody has asked it anything, `reload_s` how long its load took. Somebody
    asked for a `kept` one to be loaded, and has not asked for its unload.
    """

    model_id: str
    standing: Standing
    size_bytes: int
    idle_s: float = 0.0
    reload_s: float = 1.0
    kept: bool = False

    @property
    def loss(self) -> float:
        """What evicting it is expected to cost, in seconds of loading again.

        Its load time by the chance that it is wanted again soon, which is taken to fall with the
        time since it was asked last, as caches do that weigh cost against age (GreedyDual-Size,
        Cao and Irani 1997). One that was loaded for its own sake counts ten times.
        """
        return (10 if self.kept else 1) * self.reload_s / max(self.idle_s, _SHORTEST_IDLE_S)


class Way(StrEnum):
    """How a load gets its memory: it fits; others are evicted first; it waits; it can't."""

    FITS = "fits"
    EVICT = "evict"
    WAIT = "wait"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do for a load. `level` is the entry of its ladder that this holds for.

    `models` are those to evict now or, for a load that waits, those it waits for.
    """

    way: Way
    level: int = 0
    models: tuple[str, ...] = ()


def cheapest(
    candidates: Collection[Occupant], enough: Callable[[Gone], bool]
) -> tuple[str, ...] | None:
    """Return the ids of models whose leaving is `enough`, at the smallest loss; None if none are.

    Greedy, by the loss for each byte; what turns out not to be needed stays. Not always the very
    best set, but each one in it is needed.
    """
    chosen: list[Occupant] = []
    for occupant in sorted(candidates, key=lambda o: (o.loss / max(1, o.size_bytes), o.model_id)):
        if enough(_ids(chosen)):
            break
        chosen.append(occupant)
    if not enough(_ids(chosen)):
        return None
    for occupant in sorted(chosen, key=lambda o: (-o.loss, o.model_id)):
        rest = [other for other in chosen if other is not occupant]
        if enough(_ids(rest)):
            chosen = rest
    return tuple(occupant.model_id for occupant in chosen)


def _ids(occupants: Collection[Occupant]) -> Gone:
    return frozenset(occupant.model_id for occupant in occupants)


def decide(
    ladder: Sequence[int], room: Callable[[Gone], int], occupants: Collection[Occupant]
) -> Decision:
    """Say how a load gets its memory.

    `ladder` holds the bytes that it needs, the settings that are best for its user first, then
    smaller ones that would do. `room` returns the bytes that it could take if these models were
    gone. What can be had at once, with idle models evicted, comes before any waiting.
    """
    by = {standing: [o for o in occupants if o.standing is standing] for standing in Standing}
    going = _ids(by[Standing.GOING])
    for level, need in enumerate(ladder):
        if need <= room(frozenset()):
            return Decision(Way.FITS, level)
        if need <= room(going):
            return Decision(Way.WAIT, level, tuple(sorted(going)))
        chosen = cheapest(by[Standing.IDLE], lambda gone, n=need: n <= room(going | gone))  # type: ignore[misc]
        if chosen is not None:
            return Decision(Way.EVICT, level, chosen)
    for level, need in enumerate(ladder):
        enough = lambda gone, n=need: n <= room(going | gone)  # noqa: E731
        chosen = cheapest((*by[Standing.IDLE], *by[Standing.BUSY]), enough)
        if chosen is not None:
            return Decision(Way.WAIT, level, chosen)
    if by[Standing.COMING]:
        return Decision(Way.WAIT, 0, tuple(o.model_id for o in by[Standing.COMING]))
    return Decision(Way.REFUSE, len(ladder) - 1)
