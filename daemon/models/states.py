"""What is remembered of all models, and how a state changes: in one step, logged and told."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from typing import Any

from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.memory.ledger import Ledger
from daemon.models.resident import ModelState, Resident

log = logging.getLogger(__name__)


class States:
    """All residents by model id, and the tasks that work on them."""

    def __init__(self, catalog: Catalog, ledger: Ledger) -> None:
        self.residents: dict[str, Resident] = {}
        self._catalog = catalog
        self._ledger = ledger
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, record: ModelRecord) -> Resident:
        """Return what is remembered of a model."""
        resident = self.residents.get(record.id)
        if resident is None:
            resident = Resident(model_id=record.id, unique=record.unique)
            resident.follow(record)
            self.residents[record.id] = resident
        return resident

    def change(self, resident: Resident, state: ModelState, *, within_s: float = math.inf) -> None:
        """Change a model's state to one that ends within so many seconds."""
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
        resident.deadline = asyncio.get_running_loop().time() + within_s
        self._catalog.changed(resident.model_id)

    def task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `coroutine` in a task that is kept, and whose error is logged."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task failed", exc_info=error)

    async def settle(self) -> None:
        """Wait until no task is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)
