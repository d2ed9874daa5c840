"""A model's way into memory, and out of it by a crash. Owns what becomes of a load that goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from backends.contract import MemoryEstimate
from daemon.catalog.database import Catalog
from daemon.config import Models as ModelSettings
from daemon.errors import (
    InsufficientMemory,
    InternalError,
    LoadFailed,
    LoadTimeout,
    ModeldError,
)
from daemon.models.admission import Admission, Demand
from daemon.models.choice import Wish
from daemon.models.loader import Loader, Watch
from daemon.models.resident import Instance, ModelState, Resident, crash_delay
from daemon.models.states import States
from daemon.workers.worker import Worker

_BACKENDS = 8  # more than one model could be tried with, one after the other
_PROGRESS_STEP = 0.05  # of a load, after which it is told
log = logging.getLogger(__name__)


class Loads:
    """Loads models: one load for all who wait for it. `settled` is called after each end of one."""

    def __init__(
        self,
        *,
        settings: ModelSettings,
        wait_s: float,
        catalog: Catalog,
        states: States,
        loader: Loader,
        admission: Admission,
        settled: Callable[[Resident], None],
    ) -> None:
        self._wait_s = wait_s
        self._longest_s = wait_s + _BACKENDS * settings.load_timeout_s
        self._catalog = catalog
        self._states = states
        self._loader = loader
        self._admission = admission
        self._settled = settled

    def begin(self, resident: Resident) -> None:
        """Load a model that is not in memory."""
        # All before the task begins: an unload may come first.
        resident.unload_wanted.clear()
        resident.given_up = None
        resident.progress = 0.0
        resident.needs = max((ticket.needs_context for ticket in resident.queue), default=0)
        self._states.change(resident, ModelState.LOADING, within_s=self._longest_s)
        resident.load_task = self._states.task(self._load(resident))

    def give_up(self, resident: Resident, error: ModeldError) -> None:
        """Have a load that goes on end soon; who waits for it now gets an error that says why."""
        resident.queue.refuse_all(error)
        resident.given_up = resident.given_up or error
        resident.unload_wanted.set()
        self._admission.leave(resident.model_id, error)
        if resident.loading_worker is not None:
            resident.loading_worker.kill(error.message)

    async def _load(self, resident: Resident) -> None:
        try:
            instance = await self._loaded(resident)
        except ModeldError as error:
            self._not_loaded(resident, error)
        except asyncio.CancelledError:  # it took too long, and somebody saw that
            self._not_loaded(resident, LoadTimeout(f"{resident.unique} did not load in time"))
        except Exception as error:
            log.exception("model=%s load failed", resident.unique)
            self._not_loaded(resident, InternalError(f"internal error: {error!r}"))
        else:
            resident.loading_worker = None
            resident.instance = instance
            instance.explicit, instance.keep_alive_s = resident.carried
            resident.carried = (False, None)
            resident.last_error = ""
            resident.progress = 1.0
            resident.context_length = instance.loaded.context_length
            resident.slots = instance.loaded.slots
            resident.load_s = instance.load_s
            resident.watch_task = self._states.task(self._watch(resident, instance))
            self._states.change(resident, ModelState.READY)
        self._settled(resident)

    async def _loaded(self, resident: Resident) -> Instance:
        """Return a loaded instance. Raises ModeldError."""
        await self._pause_after_crashes(resident)
        record = self._catalog.get(resident.model_id)
        resident.follow(record)
        wish = Wish(context_length=max(resident.wish, resident.needs), least=resident.needs)
        instance = await self._loader.load(record, self._watched(resident), wish)
        if resident.given_up is not None:
            await self._loader.give_back(resident.model_id, instance, resident.given_up.message)
            raise resident.given_up
        return instance

    async def _pause_after_crashes(self, resident: Resident) -> None:
        delay = crash_delay(resident.crashes, asyncio.get_running_loop().time())
        if delay:
            log.warning("model=%s crashed often: loads again in %.1f s", resident.unique, delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await resident.unload_wanted.wait()
        _check_wanted(resident)

    def _watched(self, resident: Resident) -> Watch:
        """Return what a load is to tell of itself, and where it gets its memory."""
        since = asyncio.get_running_loop().time()

        def started(worker: Worker) -> None:
            resident.loading_worker = worker
            if resident.given_up is not None:
                worker.kill(resident.given_up.message)

        told = 0.0

        def progress(fraction: float) -> None:
            nonlocal told
            resident.progress = fraction
            if fraction >= told + _PROGRESS_STEP:
                told = fraction
                self._catalog.changed(resident.model_id)

        def busy() -> int:
            others = self._states.residents.values()
            return sum(1 for other in others if other is not resident and other.running)

        async def room(
            backend: str, ladder: list[MemoryEstimate], files: frozenset[str]
        ) -> MemoryEstimate:
            _check_wanted(resident)
            resident.backend, resident.estimate_bytes = backend, ladder[0].total_bytes
            granted = await self._admission.room(
                Demand(
                    model_id=resident.model_id,
                    unique=resident.unique,
                    ladder=ladder,
                    files=files,
                    first=resident.queue.first,
                    since=since,
                    deadline=since + self._wait_s,
                )
            )
            resident.estimate_bytes = granted.total_bytes
            return granted

        return Watch(started=started, progress=progress, busy=busy, room=room)

    def _not_loaded(self, resident: Resident, error: ModeldError) -> None:
        """Put the state right after a load that failed, and tell those who waited for it."""
        resident.loading_worker = None
        resident.carried = (False, None)
        if resident.given_up is not None:  # who waited then was told; who came since waits on
            if isinstance(resident.given_up, LoadTimeout):
                self._failed(resident, resident.given_up)
            else:
                self._states.change(resident, ModelState.UNLOADED)
            return
        if isinstance(error, InsufficientMemory) and resident.needs:
            # The others may do with the usual context: it is loaded again for them.
            resident.wish = 0
            for ticket in resident.queue:
                if ticket.needs_context:
                    resident.queue.remove(ticket)
                    ticket.refuse(error)
            self._states.change(resident, ModelState.UNLOADED)
            return
        if isinstance(error, LoadFailed | LoadTimeout | InternalError):
            self._failed(resident, error)
        else:  # it was refused, and nothing is wrong with the model
            resident.last_error = error.message
            self._states.change(resident, ModelState.UNLOADED)
        resident.queue.refuse_all(error)

    def _failed(self, resident: Resident, error: ModeldError) -> None:
        resident.last_error = error.message
        resident.crashes.append(asyncio.get_running_loop().time())
        self._states.change(resident, ModelState.FAILED)

    async def _watch(self, resident: Resident, instance: Instance) -> None:
        """Wait for the worker's end; one that nobody asked for is a crash."""
        crash = await asyncio.shield(instance.worker.ended)
        if crash is None:
            return
        await self._loader.give_back(resident.model_id, instance, "it crashed")
        if resident.state is not ModelState.READY or resident.instance is not instance:
            return  # an unload is under way, and puts the state right itself
        # The state changes only now, and at once: until here nobody could be given a turn or load
        # the model again, so there is no second copy beside what the first one still held.
        resident.instance = None
        self._failed(resident, crash)
        self._settled(resident)


def _check_wanted(resident: Resident) -> None:
    """Raise what a load was given up for, if it was."""
    if resident.given_up is not None:
        raise resident.given_up
