"""ModelManager: what the rest of the daemon asks of models.

Owns the requests; the models and their states are the business of `residency`, and prompts that
are too long for their model's context that of `contexts`.

A request holds its model from the moment it asks until the engine is done with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from backends.contract import (
    Artifact,
    ChatRequest,
    Classes,
    ClassifyRequest,
    CompleteRequest,
    Count,
    CountRequest,
    Delta,
    Done,
    Embeddings,
    EmbedRequest,
    Request,
    RerankRequest,
    Scores,
    Task,
    needed_task,
)
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.config import Models as ModelSettings
from daemon.errors import (
    Conflict,
    ContextLengthExceeded,
    EngineError,
    InsufficientMemory,
    ModeldError,
    ModelNotLoaded,
    QueueFull,
    RequestNotFound,
    RequestTimeout,
)
from daemon.memory.ledger import Ledger
from daemon.models.choice import Choice, Explanation, Planned, described
from daemon.models.contexts import Contexts, check_context
from daemon.models.residency import Residency
from daemon.models.resident import Instance, ModelState, ModelStatus, Resident
from daemon.models.turns import LOAD, Terms, Ticket
from daemon.store import Store
from daemon.workers.worker import Answer

T = TypeVar("T", Embeddings, Scores, Classes, Count)
_USUAL = Terms()
# Vectors, scores and labels take a moment, and clients ask for those of a whole document at once:
# so many of them may wait for each answer that may. By default that is Ollama's bound (512).
_SHORT = (Task.EMBED, Task.RERANK, Task.CLASSIFY)
_SHORT_PER_LONG = 4
_THERE = (ModelState.LOADING, ModelState.READY)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """A request as the APIs show it. Seconds are since it was asked, and since it got its turn."""

    id: str
    model: str
    kind: str
    priority: str
    state: str
    asked_at: float
    age_s: float
    running_s: float
    pieces: int


class ModelManager:
    """See the module. Must be used on the event loop's thread."""

    def __init__(
        self,
        *,
        settings: ModelSettings,
        catalog: Catalog,
        store: Store,
        ledger: Ledger,
        choice: Choice,
        residency: Residency,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._ledger = ledger
        self._choice = choice
        self._residency = residency
        self._contexts = Contexts(
            settings=settings, choice=choice, ledger=ledger, admission=residency.admission
        )
        self._tickets: dict[str, Ticket] = {}
        self._listeners: list[Callable[[str], None]] = []

    def status(self, model_id: str) -> ModelStatus:
        """Return the model's state, for people and listings; decide nothing by it."""
        resident = self._residency.residents.get(model_id)
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
            load_progress=resident.progress if resident.state in _THERE else 0.0,
            load_s=instance.load_s if instance is not None else 0.0,
            estimate_bytes=resident.estimate_bytes,
            reserved_bytes=booked.reserved_bytes if booked else 0,
            measured_bytes=booked.measured_bytes if booked else 0,
            context_length=resident.context_length,
            slots=resident.slots,
            unloads_in_s=Residency.unloads_in_s(resident),
            waits_for="memory" if self._residency.admission.waits(model_id) else "",
            reduced=instance.reduced if instance is not None else "",
            last_error=resident.last_error,
            passed_over=instance.passed_over if instance is not None else (),
        )

    # loading and unloading

    async def explain(self, record: ModelRecord) -> Explanation:
        """Say which backend a load of the model would take, and why. Raises ModelNotDownloaded."""
        return await self._choice.explain(record)

    async def plan(
        self,
        record: ModelRecord,
        artifact: Artifact | None = None,
        *,
        context_length: int = 0,
        slots: int = 0,
    ) -> Planned:
        """Say what a load of the model would be, without one; 0 leaves a choice to modeld.

        `artifact` stands for its files where it has none yet. Raises ModeldError.
        """
        files = described(record) if artifact is None else artifact
        return await self._choice.plan(record, files, context_length=context_length, slots=slots)

    def ram_bytes(self, record: ModelRecord) -> int:
        """Return the RAM that a model takes or would take: measured, else estimated; 0: unknown."""
        status = self.status(record.id)
        return status.measured_bytes or status.estimate_bytes or self._choice.about(record)

    def could_ever(self, need_bytes: int, model_id: str) -> bool:
        """Say whether a load of the model might get so much RAM once all others made room."""
        return self._residency.admission.could_ever(need_bytes, model_id)

    @property
    def critical(self) -> bool:
        """Whether memory is so short that new requests wait."""
        return self._residency.critical

    def changed(self, record: ModelRecord) -> None:
        """Heed what was changed in a model's record."""
        self._residency.changed(record)

    async def load(self, record: ModelRecord, terms: Terms = _USUAL) -> None:
        """Have the model in memory, until it is unloaded or has to make room. Raises ModeldError.

        With a `keep_alive_s` it stays for that long instead.
        """
        check_context(record, terms)
        resident = self._residency.of(record)
        ticket = self._residency.ticket(resident, LOAD, terms)
        with self._listed(ticket):
            await self._contexts.check_memory(record, resident, ticket)
            await self._residency.turn(resident, ticket)

    async def unload(self, model_id: str) -> None:
        """Have the model out of memory, every byte of it, once this returns: see Residency."""
        await self._residency.unload(model_id)

    async def leave(self, model_id: str) -> None:
        """Have the model leave once nobody uses it: see Residency."""
        await self._residency.leave(model_id)

    async def unload_all(self) -> None:
        """Unload every model."""
        await asyncio.gather(*map(self.unload, list(self._residency.residents)))

    async def delete_files(self, record: ModelRecord) -> None:
        """Unload the model and remove its files from the store. Raises Conflict while it is busy.

        A file that was imported by reference stays where it is.
        """
        in_flight = self.status(record.id).in_flight
        if in_flight:
            raise Conflict(
                f"{record.unique} is answering {in_flight} requests: try again when it is idle"
            )
        self._catalog.update(record.id, artifact=None)  # from here on nobody can load it
        await self.unload(record.id)
        # Gigabytes take their time, and a client that leaves meanwhile must not stop it half-way.
        await asyncio.shield(asyncio.to_thread(self._store.drop_model, record.id))

    def forget(self, model_id: str) -> None:
        """Drop what is remembered of a model that was removed from the catalog."""
        self._residency.forget(model_id)

    async def close(self) -> None:
        """Unload everything, load nothing more, and wait for what still runs."""
        await self._residency.close()

    # requests

    def requests(self) -> list[RequestStatus]:
        """Return every request that waits or runs, the oldest first."""
        return [self._shown(key, ticket) for key, ticket in self._tickets.items()]

    def request(self, request_id: str) -> RequestStatus | None:
        """Return a request that waits or runs, or None."""
        ticket = self._tickets.get(request_id)
        return None if ticket is None else self._shown(request_id, ticket)

    @staticmethod
    def _shown(key: str, ticket: Ticket) -> RequestStatus:
        now = asyncio.get_running_loop().time()
        return RequestStatus(
            id=key,
            model=ticket.unique,
            kind=ticket.kind,
            priority=ticket.terms.priority,
            state="waiting" if ticket.started is None else "running",
            asked_at=ticket.asked_at,
            age_s=now - ticket.arrived,
            running_s=now - ticket.started if ticket.started is not None else 0.0,
            pieces=ticket.pieces,
        )

    def kill(self, request_id: str) -> None:
        """End a request, whether it waits or runs. Raises RequestNotFound."""
        ticket = self._tickets.get(request_id)
        if ticket is None:
            raise RequestNotFound(
                f"no request {request_id!r} waits or runs; `modeld ps` shows all that do"
            )
        self._residency.end(ticket, Conflict("the request was killed", should_retry=False))

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with the id of each request that comes, gets its turn or ends.

        Return what ends that.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _tell(self, ticket: Ticket) -> None:
        for listener in tuple(self._listeners):
            listener(str(ticket.number))

    @contextlib.contextmanager
    def _listed(self, ticket: Ticket) -> Iterator[None]:
        key = str(ticket.number)
        self._tickets[key] = ticket
        self._tell(ticket)
        try:
            yield
        finally:
            del self._tickets[key]
            self._tell(ticket)

    @contextlib.asynccontextmanager
    async def generate(
        self, record: ModelRecord, request: ChatRequest | CompleteRequest, terms: Terms = _USUAL
    ) -> AsyncIterator[AsyncIterator[Delta | Done]]:
        """Hold the model, load it if need be, take a slot, and give the answers.

        The first answer is there once this begins. The model and the slot are held until the engine
        is done with the request, also when the caller leaves early. Raises ModeldError; so do the
        answers.
        """

        async def typed(answers: AsyncIterator[Answer]) -> AsyncIterator[Delta | Done]:
            async for answer in answers:
                if not isinstance(answer, Delta | Done):
                    raise EngineError(f"the engine answered with {type(answer).__name__}")
                yield answer

        async with self._ask(record, request, terms) as answers:
            yield typed(answers)

    async def embed(
        self, record: ModelRecord, request: EmbedRequest, terms: Terms = _USUAL
    ) -> Embeddings:
        """Return a vector for each input. Raises ModeldError."""
        return await self._result(record, request, terms, Embeddings)

    async def rerank(
        self, record: ModelRecord, request: RerankRequest, terms: Terms = _USUAL
    ) -> Scores:
        """Return a score for each document. Raises ModeldError."""
        return await self._result(record, request, terms, Scores)

    async def classify(
        self, record: ModelRecord, request: ClassifyRequest, terms: Terms = _USUAL
    ) -> Classes:
        """Return the labels of each input. Raises ModeldError."""
        return await self._result(record, request, terms, Classes)

    async def count(
        self, record: ModelRecord, request: ChatRequest, terms: Terms = _USUAL
    ) -> Count:
        """Return how many tokens the prompt of a chat has. Raises ModeldError."""
        return await self._result(record, CountRequest(chat=request), terms, Count)

    async def _result(
        self, record: ModelRecord, request: Request, terms: Terms, expected: type[T]
    ) -> T:
        async with self._ask(record, request, terms) as answers:
            async for answer in answers:
                if isinstance(answer, expected):
                    return answer
        raise EngineError("the engine ended the request without a result")

    def _check_welcome(self, resident: Resident, task: Task) -> None:
        """Raise ModelNotLoaded or QueueFull if no request may ask a model now."""
        if not self._settings.load_on_demand and resident.state not in _THERE:
            raise ModelNotLoaded(
                f"{resident.unique} is not in memory, and requests load no models here ([models] "
                f"load_on_demand): load it first, as with `modeld load {resident.unique}`"
            )
        limit = self._settings.queue_limit * (_SHORT_PER_LONG if task in _SHORT else 1)
        if resident.waiting >= limit:
            raise QueueFull(
                f"{resident.waiting} requests wait for {resident.unique} already, and {limit} may "
                "([models] queue_limit)",
                retry_after_s=5,
            )

    @contextlib.asynccontextmanager
    async def _ask(
        self, record: ModelRecord, request: Request, terms: Terms
    ) -> AsyncIterator[AsyncIterator[Answer]]:
        check_context(record, terms)
        resident = self._residency.of(record)
        task = needed_task(request)
        self._check_welcome(resident, task)
        ticket = self._residency.ticket(resident, task, terms)
        asking = self._contexts.asking(record, resident, ticket, request)
        with self._listed(ticket):
            await self._contexts.check_memory(record, resident, ticket)
            while True:
                try:
                    instance = await self._residency.turn(resident, ticket)
                except InsufficientMemory as error:
                    asking.again_without(error)
                    continue
                self._tell(ticket)
                async with self._running(resident, instance, ticket, asking.request) as answers:
                    try:
                        first = await anext(answers)
                    except ContextLengthExceeded as error:
                        exceeded = error
                    else:
                        yield _with_first(first, answers)
                        return
                await asking.again_with_longer(instance, exceeded)

    @contextlib.asynccontextmanager
    async def _running(
        self, resident: Resident, instance: Instance, ticket: Ticket, request: Request
    ) -> AsyncIterator[AsyncIterator[Answer]]:
        """Have the engine work on a request whose turn it is; end that if the caller leaves."""
        worker = instance.worker
        try:
            request_id, entry = worker.submit(request)
        except BaseException:
            self._residency.finished(resident, instance, ticket)
            raise
        # The slot is free when the engine says so: not before, when the client has left already,
        # and not after, when a client that is slow to read has yet to be served.
        entry.finished.add_done_callback(
            lambda _: self._residency.finished(resident, instance, ticket)
        )
        ticket.cancel = partial(worker.cancel, request_id)
        limit_s = self._settings.max_run_s
        limit = None
        if limit_s:
            error = RequestTimeout(
                f"the request ran for {limit_s} s, the longest that one may ([models] max_run_s)",
                should_retry=False,
            )
            loop = asyncio.get_running_loop()
            limit = loop.call_later(limit_s, self._residency.end, ticket, error)
        try:
            yield _told(ticket, worker.answers(entry), partial(_notice, request, instance))
        finally:
            if limit is not None:
                limit.cancel()
            if not entry.finished.done():
                await asyncio.shield(asyncio.ensure_future(worker.cancel(request_id)))


