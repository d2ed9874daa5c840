"""The real manager, admission, ledger and catalog, with workers and a clock that tests move.

Nothing here sleeps: the loop's clock jumps to the next timer once nothing else is left to do, so
that an hour of waiting takes no time and every run is the same.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import selectors
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from backends.contract import (
    Artifact,
    ChatRequest,
    Delta,
    Done,
    Fit,
    Hardware,
    LoadedModel,
    LoadOptions,
    MemoryEstimate,
    ModelFile,
    Probe,
    Sampling,
    Task,
    Usage,
)
from backends.registry import Registry
from daemon.catalog.database import Catalog, now
from daemon.catalog.record import ModelRecord
from daemon.config import Memory, Models
from daemon.errors import (
    Conflict,
    ContextLengthExceeded,
    LoadFailed,
    LoadTimeout,
    ModeldError,
    WorkerCrashed,
)
from daemon.memory.ledger import Ledger
from daemon.memory.measure import Use
from daemon.models import ModelManager, ModelStatus, Priority, Terms
from daemon.models.choice import Choice
from daemon.models.conversations import Conversations
from daemon.models.loader import Loader
from daemon.models.residency import Residency
from daemon.models.watchdog import Watchdog
from daemon.store import Store
from daemon.workers.worker import Request, Worker

MIB = 1024**2
T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Never waits for a timer: the clock jumps there instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise AssertionError("nothing is left that could ever happen")
        if timeout > 0:
            self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when nothing else is left to do."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def virtually(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario on a virtual clock."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(scenario)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@dataclass
class Plan:
    """How one model behaves: what it takes, how long its load takes, and how that ends.

    A model takes `really_bytes` of its estimate once it is loaded, and `grows_bytes` more with each
    request. `load_ends` is "", "fails", "crashes", or "hangs".
    """

    weights_bytes: int = 100 * MIB
    token_bytes: int = 0
    longest_context: int = 8192
    load_s: float = 1.0
    load_ends: str = ""
    slots: int = 1
    file: str = ""  # models with the same one map the same file
    really_bytes: Callable[[int], int] = lambda estimate: estimate
    grows_bytes: int = 0


class SizedBackend:
    """Estimates what the artifact says. Its workers are not started."""

    name: ClassVar[str] = "sized"
    score: ClassVar[int] = 2
    formats: ClassVar[frozenset[str]] = frozenset({"gguf"})
    distribution: ClassVar[str] = ""
    options: ClassVar[dict[str, Any]] = {}

    @classmethod
    def probe(cls) -> Probe:
        return Probe(backend=cls.name, available=True, version="1")

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        return Fit(score=cls.score, reason="for tests", tasks=(Task.CHAT,))

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        longest = artifact.context_length
        context_length = min(options.context_length or 4096, longest)
        slots = options.slots or artifact.metadata["slots"]
        cache = context_length * slots * artifact.metadata["token_bytes"]
        return MemoryEstimate(
            context_length=context_length,
            slots=slots,
            parts={"weights": artifact.weights_bytes, "kv_cache": cache},
        )

    def load(self, spec: Any, progress: Any) -> LoadedModel:
        raise NotImplementedError

    def save_state(self, folder: str, limit_bytes: int) -> tuple[()]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class NextBackend(SizedBackend):
    """The second choice."""

    name: ClassVar[str] = "next"
    score: ClassVar[int] = 1


class FakeWorker:
    """A worker that does what its model's plan and the requests say, on the loop's clock.

    A request's last message says how: `1.5` is answered after so many seconds, with a delta at the
    start; `stuck` ignores its cancel for ever; `tokens 5000` does not fit a shorter context, and
    is answered with as many tokens as it may and as there is room for.
    """

    def __init__(self, world: World, unique: str) -> None:
        self.world, self.name = world, unique
        self.plan = world.plans[unique]
        self.pid = next(world.pids)
        self.loaded: LoadedModel | None = None
        self.estimate_bytes = 0
        self.private_bytes = 0
        self.saved: list[str] = []
        self.running: dict[int, tuple[Request, asyncio.Task[None]]] = {}
        self.most_running = 0
        self.spec: Any = None
        self._ids = itertools.count(1)
        self.ended: asyncio.Future[ModeldError | None] = asyncio.get_running_loop().create_future()
        world.alive.append(self)
        world.started.append(self)

    async def load(self, spec: Any, *, timeout_s: float, progress: Any) -> LoadedModel:
        self.spec = spec
        load_s = 3e9 if self.plan.load_ends == "hangs" else self.plan.load_s
        loading = asyncio.ensure_future(asyncio.sleep(min(load_s, timeout_s)))
        await asyncio.wait([loading, self.ended], return_when=asyncio.FIRST_COMPLETED)
        loading.cancel()
        if self.plan.load_ends == "crashes":
            self.crash()
        if self.ended.done():
            raise self.ended.result() or Conflict("it was stopped")
        if load_s > timeout_s:
            raise LoadTimeout(f"{self.name} was not loaded within {timeout_s} s")
        if self.plan.load_ends == "fails":
            raise LoadFailed("it was made to fail")
        self.estimate_bytes = (
            self.plan.weights_bytes + spec.context_length * spec.slots * self.plan.token_bytes
        )
        self.private_bytes = self.plan.really_bytes(self.estimate_bytes)
        if self.plan.file:
            self.private_bytes -= self.plan.weights_bytes
        self.loaded = LoadedModel(
            tasks=(Task.CHAT, Task.COMPLETE),
            slots=spec.slots,
            context_length=spec.context_length,
            engine_version="1",
            restored=tuple(c.name for c in spec.conversations),
        )
        return self.loaded

    def submit(self, request: ChatRequest) -> tuple[int, Request]:
        assert not self.ended.done(), "a request was sent to a worker that has ended"
        assert self.loaded is not None
        number, entry = next(self._ids), Request()
        task = asyncio.ensure_future(self._answer(number, entry, request))
        self.running[number] = entry, task
        self.most_running = max(self.most_running, len(self.running))
        assert len(self.running) <= self.loaded.slots, "more requests than slots"
        return number, entry

    async def _answer(self, number: int, entry: Request, request: ChatRequest) -> None:
        assert self.loaded is not None
        order = str(request.messages[-1]["content"])
        reason, usage = "stop", Usage(completion_tokens=1)
        if order.startswith("tokens"):
            tokens, order = int(order.split()[1]), "0"
            most, room = request.sampling.max_tokens, self.loaded.context_length - tokens
            needs = tokens + (most or 0) if request.sampling.whole else tokens + 1
            if needs > self.loaded.context_length:
                text = f"{tokens} tokens, context_length of {self.loaded.context_length}"
                self._finish(number, ContextLengthExceeded(text, tokens=tokens))
                return
            if most is not None:
                reason = "length"
                usage = Usage(prompt_tokens=tokens, completion_tokens=min(most, room))
        self.private_bytes += self.plan.grows_bytes
        entry.answers.put_nowait(Delta(content="x"))
        await asyncio.sleep(3e9 if order == "stuck" else float(order))
        if number in self.running:
            self.world.answered[id(request.messages)] += 1
        self._finish(number, Done(finish_reason=reason, usage=usage))

    def _finish(self, number: int, last: Any) -> None:
        if number in self.running:
            entry, task = self.running.pop(number)
            if task is not asyncio.current_task():
                task.cancel()
            entry.finish(last)

    answers = staticmethod(Worker.answers)

    async def cancel(self, number: int) -> None:
        if number in self.running:
            await asyncio.sleep(0.05)  # a token, or a batch of the prompt
            self._finish(number, Done(finish_reason="cancelled"))

    def crash(self) -> None:
        """End as a process that nobody asked to."""
        self._die(WorkerCrashed(f"the worker that held {self.name} crashed"))

    def _die(self, error: ModeldError | None) -> None:
        if self.ended.done():
            return
        self.ended.set_result(error)
        for number in list(self.running):
            self._finish(number, error or Conflict(f"{self.name}: it was stopped"))

    async def stop(self, reason: str) -> None:
        if not self.ended.done():
            await asyncio.sleep(0.2)
        self._die(None)
        if self in self.world.alive:
            self.world.alive.remove(self)

    def kill(self, reason: str) -> None:
        self._die(None)

    async def save_state(self, folder: Path, *, limit_bytes: int, timeout_s: float) -> tuple[()]:
        assert not self.running
        await asyncio.sleep(0.05)
        return ()

    def first_complaint(self) -> str:
        return ""


class FakeWorkers:
    """Starts fake workers. See loader.Workers."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def start(self, backend_path: str, *, name: str, scratch: Path) -> Any:
        await asyncio.sleep(0)
        return FakeWorker(self._world, name)

    async def use(self, worker: Any, files: Any) -> Use:
        await self._world.measuring()
        shared = dict.fromkeys(files.values(), worker.plan.weights_bytes)
        return Use(private_bytes=worker.private_bytes, files=shared if worker.plan.file else {})

    def private_bytes(self, worker: Any) -> int:
        return int(worker.private_bytes)


