"""Whatever happens to models, in whatever order: what must hold holds after every step."""

from __future__ import annotations

import asyncio
import logging
import math
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import MIB, VirtualLoop, World

from daemon.config import Memory, Models
from daemon.errors import ModeldError
from daemon.models import ModelState
from daemon.models.turns import LOAD

BUDGET = 1000 * MIB
RAM = 3000 * MIB
WATERMARK = 100 * MIB
PLANS = {
    "small": {"weights_bytes": 100 * MIB, "slots": 2},
    "middle": {"weights_bytes": 400 * MIB},
    "large": {"weights_bytes": 700 * MIB, "slots": 4},
    "slow": {"weights_bytes": 300 * MIB, "load_s": 20.0},
    # 100 MiB, and 20 more for a thousand tokens in each slot
    "long": {"weights_bytes": 100 * MIB, "token_bytes": 20_000, "slots": 4},
    "growing": {"weights_bytes": 100 * MIB, "grows_bytes": 60 * MIB},
    "shared-one": {"weights_bytes": 300 * MIB, "file": "shared", "token_bytes": 10_000},
    "shared-two": {"weights_bytes": 300 * MIB, "file": "shared", "token_bytes": 20_000},
}
models = st.sampled_from(list(PLANS))
seconds = st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0, 120.0])
LEAVES_PINNED = ("it is unloaded", "it is loaded anew with a longer context")


