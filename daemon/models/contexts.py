"""Longer contexts: for a prompt, or its answer, that does not fit what its model was loaded with.

Owns whether there can be a longer one, and how a request is asked until it fits. Loads nothing
itself: a ticket says what it needs, and a model what its next load should have; the residency
heeds both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from backends.contract import ChatRequest, CompleteRequest, Request
from daemon.catalog.record import ModelRecord
from daemon.config import Models as ModelSettings
from daemon.errors import (
    ContextLengthExceeded,
    InsufficientMemory,
    InvalidRequest,
    ModeldError,
)
from daemon.memory.ledger import Ledger
from daemon.models.admission import Admission
from daemon.models.choice import Choice, described
from daemon.models.resident import Instance, Resident
from daemon.models.turns import Terms, Ticket
from daemon.units import size

# Tokens of an answer that a longer context has room for beside the prompt that it is made for: so
# many if there is memory, and so many at least.
_ANSWER, _LEAST_ANSWER = 512, 64
_STEP = 256  # which lengths of contexts are multiples of


def check_context(record: ModelRecord, terms: Terms) -> None:
    """Raise InvalidRequest for a context that the model does not have."""
    most = record.artifact.context_length if record.artifact is not None else 0
    if terms.context_length and most and terms.context_length > most:
        raise InvalidRequest(
            f"context_length: {record.unique} has a context of {most} tokens at most",
            param="context_length",
        )


class Contexts:
    """Sees whether models can have longer contexts than they were loaded with."""

    def __init__(
        self, *, settings: ModelSettings, choice: Choice, ledger: Ledger, admission: Admission
    ) -> None:
        self._settings = settings
        self._choice = choice
        self._ledger = ledger
        self._admission = admission

    def asking(
        self, record: ModelRecord, resident: Resident, ticket: Ticket, request: Request
    ) -> Asking:
        """Return how a request is asked, from its first turn to the one in which it fits.

        A whole answer is asked for first, unless the user fixed the context or it is an upstream's.
        """
        whole = not self._settings.context_length and not record.cloud
        return Asking(self, record, resident, ticket, request, whole=whole)

    async def check_memory(self, record: ModelRecord, resident: Resident, ticket: Ticket) -> None:
        """See what it would take to load a model anew for a ticket that asks for a longer context.

        Raises InsufficientMemory if there can't be so much: what is loaded stays then. Raises
        ModeldError if the model can't be loaded like that at all.
        """
        instance, wanted = resident.instance, ticket.needs_context
        if instance is None or wanted <= instance.context_length:
            return
        with _held(resident):
            ticket.needs_bytes = await self._least_bytes(record, wanted)
        if not self._admission.could_ever(ticket.needs_bytes, record.id):
            raise InsufficientMemory(
                f"{record.unique} with a context of {wanted} tokens needs "
                f"{size(ticket.needs_bytes)}, and all models together may take "
                f"{size(self._ledger.budget_bytes)}; it is loaded with "
                f"{instance.loaded.context_length}",
                should_retry=False,
            )

    async def want_longer(
        self,
        record: ModelRecord,
        resident: Resident,
        instance: Instance,
        ticket: Ticket,
        exceeded: ContextLengthExceeded,
        *,
        answer: int,
    ) -> None:
        """Have the ticket ask for a context that its prompt fits, and so many tokens after it.

        `exceeded` is what the instance said of the prompt. No other model leaves if only the
        answer's length asks for that. Raises ContextLengthExceeded if there is no such context.
        """
        has, most = instance.context_length, instance.artifact.context_length
        tokens = exceeded.tokens
        if tokens is None or most <= has:
            raise exceeded
        if tokens >= most:
            raise _no_longer(exceeded, f"the model itself has {most}")
        least = min(most, _rounded(tokens + max(answer, _LEAST_ANSWER)))
        if has >= least:  # it was loaded for as much, and its engine can't
            raise exceeded
        try:
            need = await self._least_bytes(record, least)
        except ModeldError as error:
            raise _no_longer(exceeded, error.message) from error
        if not self._could(need, record.id, soft=tokens < has):
            raise _no_longer(
                exceeded,
                f"the model has {most}, but {least} of them take {size(need)}, and all models "
                f"together may take {size(self._ledger.budget_bytes)}",
            )
        ticket.needs_context, ticket.needs_bytes = least, need
        # What else there is memory for, so that the next turns fit too.
        roomy = min(most, max(2 * has, _power_of_two(tokens + _ANSWER)))
        resident.wish = max(resident.wish, roomy)

    def _could(self, need_bytes: int, model_id: str, *, soft: bool) -> bool:
        if soft:
            return need_bytes <= self._ledger.book().room({model_id})
        return self._admission.could_ever(need_bytes, model_id)

    async def _least_bytes(self, record: ModelRecord, context_length: int) -> int:
        """Return what a load with so long a context takes at least. Raises ModeldError."""
        files = described(record)
        planned = await self._choice.plan(record, files, context_length=context_length)
        return min(step.total_bytes for step in (planned.estimate, *planned.smaller))


class Asking:
    """One request, asked until the context of its model suffices, or there is no longer one.

    Engines are asked for a whole answer first: one whose `max_tokens` do not fit is worth a longer
    context as well. If there is none for that, the answer may end early.
    """

    def __init__(
        self,
        contexts: Contexts,
        record: ModelRecord,
        resident: Resident,
        ticket: Ticket,
        request: Request,
        *,
        whole: bool,
    ) -> None:
        self._contexts = contexts
        self._record = record
        self._resident = resident
        self._ticket = ticket
        self._request = request
        self._whole = whole
        self._exceeded: ContextLengthExceeded | None = None

    @property
    def request(self) -> Request:
        """What to ask the engine in the next turn."""
        return _wanted_whole(self._request) if self._whole else self._request

    async def again_with_longer(self, instance: Instance, exceeded: ContextLengthExceeded) -> None:
        """Have the ticket wait once more, now that the request did not fit the instance.

        The slot must have been given back: the model may be loaded anew. Raises
        ContextLengthExceeded if a longer context would be needed and there is none.
        """
        self._exceeded = exceeded
        answer = _answer_tokens(self._request, whole=self._whole)
        with _held(self._resident):
            try:
                await self._contexts.want_longer(
                    self._record, self._resident, instance, self._ticket, exceeded, answer=answer
                )
            except ContextLengthExceeded:
                if not self._whole:
                    raise
                self._whole = False  # then the answer may be shorter than it might
        self._ticket.again()

    def again_without(self, error: InsufficientMemory) -> None:
        """Have the ticket wait once more, now that there was no memory for what it asked for.

        Raises `error` if that had nothing to do with a longer context, or may be over soon; raises
        ContextLengthExceeded if the prompt needs one.
        """
        exceeded = self._exceeded
        if exceeded is None or error.retry_after_s is not None:
            raise error
        if not self._whole:
            raise _no_longer(exceeded, error.message) from error
        self._whole, self._ticket.needs_context = False, self._ticket.terms.context_length or 0
        self._ticket.again()


@contextlib.contextmanager
def _held(resident: Resident) -> Iterator[None]:
    """Hold a model for a request that is neither in its queue nor runs."""
    resident.between += 1
    try:
        yield
    finally:
        resident.between -= 1


def _no_longer(exceeded: ContextLengthExceeded, why: str) -> ContextLengthExceeded:
    """Return the error for a prompt that a longer context would hold, and why there is none."""
    return ContextLengthExceeded(f"{exceeded.message}; {why}", tokens=exceeded.tokens)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP


def _wanted_whole(request: Request) -> Request:
    """Return the request as one whose answer is to have all the room that it may take."""
    if isinstance(request, ChatRequest | CompleteRequest):
        return replace(request, sampling=replace(request.sampling, whole=True))
    return request


def _answer_tokens(request: Request, *, whole: bool) -> int:
    """Return how many tokens the answer is to have room for, 0 if it may be cut short."""
    if whole and isinstance(request, ChatRequest | CompleteRequest):
        return request.sampling.max_tokens or 0
    return 0
