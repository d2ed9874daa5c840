"""No state and no wait lasts for ever: what took too long is ended, and who waited is told why.

Owns whether memory is so short that nobody gets a turn, since that is a wait as well. The line for
memory has a patience of its own (`admission`), and so have loads (`loads`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from daemon.errors import InsufficientMemory, LoadTimeout
from daemon.models.admission import Admission
from daemon.models.loads import Loads
from daemon.models.resident import ModelState, Resident
from daemon.models.states import States
from daemon.models.turns import Ticket

_FORCE_S = 15.0  # how long a state may last once it was ended by force
_SLACK_S = 5.0  # a state that lasts so much longer than it may is ended by force
log = logging.getLogger(__name__)


class Deadlines:
    """Ends what lasts too long.

    Who waits while memory is critical, or for a longer context, may do so for `wait_s` seconds.
    `pump` is called for a model that may go on, and `left` for one from whose queue somebody was
    sent away.
    """

    def __init__(
        self,
        *,
        wait_s: float,
        states: States,
        admission: Admission,
        loads: Loads,
        pump: Callable[[Resident], None],
        left: Callable[[Resident], None],
    ) -> None:
        self._wait_s = wait_s
        self._residents = states.residents
        self._admission = admission
        self._loads = loads
        self._pump = pump
        self._left = left
        self._critical_since: float | None = None

    @property
    def critical(self) -> bool:
        """Whether memory is so short that new requests wait."""
        return self._critical_since is not None

    def hold(self, *, critical: bool) -> None:
        """Have new requests wait while memory is critical, and tell them in the end."""
        now = asyncio.get_running_loop().time()
        if not critical:
            was, self._critical_since = self._critical_since, None
            if was is not None:
                for resident in list(self._residents.values()):
                    self._pump(resident)
            return
        self._critical_since = now if self._critical_since is None else self._critical_since
        for resident in list(self._residents.values()):
            if resident.state is not ModelState.READY:
                continue  # the line for memory has a patience of its own
            for ticket in resident.queue:
                if now - max(ticket.since, self._critical_since) > self._wait_s:
                    self._refuse(
                        resident,
                        ticket,
                        f"the computer has run out of memory, and {resident.unique} takes no new "
                        "requests until that is over: close other programs",
                    )

    def look_after(self) -> None:
        """Do what is due with time: no state and no wait lasts for ever."""
        now = asyncio.get_running_loop().time()
        for resident in list(self._residents.values()):
            if now > resident.deadline + _SLACK_S:
                self._end_by_force(resident)
            instance = resident.instance
            if resident.state is not ModelState.READY or instance is None:
                continue
            for ticket in resident.queue:
                longer = ticket.needs_context > instance.context_length
                if (
                    longer
                    and not instance.running
                    and self._admission.could_now(ticket.needs_bytes, resident.model_id)
                ):
                    self._pump(resident)
                elif longer and now - ticket.since > self._wait_s:
                    self._refuse(
                        resident,
                        ticket,
                        f"{resident.unique} would have to be loaded with a context of "
                        f"{ticket.needs_context} tokens, for which others hold the memory: try "
                        "again later, or unload a model",
                    )
        self._admission.poke()

    def _refuse(self, resident: Resident, ticket: Ticket, text: str) -> None:
        resident.queue.remove(ticket)
        ticket.refuse(InsufficientMemory(text, retry_after_s=10))
        self._left(resident)

    def _end_by_force(self, resident: Resident) -> None:
        log.error("model=%s is %s for too long, ended", resident.unique, resident.state)
        resident.deadline = asyncio.get_running_loop().time() + _FORCE_S
        task = resident.unload_task
        if resident.state is ModelState.LOADING:
            late = LoadTimeout(f"{resident.unique} did not load in time")
            self._loads.give_up(resident, late)
            task = resident.load_task
        elif resident.instance is not None:
            resident.instance.worker.kill("it took too long")
        if task is not None:
            task.cancel()