def _notice(request: Request, instance: Instance, done: Done) -> str:
    """Say, for a person, what was not as it was asked for."""
    notices = [done.notice, instance.reduced]
    context_length = instance.loaded.context_length
    if done.finish_reason == "length" and context_length:
        most = getattr(getattr(request, "sampling", None), "max_tokens", None)
        if most is None or done.usage.completion_tokens < most:
            notices.append(
                f"the answer ends here since the context of {context_length} tokens is full; the "
                f"prompt has {done.usage.prompt_tokens}"
            )
    return "; ".join(notice for notice in notices if notice)


async def _with_first(first: Answer, rest: AsyncIterator[Answer]) -> AsyncIterator[Answer]:
    yield first
    async for answer in rest:
        yield answer


async def _told(
    ticket: Ticket, answers: AsyncIterator[Answer], notice: Callable[[Done], str]
) -> AsyncIterator[Answer]:
    """Yield the answers, counted; those of a request that was ended from outside end with why."""
    try:
        async for answer in answers:
            ticket.pieces += isinstance(answer, Delta)
            if isinstance(answer, Done):
                if answer.finish_reason == "cancelled" and ticket.ended_by is not None:
                    raise ticket.ended_by
                yield replace(answer, notice=notice(answer))
            else:
                yield answer
    except ModeldError as error:
        if ticket.ended_by is not None and error is not ticket.ended_by:
            raise ticket.ended_by from error
        raise
