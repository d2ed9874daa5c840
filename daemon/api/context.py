"""What the handlers of all surfaces work with, kept in the application under one typed key."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from backends.registry import Registry
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.config import Config
from daemon.downloads.jobs import Downloads
from daemon.errors import InvalidRequest
from daemon.memory.ledger import Ledger
from daemon.models import ModelManager
from daemon.store import Store
from daemon.workers.machine import Machine
from daemon.workers.prober import Probers


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The daemon's parts. `identity` is this installation's uuid; `stopping` is set at shutdown."""

    config: Config
    identity: str
    catalog: Catalog
    store: Store
    downloads: Downloads
    models: ModelManager
    ledger: Ledger
    registry: Registry
    probers: Probers
    machine: Machine
    stopping: asyncio.Event

    async def delete_files(self, record: ModelRecord) -> None:
        """Remove what is on disk of a model: a download that goes on is cancelled first.

        Raises InvalidRequest for a model that an upstream runs.
        """
        if record.cloud:
            raise InvalidRequest(
                f"{record.unique} runs on an upstream, with no files here: to be rid of it, leave "
                "it out of the models of its [remote.NAME] in the settings"
            )
        async with self.downloads.removing(record.id):
            await self.models.delete_files(record)

    async def delete_model(self, record: ModelRecord) -> None:
        """Remove a model's files and its record."""
        await self.delete_files(record)
        self.catalog.remove(record.id)
        self.models.forget(record.id)


SERVICES = web.AppKey("services", Services)


def services(request: web.Request) -> Services:
    """Return the daemon's parts."""
    return request.app[SERVICES]


def requested_model(request: web.Request) -> ModelRecord:
    """Return the model that the path's `{model}` names, by uuid or unique name.

    Raises ModelNotFound.
    """
    return services(request).catalog.get(request.match_info["model"])
