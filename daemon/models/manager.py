"""ModelManager: the states of all models, single-flight loads, holding, unloading.

The rule: a request holds its model (`in_flight`) before anything is awaited, and asks for it to be
ready; nobody reads a state and then acts on it after an await.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from backends.contract import (
    ChatRequest,
    Classes,
    ClassifyRequest,
    CompleteRequest,
    Delta,
    Done,
    Embeddings,
    EmbedRequest,
    MemoryEstimate,
    Request,
    RerankRequest,
    Scores,
)
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.config import Models as ModelSettings
from daemon.errors import (
    Conflict,
    EngineError,
    InternalError,
    LoadFailed,
    LoadTimeout,
    ModeldError,
    QueueFull,
)
from daemon.memory.ledger import Ledger
from daemon.models.loader import Explanation, Loader, Planned, Watch
from daemon.models.resident import Instance, ModelState, ModelStatus, Resident, crash_delay
from daemon.store import Store
from daemon.workers.worker import Answer, Worker

_DRAIN_S = 5.0  # how long an unload waits for work in flight before it ends it
_ENDED_BY_UNLOAD = "the model was unloaded while it answered"
_STOPPING = "modeld is stopping"
log = logging.getLogger(__name__)
T = TypeVar("T", Embeddings, Scores, Classes)


class ModelManager:
    """See the module. Must be used on the event loop's thread."""

    def __init__(
        self,
        *,
        settings: ModelSettings,
        catalog: Catalog,
        store: Store,
        ledger: Ledger,
        loader: Loader,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._ledger = ledger
        self._loader = loader
        self._residents: dict[str, Resident] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def _resident(self, record: ModelRecord) -> Resident:
        return self._residents.setdefault(
            record.id, Resident(model_id=record.id, unique=record.unique)
        )

    def status(self, model_id: str) -> ModelStatus:
        """Return the model's state, for people and listings; decide nothing by it."""
        resident = self._residents.get(model_id)
        if resident is None:
            return ModelStatus()
        booked = self._ledger.reservations.get(model_id)
        instance = resident.instance
        return ModelStatus(
            state=resident.state,
            backend=resident.backend,
            worker_pid=instance.worker.pid if instance is not None else None,
            in_flight=resident.in_flight,
            waiting=resident.waiting,
            load_progress=resident.progress,
            estimate_bytes=resident.estimate_bytes,
            reserved_bytes=booked.reserved_bytes if booked else 0,
            measured_bytes=booked.measured_bytes if booked else 0,
            context_length=resident.context_length,
            slots=resident.slots,
            last_error=resident.last_error,
            passed_over=instance.passed_over if instance is not None else (),
        )

    # loading

    async def explain(self, record: ModelRecord) -> Explanation:
        """Say which backend a load of the model would take, and why. Raises ModelNotDownloaded."""
        return await self._loader.explain(record)

    async def plan(self, record: ModelRecord) -> Planned:
        """Say what a load of the model would be, without one. Raises ModeldError."""
        return await self._loader.plan(record)

    async def load(self, record: ModelRecord) -> None:
        """Have the model in memory. Raises ModeldError."""
        await self._ensure_ready(self._resident(record))

    async def _ensure_ready(self, resident: Resident) -> Instance:
        """Return a live instance; start the load, or join the one that goes on."""
        while True:
            instance = resident.instance
            if resident.state is ModelState.READY and instance is not None:
                if instance.alive:
                    return instance
                await self._settled(resident.watch_task)
            elif resident.state is ModelState.UNLOADING:
                await self._settled(resident.unload_task)
            elif resident.state is ModelState.LOADING and resident.unload_wanted.is_set():
                await self._settled(resident.load_task)  # that one is being given up
            else:
                if self._closing:
                    raise Conflict(_STOPPING)
                if resident.state is not ModelState.LOADING:
                    # All before the task begins: an unload may come first.
                    resident.unload_wanted.clear()
                    resident.progress = 0.0
                    self._set_state(resident, ModelState.LOADING)
                    resident.load_task = self._task(self._load(resident))
                load_task = resident.load_task
                assert load_task is not None  # LOADING is only ever set together with it
                await asyncio.shield(load_task)  # a waiter that leaves must not end the load

    async def _settled(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            await asyncio.wait([task])

    async def _load(self, resident: Resident) -> None:
        try:
            instance = await self._loaded_instance(resident)
        except ModeldError as error:
            resident.loading_worker = None
            if resident.unload_wanted.is_set():
                self._set_state(resident, ModelState.UNLOADED)
                raise Conflict(f"{resident.unique} was unloaded while it loaded") from error
            resident.last_error = error.message
            if isinstance(error, LoadFailed | LoadTimeout):
                resident.crashes.append(time.monotonic())
                self._set_state(resident, ModelState.FAILED)
            else:  # it was refused, and nothing is wrong with the model
                self._set_state(resident, ModelState.UNLOADED)
            raise
        except Exception as error:
            log.exception("model=%s load failed", resident.unique)
            resident.loading_worker = None
            resident.last_error = f"internal error: {error!r}"
            self._set_state(resident, ModelState.FAILED)
            raise InternalError(resident.last_error) from error
        resident.loading_worker = None
        resident.instance = instance
        resident.last_error = ""
        resident.context_length = instance.loaded.context_length
        resident.slots = instance.loaded.slots
        resident.watch_task = self._task(self._watch(resident, instance))
        self._set_state(resident, ModelState.READY)

    async def _loaded_instance(self, resident: Resident) -> Instance:
        delay = crash_delay(resident.crashes, time.monotonic())
        if delay:
            log.warning("model=%s crashed often: loads again in %.1f s", resident.unique, delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await resident.unload_wanted.wait()
            if resident.unload_wanted.is_set():
                raise Conflict(f"{resident.unique} was unloaded before it loaded")

        def chosen(backend: str, estimate: MemoryEstimate) -> None:
            resident.backend, resident.estimate_bytes = backend, estimate.total_bytes

        def started(worker: Worker) -> None:
            resident.loading_worker = worker
            if resident.unload_wanted.is_set():
                worker.kill("it was unloaded while it loaded")

        def progress(fraction: float) -> None:
            resident.progress = fraction

        def busy() -> int:
            others = [other for other in self._residents.values() if other is not resident]
            return sum(1 for other in others if other.in_flight)

        record = self._catalog.get(resident.model_id)
        watch = Watch(chosen=chosen, started=started, progress=progress, busy=busy)
        instance = await self._loader.load(record, watch)
        if resident.unload_wanted.is_set():
            await self._loader.give_back(resident.model_id, instance, "it was unloaded")
            raise Conflict(f"{resident.unique} was unloaded while it loaded")
        return instance

    async def _watch(self, resident: Resident, instance: Instance) -> None:
        """Wait for the worker's end; one that nobody asked for is a crash."""
        crash = await asyncio.shield(instance.worker.ended)
        if crash is None:
            return
        await self._loader.give_back(resident.model_id, instance, "it crashed")
        if resident.state is not ModelState.READY or resident.instance is not instance:
            return  # an unload is under way, and puts the state right itself
        # The state changes only now, and at once: until here others wait for this task, so that no
        # second copy is loaded beside what the first one still holds.
        resident.crashes.append(time.monotonic())
        resident.instance = None
        resident.last_error = crash.message
        self._set_state(resident, ModelState.FAILED)

    # asking

    @contextlib.asynccontextmanager
    async def generate(
        self, record: ModelRecord, request: ChatRequest | CompleteRequest
    ) -> AsyncIterator[AsyncIterator[Delta | Done]]:
        """Hold the model, load it if need be, take a slot, and give the answers.

        The model and the slot are held until the engine is done with the request, also when the
        caller leaves early. Raises ModeldError; so do the answers.
        """

        async def typed(answers: AsyncIterator[Answer]) -> AsyncIterator[Delta | Done]:
            async for answer in answers:
                if not isinstance(answer, Delta | Done):
                    raise EngineError(f"the engine answered with {type(answer).__name__}")
                yield answer

        async with self._ask(record, request) as answers:
            yield typed(answers)

    async def embed(self, record: ModelRecord, request: EmbedRequest) -> Embeddings:
        """Return a vector for each input. Raises ModeldError."""
        return await self._result(record, request, Embeddings)

    async def rerank(self, record: ModelRecord, request: RerankRequest) -> Scores:
        """Return a score for each document. Raises ModeldError."""
        return await self._result(record, request, Scores)

    async def classify(self, record: ModelRecord, request: ClassifyRequest) -> Classes:
        """Return the labels of each input. Raises ModeldError."""
        return await self._result(record, request, Classes)

    async def _result(self, record: ModelRecord, request: Request, expected: type[T]) -> T:
        async with self._ask(record, request) as answers:
            async for answer in answers:
                if isinstance(answer, expected):
                    return answer
        raise EngineError("the engine ended the request without a result")

    @contextlib.asynccontextmanager
    async def _ask(
        self, record: ModelRecord, request: Request
    ) -> AsyncIterator[AsyncIterator[Answer]]:
        resident = self._resident(record)
        if resident.waiting >= self._settings.queue_limit:
            raise QueueFull(
                f"{resident.waiting} requests wait for {resident.unique} already "
                "([models] queue_limit)",
                retry_after_s=5,
            )
        resident.in_flight += 1
        try:
            instance = await self._slot(resident)
        except BaseException:
            resident.in_flight -= 1
            raise
        try:
            request_id, entry = instance.worker.submit(request)
        except BaseException:
            self._finished(resident, instance)
            raise
        # The slot is free when the engine says so: not before, when the client has left already,
        # and not after, when a client that is slow to read has yet to be served.
        entry.finished.add_done_callback(lambda _: self._finished(resident, instance))
        try:
            yield instance.worker.answers(entry)
        finally:
            if not entry.finished.done():
                await asyncio.shield(self._task(instance.worker.cancel(request_id)))

    async def _slot(self, resident: Resident) -> Instance:
        """Return a live instance with a slot taken in it, in the order of asking."""
        resident.waiting += 1
        unloads = resident.unloads
        try:
            while True:
                if resident.unloads != unloads:
                    raise Conflict(f"{resident.unique} was unloaded while this request waited")
                instance = await self._ensure_ready(resident)
                await instance.slots.acquire()
                if (
                    resident.instance is instance
                    and instance.alive
                    and (resident.state is ModelState.READY)
                ):
                    instance.running += 1
                    instance.idle.clear()
                    return instance
                instance.slots.release()  # it went while this request waited: start over
        finally:
            resident.waiting -= 1

    def _finished(self, resident: Resident, instance: Instance) -> None:
        """Free what a request held, now that the engine is done with it."""
        resident.in_flight -= 1
        instance.slots.release()
        instance.running -= 1
        if instance.running == 0:
            instance.idle.set()
        if resident.in_flight == 0 and resident.state is ModelState.READY:
            self._task(self._measure(resident, instance))

    async def _measure(self, resident: Resident, instance: Instance) -> None:
        measured = await self._loader.measure(instance)
        if resident.instance is instance:  # else the booking is another one's by now
            self._ledger.measured(resident.model_id, measured)

    # unloading

    async def unload(self, model_id: str) -> None:
        """Have the model out of memory, every byte of it, once this returns.

        Work in flight gets a few seconds and is then ended with an error that says why; so are
        requests that still wait. One that comes later loads the model again.
        """
        resident = self._residents.get(model_id)
        if resident is None:
            return
        resident.unloads += 1
        if resident.state is ModelState.LOADING:
            resident.unload_wanted.set()
            if resident.loading_worker is not None:
                resident.loading_worker.kill("it was unloaded while it loaded")
            await self._settled(resident.load_task)
        elif resident.state is ModelState.READY and resident.instance is not None:
            self._set_state(resident, ModelState.UNLOADING)
            resident.unload_task = self._task(self._unload(resident, resident.instance))
        if resident.state is ModelState.UNLOADING:
            await self._settled(resident.unload_task)
        elif resident.state is ModelState.FAILED:
            resident.last_error = ""
            self._set_state(resident, ModelState.UNLOADED)

    async def _unload(self, resident: Resident, instance: Instance) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await instance.idle.wait()
        reason = _STOPPING if self._closing else _ENDED_BY_UNLOAD
        await self._loader.give_back(resident.model_id, instance, reason)
        resident.instance = None
        self._set_state(resident, ModelState.UNLOADED)

    async def unload_all(self) -> None:
        """Unload every model."""
        await asyncio.gather(*(self.unload(model_id) for model_id in list(self._residents)))

    async def delete_files(self, record: ModelRecord) -> None:
        """Unload the model and remove its files from the store. Raises Conflict while it is busy.

        A file that was imported by reference stays where it is.
        """
        resident = self._residents.get(record.id)
        if resident is not None and resident.in_flight:
            raise Conflict(
                f"{record.unique} is answering {resident.in_flight} requests: try again when it "
                "is idle"
            )
        self._catalog.update(record.id, artifact=None)  # from here on nobody can load it
        await self.unload(record.id)
        # Gigabytes take their time, and a client that leaves meanwhile must not stop it half-way.
        await asyncio.shield(asyncio.to_thread(self._store.drop_model, record.id))

    def forget(self, model_id: str) -> None:
        """Drop what is remembered of a model that was removed from the catalog."""
        self._residents.pop(model_id, None)

    async def close(self) -> None:
        """Unload everything, load nothing more, and wait for what still runs."""
        self._closing = True
        await self.unload_all()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _set_state(self, resident: Resident, state: ModelState) -> None:
        booked = self._ledger.reservations.get(resident.model_id)
        log.info(
            "model=%s state=%s→%s reserved_bytes=%d %s",
            resident.unique,
            resident.state,
            state,
            booked.reserved_bytes if booked else 0,
            f"error={resident.last_error!r}" if state is ModelState.FAILED else "",
        )
        resident.state = state
        self._catalog.changed(resident.model_id)

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `coroutine` in a task that is kept, and whose error is fetched."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task
