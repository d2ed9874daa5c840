"""A model's way out of memory. Owns what becomes of its work in flight and its conversations."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from daemon.errors import Conflict, ModeldError, Stopping
from daemon.memory.ledger import Ledger
from daemon.models.loader import Loader
from daemon.models.resident import Instance, ModelState, Resident
from daemon.models.states import States
from daemon.models.turns import Ticket

DRAIN_S = 5.0  # how long an unload that somebody asks for waits for work in flight
HURRIED_SAVE_S = 1.0  # when the memory is needed at once
_SAVE_S = 10.0  # how long a worker may take to write its conversations down
_CANCEL_S = 2.0  # more than a batch of a prompt, which can't be interrupted
_STOP_S = 15.0  # more than measuring and a worker's stop ladder take
log = logging.getLogger(__name__)


class Unloads:
    """Takes models out of memory. `end` ends a request, and `settled` is called after each unload.

    Once `closing` is set, what they are told and what becomes of conversations is what a stop of
    the daemon calls for.
    """

    def __init__(
        self,
        *,
        states: States,
        ledger: Ledger,
        loader: Loader,
        end: Callable[[Ticket, ModeldError], None],
        settled: Callable[[Resident], None],
    ) -> None:
        self.closing = False
        self._states = states
        self._ledger = ledger
        self._loader = loader
        self._end = end
        self._settled = settled

    def begin(
        self, resident: Resident, why: str, *, drain_s: float = 0.0, save_s: float = _SAVE_S
    ) -> None:
        """Take a model out of memory if it is ready: the one way out, whatever the reason.

        Work in flight gets `drain_s`. Its conversations are kept for the next load.
        """
        instance = resident.instance
        if resident.state is not ModelState.READY or instance is None:
            return
        for handle in (resident.expiry, resident.pardon):
            if handle is not None:
                handle.cancel()
        resident.expiry = resident.pardon = None
        log.info("model=%s leaves: %s", resident.unique, why)
        within_s = drain_s + _CANCEL_S + save_s + _STOP_S
        self._states.change(resident, ModelState.UNLOADING, within_s=within_s)
        resident.unload_task = self._states.task(self._unload(resident, instance, drain_s, save_s))

    async def _unload(
        self, resident: Resident, instance: Instance, drain_s: float, save_s: float
    ) -> None:
        try:
            await self._take_leave(resident, instance, drain_s, save_s)
        except asyncio.CancelledError:
            log.warning("model=%s is ended by force", resident.unique)
        except (ModeldError, OSError) as error:
            log.warning("model=%s its conversations are not kept: %s", resident.unique, error)
        finally:
            try:
                await self._loader.give_back(resident.model_id, instance, self._why().message)
            finally:
                resident.instance = None
                resident.pardoned.clear()
                self._states.change(resident, ModelState.UNLOADED)
                self._settled(resident)

    async def _take_leave(
        self, resident: Resident, instance: Instance, drain_s: float, save_s: float
    ) -> None:
        """End what still runs, and have conversations kept. Raises ModeldError and OSError."""
        await _quiet_within(instance, drain_s)
        if instance.running:
            for ticket in tuple(instance.running):
                self._end(ticket, self._why())
            await _quiet_within(instance, _CANCEL_S)
        await self.measure(resident, instance)
        if not instance.running and instance.served:
            await self._loader.keep_conversations(instance, timeout_s=save_s, stopping=self.closing)

    def _why(self) -> ModeldError:
        """Return the error for requests that an unload ends."""
        return Stopping() if self.closing else Conflict("the model was unloaded while it answered")

    async def measure(self, resident: Resident, instance: Instance) -> None:
        """Note what a model uses, in the ledger and for later estimates."""
        use = await self._loader.measure(instance)
        if use is not None and resident.instance is instance:
            self._ledger.measured(resident.model_id, use)
            self._loader.remember(resident.model_id, instance)


async def _quiet_within(instance: Instance, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await instance.quiet.wait()
