"""Requests of one model and the order of their turns. Plain data: the residency makes every change.

A request waits in the queue of its model until it is its turn, then runs in one of the model's
slots until the engine is done with it.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from daemon.errors import ModeldError

if TYPE_CHECKING:
    from daemon.models.resident import Instance

# A background request gives way to others for so long; after that it is one of them. So it comes
# later, but whatever the others do, it comes.
BACKGROUND_WAITS_S = 30.0
LOAD = "load"  # the kind of a ticket that wants its model loaded and nothing else


class Priority(StrEnum):
    """Whether somebody waits for an answer."""

    INTERACTIVE = "interactive"
    BACKGROUND = "background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a request says about its model besides what it asks it.

    `keep_alive_s` is how long the model stays in memory after it (`math.inf`: until it has to make
    room; 0: not at all; None: as the model or the settings say). `context_length` is the least that
    the model must be loaded with, in tokens.
    """

    keep_alive_s: float | None = None
    context_length: int | None = None
    priority: Priority = Priority.INTERACTIVE


class Ticket:
    """One request, or one wish to have a model loaded (its `kind` is LOAD), from asking to its end.

    `turn` gives its instance once it runs. `arrived`, `since` (when it began to wait this time) and
    `started` are times of the event loop, `asked_at` is in seconds since the epoch.
    `needs_context` is the least context that its model must be loaded with, and `needs_bytes` the
    RAM that such a load takes at least. `pieces` counts the parts of the answer so far. `ended_by`
    is why it was ended from outside; `cancel` has the engine end it, while it runs.
    """

    def __init__(self, number: int, model_id: str, unique: str, kind: str, terms: Terms) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.model_id = model_id
        self.unique = unique
        self.kind = kind
        self.terms = terms
        self.arrived = self.since = loop.time()
        self.asked_at = time.time()
        self.started: float | None = None
        self.needs_context = terms.context_length or 0
        self.needs_bytes = 0
        self.pieces = 0
        self.cancel: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.ended_by: ModeldError | None = None
        self.turn: asyncio.Future[Instance] = loop.create_future()

    @property
    def order(self) -> tuple[float, int]:
        """What tickets are sorted by."""
        waits = BACKGROUND_WAITS_S if self.terms.priority is Priority.BACKGROUND else 0.0
        return self.arrived + waits, self.number

    def again(self) -> None:
        """Wait once more, in the old place."""
        loop = asyncio.get_running_loop()
        self.turn = loop.create_future()
        self.since = loop.time()
        self.started = self.cancel = None

    def refuse(self, error: ModeldError) -> None:
        """End the wait with an error."""
        if not self.turn.done():
            self.turn.set_exception(error)


class Queue:
    """The tickets of one model that wait, in the order of their turns."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(tuple(self._tickets))

    def add(self, ticket: Ticket) -> None:
        """Put a ticket in its place."""
        bisect.insort(self._tickets, ticket, key=lambda other: other.order)

    def first(self, wanted: Callable[[Ticket], bool] = lambda _: True) -> Ticket | None:
        """Return the ticket whose turn is next, of those that are wanted."""
        return next((ticket for ticket in self._tickets if wanted(ticket)), None)

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out; say whether it was there."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            return True
        return False

    def refuse_all(self, error: ModeldError) -> None:
        """End every wait with an error."""
        waiting, self._tickets = self._tickets, []
        for ticket in waiting:
            ticket.refuse(error)