class Errors(logging.Handler):
    """What the daemon itself takes for a fault."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(f"logged: {record.getMessage()} {record.exc_info}")


class Walk(RuleBasedStateMachine):
    """Models are asked, loaded, unloaded, pinned, broken and killed at any time; time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.loop = VirtualLoop()
        asyncio.set_event_loop(self.loop)
        self.asked: list[asyncio.Task[str]] = []
        self.others: list[asyncio.Task[None]] = []
        self.pinned: set[str] = set()
        self.closed = False
        self.violations: list[str] = []
        # What is raised in callbacks and in tasks that nobody waits for counts, too.
        self.loop.set_exception_handler(lambda _, context: self.violations.append(repr(context)))
        self.errors = Errors(self.violations)
        logging.getLogger("daemon").addHandler(self.errors)
        self.world: World

    def do(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    @initialize()
    def begin(self):
        async def made():
            world = World(
                Path(self.folder.name),
                budget_bytes=BUDGET,
                ram_bytes=RAM,
                watermark_bytes=WATERMARK,
                models=Models(queue_limit=8, max_run_s=600, keep_alive="60s", load_timeout_s=60),
                memory=Memory(wait_s=30),
            )
            for name, plan in PLANS.items():
                world.add(name, **plan)
            world.watchdog.begin()
            return world

        self.world = self.do(made())
        unloads, ledger = self.world.residency._unloads, self.world.ledger
        begin, reserve = unloads.begin, ledger.reserve

        def begin_checked(resident, why, **settings):
            loaded = resident.state is ModelState.READY
            if loaded and not settings.get("drain_s") and resident.running:
                self.violations.append(f"{resident.unique} is busy, and leaves: {why}")
            if loaded and resident.unique in self.pinned and why not in LEAVES_PINNED:
                self.violations.append(f"{resident.unique} is pinned, and leaves: {why}")
            begin(resident, why, **settings)

        def reserve_checked(*arguments):
            reserve(*arguments)
            self._check_room()

        unloads.begin, ledger.reserve = begin_checked, reserve_checked

    def _check_room(self):
        """Check that all that is booked and used fits, with figures of the workers' own."""
        world = self.world
        used = {worker.name: worker for worker in world.alive}
        total = unseen = 0
        files = {}
        for entry in world.ledger.reservations.values():
            plan = world.plans[entry.unique]
            shared = plan.weights_bytes if plan.file else 0
            real = used[entry.unique].private_bytes if entry.unique in used else 0
            total += max(entry.estimate_bytes - shared, real)
            files |= {plan.file: shared}
            unseen += max(0, real - entry.now.private_bytes) if entry.measured_bytes else 0
        total += sum(files.values())
        if total - unseen > BUDGET:  # what grew since it was looked at can't be known
            self.violations.append(f"over the budget: {total / MIB} MiB, {unseen / MIB} unseen")
        if total + world.others_bytes > RAM - WATERMARK:
            self.violations.append(f"over the RAM: {total / MIB} MiB")

    def soon(self):
        self.do(asyncio.sleep(0))

    def start(self, work):
        """Begin some work, and return its task."""

        async def started():
            task = asyncio.ensure_future(work())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            return task

        return self.do(started())

    def ask_for(self, model, order, **terms):
        self.asked.append(self.start(lambda: self.world.ask(model, order, **terms)))

    @rule(model=models, how_long=seconds, keep_alive_s=st.sampled_from([None, 0.0, 5.0, math.inf]))
    def ask(self, model, how_long, keep_alive_s):
        self.ask_for(model, how_long, keep_alive_s=keep_alive_s)

    @rule(model=models)
    def ask_in_the_background(self, model):
        self.ask_for(model, 2, priority="background")

    @rule(tokens=st.sampled_from([3000, 4500, 8000, 9000]), most=st.sampled_from([None, 10, 4000]))
    def ask_for_a_long_context(self, tokens, most):
        self.ask_for("long", f"tokens {tokens}", max_tokens=most)

    @rule(model=st.sampled_from(["long", "shared-one"]))
    def ask_with_a_context(self, model):
        self.ask_for(model, 1, context_length=8192)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def leave(self, data):
        data.draw(st.sampled_from(self.asked)).cancel()
        self.soon()

    @rule(model=models)
    def load(self, model):
        self.others.append(self.start(lambda: self.world.load(model)))

    @precondition(lambda self: self.others)
    @rule(data=st.data())
    def leave_a_load(self, data):
        data.draw(st.sampled_from(self.others)).cancel()
        self.soon()

    @rule(model=models)
    def unload(self, model):
        self.others.append(self.start(lambda: self.world.unload(model)))

    @rule(model=models, loading=st.booleans())
    def crash(self, model, loading):
        async def crashing():
            for worker in list(self.world.alive):
                if worker.name == model and (worker.loaded is None) == loading:
                    worker.crash()

        self.do(crashing())

    @rule(model=models, how=st.sampled_from(["", "fails", "crashes", "hangs"]))
    def loads_end_otherwise(self, model, how):
        self.world.plans[model].load_ends = how

    @rule(model=models, pinned=st.booleans())
    def pin(self, model, pinned):
        (self.pinned.add if pinned else self.pinned.discard)(model)

        async def pinning():
            record = self.world.catalog.get(model)
            self.world.manager.changed(self.world.catalog.update(record.id, pinned=pinned))

        self.do(pinning())

    @rule(data=st.data())
    def kill(self, data):
        async def killing():
            requests = self.world.manager.requests()
            if requests:
                self.world.manager.kill(data.draw(st.sampled_from(requests)).id)

        self.do(killing())

    @rule(used=st.sampled_from([0, 500 * MIB, 1500 * MIB, 2400 * MIB, 2950 * MIB]))
    def other_programs(self, used):
        self.world.others_bytes = used

    @rule(how_long=st.sampled_from([0.0, 0.3, 2.0, 10.0, 70.0]))
    def time_passes(self, how_long):
        self.do(asyncio.sleep(how_long))

    @precondition(lambda self: not self.closed)
    @rule(sure=st.integers(0, 9))
    def stop(self, sure):
        if not sure:  # now and then: nothing else happens after it
            self.closed = True
            self.others.append(self.start(self.world.manager.close))

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.do(self._check())

    async def _check(self):
        for _ in range(10):  # who was told something has taken note of it
            await asyncio.sleep(0)
        world, ledger = self.world, self.world.ledger
        entries = list(ledger.reservations.values())
        sharing = [e for e in entries if world.plans[e.unique].file and e.files]
        once = max(0, len(sharing) - 1) * PLANS["shared-one"]["weights_bytes"]
        booked = sum(entry.reserved_bytes for entry in entries)
        assert booked - once == ledger.reserved_bytes, "the ledger does not add up"
        names = [worker.name for worker in world.alive]
        assert len(names) == len(set(names)), "two copies of one model"
        assert set(names) <= {e.unique for e in entries}, "a worker whose memory is not booked"
        for resident in world.residency.residents.values():
            self._check_resident(resident)
        waits_or_runs = sum(r.in_flight for r in world.residency.residents.values())
        listed = [request for request in world.manager.requests() if request.kind != LOAD]
        assert waits_or_runs == len(listed), "a request is lost, or counted twice"
        assert not self.violations, self.violations

    def _check_resident(self, resident):
        now, instance = self.loop.time(), resident.instance
        waiting = [ticket for ticket in resident.queue if ticket.kind != LOAD]
        if resident.state in (ModelState.LOADING, ModelState.UNLOADING):
            assert now <= resident.deadline < math.inf, "a state without a deadline"
        elif resident.state is not ModelState.READY:
            assert resident.model_id not in self.world.ledger.reservations
            assert not len(resident.queue), "requests wait, and nothing happens"
        elif instance is not None and instance.alive:
            assert len(instance.running) <= instance.loaded.slots
            held_back = resident.drain_before is not None or self.world.manager.critical
            longer = any(t.needs_context > instance.context_length for t in waiting)
            if instance.has_room and not held_back and not longer:
                assert not waiting, "a slot is free, and a request waits"

    def teardown(self):
        if hasattr(self, "world"):
            self.world.others_bytes = 0
            self.do(asyncio.sleep(7200))
            for task in (*self.asked, *self.others):
                assert task.done(), "a request is lost"
                if not task.cancelled() and (error := task.exception()) is not None:
                    assert isinstance(error, ModeldError), repr(error)
            self.do(self._check())
            self.do(self.world.close())
            assert not self.violations, self.violations
        logging.getLogger("daemon").removeHandler(self.errors)
        self.loop.close()
        asyncio.set_event_loop(None)
        self.folder.cleanup()


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,  # the same walks each time, so that a failure is a change's own
    suppress_health_check=list(HealthCheck),
)
