"""Who may use which model, and when a model leaves. Gives turns, has models loaded and unloaded.

The rule: whoever wants a model joins its queue, and nobody reads a state and acts on it after an
await. `pump` looks at one model after each change, and gives turns or starts what has to start; it
never waits. The clock is the event loop's.
"""

from __future__ import annotations

import asyncio
import itertools
import math

from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.config import Memory as MemorySettings
from daemon.config import Models as ModelSettings
from daemon.config import parse_duration
from daemon.errors import Conflict, ModeldError, Stopping
from daemon.memory.ledger import Ledger
from daemon.memory.plan import Occupant, Standing
from daemon.models.admission import Admission
from daemon.models.deadlines import Deadlines
from daemon.models.loader import Loader
from daemon.models.loads import Loads
from daemon.models.resident import Instance, ModelState, Resident
from daemon.models.states import States
from daemon.models.turns import LOAD, Terms, Ticket
from daemon.models.unloads import DRAIN_S, HURRIED_SAVE_S, Unloads

_MEASURE_S = 5.0  # the kernel walks page tables for it, so not after each of many short requests
# A model that is to make room runs for so long without its other users before it is seen that the
# answers which are left take long; until one of these ends, the others get their turns again.
_PARDON_S = 20.0


class Residency:
    """See the module. Must be used on the event loop's thread."""

    def __init__(
        self,
        *,
        models: ModelSettings,
        memory: MemorySettings,
        catalog: Catalog,
        ledger: Ledger,
        loader: Loader,
    ) -> None:
        self._settings = models
        self._ledger = ledger
        self._loader = loader
        self._states = States(catalog, ledger)
        self.residents = self._states.residents
        self.admission = Admission(ledger, self, wait_s=memory.wait_s)
        self._loads = Loads(
            settings=models,
            wait_s=memory.wait_s,
            catalog=catalog,
            states=self._states,
            loader=loader,
            admission=self.admission,
            settled=self._settled,
        )
        self._unloads = Unloads(
            states=self._states,
            ledger=ledger,
            loader=loader,
            end=self.end,
            settled=self._settled,
        )
        self._deadlines = Deadlines(
            wait_s=memory.wait_s,
            states=self._states,
            admission=self.admission,
            loads=self._loads,
            pump=self.pump,
            left=self._left,
        )
        self._numbers = itertools.count(1)

    @property
    def critical(self) -> bool:
        """Whether memory is so short that new requests wait."""
        return self._deadlines.critical

    def of(self, record: ModelRecord) -> Resident:
        """Return what is remembered of a model."""
        return self._states.of(record)

    def ticket(self, resident: Resident, kind: str, terms: Terms) -> Ticket:
        """Return a new ticket for the model; it does not wait yet."""
        return Ticket(next(self._numbers), resident.model_id, resident.unique, kind, terms)

    # turns

    async def turn(self, resident: Resident, ticket: Ticket) -> Instance:
        """Wait for the ticket's turn, and have the model loaded if need be; a slot is taken then.

        Raises ModeldError. Whoever got a turn reports its end to `finished`.
        """
        if ticket.ended_by is not None:
            raise ticket.ended_by
        resident.queue.add(ticket)
        self.pump(resident)
        try:
            return await ticket.turn
        except asyncio.CancelledError:
            if resident.queue.remove(ticket):
                self._left(resident)
            elif ticket.kind != LOAD and _has_turn(ticket):
                self.finished(resident, ticket.turn.result(), ticket)
            raise

    def _left(self, resident: Resident) -> None:
        """Look at a model from whose queue somebody has gone without a turn."""
        if not len(resident.queue) and self.admission.waits(resident.model_id):
            reason = f"nobody waits for {resident.unique} any more"
            self._loads.give_up(resident, Conflict(reason))
        self.pump(resident)

    def pump(self, resident: Resident) -> None:
        """Give turns, and start the load or the unload that is due. Never waits."""
        instance = resident.instance
        if self._unloads.closing:
            resident.queue.refuse_all(Stopping())
        elif resident.state is ModelState.READY and instance is not None and instance.alive:
            self._give_turns(resident, instance)
            self._rest(resident, instance)
            self.admission.poke()
        elif resident.state in (ModelState.UNLOADED, ModelState.FAILED) and len(resident.queue):
            self._loads.begin(resident)

    def _give_turns(self, resident: Resident, instance: Instance) -> None:
        for ticket in resident.queue:
            if ticket.kind == LOAD and ticket.needs_context <= instance.context_length:
                resident.queue.remove(ticket)
                instance.idle_since = asyncio.get_running_loop().time()
                _heed(instance, ticket)
                ticket.turn.set_result(instance)
        while not self.critical and instance.has_room:
            next_one = self._next(resident, instance)
            if next_one is None:
                return
            resident.queue.remove(next_one)
            self._run(resident, instance, next_one)

    def _next(self, resident: Resident, instance: Instance) -> Ticket | None:
        """Return who may run on this instance next."""
        barrier = self._barrier(resident, instance)

        def may_run(ticket: Ticket) -> bool:
            fits = ticket.needs_context <= instance.context_length
            return fits and ticket.kind != LOAD and (barrier is None or ticket.number < barrier)

        return resident.queue.first(may_run)

    def _barrier(self, resident: Resident, instance: Instance) -> int | None:
        """Return the number of the ticket before which alone others run; None: all may run.

        That is the first one of another model which needs the memory, or of this one if it needs a
        longer context than this instance has and there is memory for that.
        """
        if resident.pardoned & instance.running:
            return None
        longer = self._longer(resident, instance)
        numbers = [longer.number] if longer is not None else []
        numbers += [resident.drain_before] if resident.drain_before is not None else []
        return min(numbers, default=None)

    def _longer(self, resident: Resident, instance: Instance) -> Ticket | None:
        """Return the ticket for which the model is to be loaded anew, if there is one."""
        first = resident.queue.first(lambda t: t.needs_context > instance.context_length)
        if first is None or not self.admission.could_now(first.needs_bytes, resident.model_id):
            return None
        return first

    def _run(self, resident: Resident, instance: Instance, ticket: Ticket) -> None:
        instance.running.add(ticket)
        instance.quiet.clear()
        ticket.started = asyncio.get_running_loop().time()
        _cancel(resident.expiry)
        resident.expiry = None
        ticket.turn.set_result(instance)

    def finished(self, resident: Resident, instance: Instance, ticket: Ticket) -> None:
        """Free the slot of a request, now that the engine is done with it."""
        instance.running.discard(ticket)
        instance.served += 1
        instance.idle_since = asyncio.get_running_loop().time()
        _heed(instance, ticket)
        if not instance.running:
            instance.quiet.set()
            if instance.idle_since - instance.measured_at > _MEASURE_S:
                instance.measured_at = instance.idle_since
                self._states.task(self._unloads.measure(resident, instance))
        self.pump(resident)

    # leaving

    def _rest(self, resident: Resident, instance: Instance) -> None:
        """See whether a model is to leave, now or later."""
        barrier = self._barrier(resident, instance)
        waiting = self._next(resident, instance) is not None
        if barrier is None or waiting or not instance.running:
            _cancel(resident.pardon)
            resident.pardon = None
        if barrier is not None and not waiting:
            if instance.running:
                if resident.pardon is None:
                    loop = asyncio.get_running_loop()
                    resident.pardon = loop.call_later(_PARDON_S, self._pardon, resident, instance)
            else:
                self._make_way(resident, instance)
        elif not instance.running and not len(resident.queue):
            self._await_expiry(resident, instance)

    def _pardon(self, resident: Resident, instance: Instance) -> None:
        """Let others run beside answers that take long, until one of these has ended."""
        resident.pardon = None
        resident.pardoned = set(instance.running)
        self.pump(resident)

    def _make_way(self, resident: Resident, instance: Instance) -> None:
        longer = self._longer(resident, instance)
        if longer is None:
            self._unloads.begin(resident, "it makes room")
            return
        resident.wish = max(resident.wish, longer.needs_context)
        resident.carried = (instance.explicit, instance.keep_alive_s)
        self._unloads.begin(resident, "it is loaded anew with a longer context")

    def _await_expiry(self, resident: Resident, instance: Instance) -> None:
        _cancel(resident.expiry)
        resident.expiry = None
        lasts_s = self._stays_s(resident, instance)
        if lasts_s == math.inf:
            return
        loop = asyncio.get_running_loop()
        when = instance.idle_since + lasts_s
        if when <= loop.time():
            self._unloads.begin(resident, "its keep-alive is over")
        else:
            resident.expiry = loop.call_at(when, self.pump, resident)

    def _stays_s(self, resident: Resident, instance: Instance) -> float:
        """Return how long the model stays when nobody asks it anything."""
        if resident.pinned or instance.explicit:
            return math.inf
        if instance.keep_alive_s is not None:
            return instance.keep_alive_s
        if resident.keep_alive:
            return parse_duration(resident.keep_alive, "keep_alive")
        return self._settings.keep_alive_s()

    @staticmethod
    def unloads_in_s(resident: Resident) -> float | None:
        """Return how long an idle model will stay, None if it has no end."""
        if resident.expiry is None:
            return None
        return max(0.0, resident.expiry.when() - asyncio.get_running_loop().time())

    def _settled(self, resident: Resident) -> None:
        """Look at a model whose load or unload is over, and at who waits for its memory."""
        self.pump(resident)
        self.admission.poke()

    async def unload(self, model_id: str) -> None:
        """Have the model out of memory, every byte of it, once this returns.

        Work in flight gets a few seconds and is then ended with an error that says why; requests
        that wait are refused at once. One that comes later loads the model again.
        """
        resident = self.residents.get(model_id)
        if resident is None:
            return
        doing = "it loaded" if resident.state is ModelState.LOADING else "this request waited"
        why: ModeldError = Conflict(f"{resident.unique} was unloaded while {doing}")
        if self._unloads.closing:
            why = Stopping()
        resident.queue.refuse_all(why)
        resident.wish = 0
        if resident.state is ModelState.LOADING:
            self._loads.give_up(resident, why)
            await _ended(resident.load_task)
        self._unloads.begin(resident, "it is unloaded", drain_s=DRAIN_S)
        resident.carried = (False, None)
        if resident.state is ModelState.UNLOADING:
            await _ended(resident.unload_task)
        elif resident.state is ModelState.FAILED:
            resident.last_error = ""
            self._states.change(resident, ModelState.UNLOADED)

    async def leave(self, model_id: str) -> None:
        """Have the model leave once nobody uses it: if that is now, it is gone when this returns.

        A later request that says how long it is to stay is heeded.
        """
        resident = self.residents.get(model_id)
        if resident is None:
            return
        if not resident.in_flight:
            await self.unload(model_id)
        elif resident.instance is not None:
            resident.instance.explicit, resident.instance.keep_alive_s = False, 0.0
        else:
            resident.carried = (False, 0.0)

    def forget(self, model_id: str) -> None:
        """Drop what is remembered of a model that was removed from the catalog."""
        resident = self.residents.get(model_id)
        if resident is not None and resident.state in (ModelState.UNLOADED, ModelState.FAILED):
            resident.queue.refuse_all(Conflict(f"{resident.unique} was removed"))
            del self.residents[model_id]

    def changed(self, record: ModelRecord) -> None:
        """Heed what was changed in a model's record, also over what requests said before."""
        resident = self.of(record)
        if resident.instance is not None and resident.keep_alive != record.keep_alive:
            resident.instance.keep_alive_s = None
        resident.follow(record)
        self.pump(resident)

    async def close(self) -> None:
        """Unload everything, load nothing more, and wait for what still runs."""
        self._unloads.closing = True
        await asyncio.gather(*(self.unload(model_id) for model_id in list(self.residents)))
        await self._states.settle()
        self.admission.close()

    # what the line for memory, and the watchdog, see and have done

    def occupants(self) -> list[Occupant]:
        """Return all models that hold memory."""
        now = asyncio.get_running_loop().time()
        found = []
        for model_id, booked in self._ledger.reservations.items():
            resident = self.residents[model_id]  # `forget` leaves alone what holds memory
            instance = resident.instance
            found.append(
                Occupant(
                    model_id=model_id,
                    standing=self._standing(resident),
                    size_bytes=booked.reserved_bytes,
                    idle_s=0.0 if instance is None else now - instance.idle_since,
                    reload_s=resident.load_s,
                    kept=instance is not None and instance.explicit,
                )
            )
        return found

    def _standing(self, resident: Resident) -> Standing:
        """Say what may be done with a model that holds memory."""
        instance = resident.instance
        if resident.state is ModelState.LOADING:
            return Standing.COMING
        if resident.state is not ModelState.READY or instance is None or not instance.alive:
            return Standing.GOING
        if resident.pinned:
            return Standing.FIXED
        # While memory is critical nobody gets a turn: who waits only keeps it from coming back.
        holds = instance.running or (resident.in_flight and not self.critical)
        return Standing.BUSY if holds or resident.between else Standing.IDLE

    def evict(self, model_id: str, *, hurry: bool = False) -> None:
        """Begin to unload an idle model; `hurry` if the memory is needed at once."""
        resident = self.residents[model_id]
        if hurry:
            self._unloads.begin(resident, "memory is short", save_s=HURRIED_SAVE_S)
        else:
            self._unloads.begin(resident, "it makes room")

    def drain(self, model_id: str, before: int | None) -> None:
        """Have a busy model run no requests but those with lower numbers; None: all again."""
        resident = self.residents.get(model_id)
        if resident is not None:
            resident.drain_before = before
            self.pump(resident)

    def end(self, ticket: Ticket, error: ModeldError) -> None:
        """End a request from outside, whether it waits or runs; its caller gets `error`."""
        ticket.ended_by = ticket.ended_by or error
        resident = self.residents.get(ticket.model_id)
        if resident is not None and resident.queue.remove(ticket):
            ticket.refuse(error)
            self._left(resident)
        elif ticket.cancel is not None:
            self._states.task(ticket.cancel())

    def note_growth(self) -> None:
        """Book what models have come to use."""
        for resident in self.residents.values():
            worker = resident.loading_worker
            if resident.instance is not None and resident.instance.alive:
                worker = resident.instance.worker
            if worker is not None:
                self._ledger.noted(resident.model_id, self._loader.private_bytes(worker))

    def hold(self, *, critical: bool) -> None:
        """Have new requests wait while memory is critical, and tell them in the end."""
        self._deadlines.hold(critical=critical)

    def look_after(self) -> None:
        """Do what is due with time: no state and no wait lasts for ever."""
        self._deadlines.look_after()


def _heed(instance: Instance, ticket: Ticket) -> None:
    """Heed what a ticket says of how long its model is to stay."""
    keep_alive_s = ticket.terms.keep_alive_s
    if ticket.kind == LOAD:
        instance.explicit, instance.keep_alive_s = keep_alive_s is None, keep_alive_s
    elif keep_alive_s is not None:
        instance.keep_alive_s = keep_alive_s
        instance.explicit = instance.explicit and keep_alive_s > 0


def _has_turn(ticket: Ticket) -> bool:
    turn = ticket.turn
    return turn.done() and not turn.cancelled() and turn.exception() is None


def _cancel(handle: asyncio.TimerHandle | None) -> None:
    if handle is not None:
        handle.cancel()


async def _ended(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        await asyncio.wait([task])