class _Probers:
    def __init__(self, world: World) -> None:
        self._world = world

    async def ask(self, names: Any, *, patience_s: float = math.inf) -> dict[str, Probe]:
        await asyncio.sleep(self._world.probing_s)
        return {name: SizedBackend.probe() for name in names}

    def doubt(self, name: str) -> None:
        pass


class _Machine:
    known = Hardware(cpu_model="", physical_cores=2, logical_cores=2, ram_bytes=0)

    async def look(self, *, afresh: bool = True) -> Hardware:
        return self.known


async def at_once() -> None:
    """Do nothing."""


class _Upstreams:
    def of(self, record: ModelRecord) -> None:
        return None


@dataclass
class World:
    """A computer of `ram_bytes` with models on it. Use it inside `virtually`."""

    folder: Path
    budget_bytes: int = 1000 * MIB
    ram_bytes: int = 100_000 * MIB
    watermark_bytes: int = 0
    models: Models = field(default_factory=Models)
    memory: Memory = field(default_factory=Memory)
    plans: dict[str, Plan] = field(default_factory=dict)
    alive: list[FakeWorker] = field(default_factory=list)
    started: list[FakeWorker] = field(default_factory=list)
    others_bytes: int = 0
    stalled_us: tuple[int, int] = (0, 0)
    backends: int = 1
    probing_s: float = 0.0
    measuring: Callable[[], Coroutine[Any, Any, None]] = at_once
    answered: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pids = itertools.count(1000)
        self._messages: list[Any] = []
        self.catalog = Catalog(Path(":memory:"))
        self.store = Store(self.folder / "store")
        self.ledger = Ledger(self.budget_bytes, self.available_bytes, self.watermark_bytes)
        paths = {"sized": "scheduling:SizedBackend", "next": "scheduling:NextBackend"}
        registry = Registry(dict(list(paths.items())[: self.backends]))
        probers: Any = _Probers(self)
        choice = Choice(
            settings=self.models,
            registry=registry,
            probers=probers,
            machine=_Machine(),  # type: ignore[arg-type]
            measurements=self.catalog,
        )
        loader = Loader(
            settings=self.models,
            registry=registry,
            probers=probers,
            choice=choice,
            measurements=self.catalog,
            ledger=self.ledger,
            store=self.store,
            conversations=Conversations(
                self.store.conversations, resume=self.models.resume, limit_bytes=10**9
            ),
            upstreams=_Upstreams(),  # type: ignore[arg-type]
            workers=FakeWorkers(self),
        )
        self.residency = Residency(
            models=self.models,
            memory=self.memory,
            catalog=self.catalog,
            ledger=self.ledger,
            loader=loader,
        )
        self.manager = ModelManager(
            settings=self.models,
            catalog=self.catalog,
            store=self.store,
            ledger=self.ledger,
            choice=choice,
            residency=self.residency,
        )
        self.watchdog = Watchdog(self.residency, self.ledger, lambda: self.stalled_us)

    def available_bytes(self) -> int:
        """As the kernel has it: mapped weights count as page cache, which is available."""
        return self.ram_bytes - self.others_bytes - sum(w.private_bytes for w in self.alive)

    def add(self, unique: str, **plan: Any) -> ModelRecord:
        """Put a model on the computer."""
        made = self.plans[unique] = Plan(**plan)
        path = self.folder / f"{unique}.gguf"
        if made.file:
            shared = self.folder / made.file
            if not shared.exists():
                shared.touch()
            path.hardlink_to(shared)
        else:
            path.write_bytes(b"weights")
        facts = path.stat()
        file = ModelFile(
            path=str(path),
            size_bytes=facts.st_size,
            mtime_ns=facts.st_mtime_ns,
            sha256=uuid.uuid5(uuid.NAMESPACE_URL, unique).hex * 2,
        )
        artifact = Artifact(
            format="gguf",
            files=(file,),
            architecture="llama",
            parameters=1,
            quantization="Q4",
            context_length=made.longest_context,
            weights_bytes=made.weights_bytes,
            chat_template="x",
            metadata={"slots": made.slots, "token_bytes": made.token_bytes},
        )
        return self.catalog.add(
            ModelRecord(
                id=str(uuid.uuid5(uuid.NAMESPACE_DNS, unique)),
                unique=unique,
                name=unique,
                created=now(),
                artifact=artifact,
            )
        )

    async def answer(
        self, unique: str, order: float | str = 0, *, max_tokens: int | None = None, **terms: Any
    ) -> Done:
        """Ask a model and return the end of its answer. Raises ModeldError."""
        record = self.catalog.get(unique)
        messages = ({"role": "user", "content": str(order)},)
        self._messages.append(messages)  # their ids stay theirs
        request = ChatRequest(messages=messages, sampling=Sampling(max_tokens=max_tokens))
        if "priority" in terms:
            terms["priority"] = Priority(terms["priority"])
        async with self.manager.generate(record, request, Terms(**terms)) as answers:
            (*_, done) = [answer async for answer in answers]
        assert isinstance(done, Done), "an answer without an end"
        assert self.answered[id(messages)] == 1, "the engine answered more than once"
        return done

    async def ask(self, unique: str, order: float | str = 0, **terms: Any) -> str:
        """Ask a model and return how its answer ended. Raises ModeldError."""
        return (await self.answer(unique, order, **terms)).finish_reason

    def asking(self, unique: str, order: float | str = 0, **terms: Any) -> asyncio.Task[str]:
        """Ask a model in a task of its own."""
        task = asyncio.ensure_future(self.ask(unique, order, **terms))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def state(self, unique: str) -> str:
        """Return a model's state."""
        return str(self.status(unique).state)

    def status(self, unique: str) -> ModelStatus:
        """Return what is told of a model."""
        return self.manager.status(self.catalog.get(unique).id)

    def in_memory(self) -> set[str]:
        """Return the models that have a worker."""
        return {worker.name for worker in self.alive}

    def worker(self, unique: str) -> FakeWorker:
        """Return the worker that holds a model."""
        (found,) = [worker for worker in self.alive if worker.name == unique]
        return found

    async def load(self, unique: str, **terms: Any) -> None:
        """Load a model for its own sake."""
        await self.manager.load(self.catalog.get(unique), Terms(**terms))

    async def unload(self, unique: str) -> None:
        """Unload a model."""
        await self.manager.unload(self.catalog.get(unique).id)

    def pin(self, unique: str) -> None:
        """Pin a model."""
        record = self.catalog.update(self.catalog.get(unique).id, pinned=True)
        self.manager.changed(record)

    async def close(self) -> None:
        """Stop everything; nothing is left."""
        await self.watchdog.close()
        await self.manager.close()
        assert not self.alive and not self.ledger.reservations
        self.catalog.close()
