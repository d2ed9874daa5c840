"""What the handlers of all surfaces work with, kept in the application under one typed key."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from backends.registry import Registry
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.chats import Chats
from daemon.config import Config
from daemon.downloads.jobs import Downloads
from daemon.downloads.peek import Peeker
from daemon.errors import InvalidRequest
from daemon.memory.ledger import Ledger
from daemon.models import ModelManager
from daemon.models.choice import files_key
from daemon.models.conversations import Conversations
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
    peeker: Peeker
    conversations: Conversations
    chats: Chats
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
        await self._forget_conversations(record)

    async def _forget_conversations(self, record: ModelRecord) -> None:
        """Remove what was kept of a model's conversations, unless another has the same files."""
        if record.artifact is None:
            return
        key = files_key(record.artifact)
        others = (other.artifact for other in self.catalog.all())
        if not any(other is not None and files_key(other) == key for other in others):
            await asyncio.to_thread(self.conversations.forget, record.artifact)

    async def delete_model(self, record: ModelRecord) -> None:
        """Remove a model's files and its record."""
        await self.delete_files(record)
        self.catalog.remove(record.id)
        self.models.forget(record.id)


SERVICES = web.AppKey("services", Services)
BASE = "/modeld/v1"  # of the native surface
NOTICE = "X-Modeld-Notice"  # the header that says what was not as it was asked for
_ASKED = web.RequestKey("asked", str)


def services(request: web.Request) -> Services:
    """Return the daemon's parts."""
    return request.app[SERVICES]


def requested_model(request: web.Request) -> ModelRecord:
    """Return the model that the path's `{model}` names. See asked_model."""
    return asked_model(request, request.match_info["model"])


def asked_model(request: web.Request, name: str) -> ModelRecord:
    """Return the model that a request names, by uuid or unique name, with `:latest` or without.

    Its answer will say so if the model was loaded with less than it should be, for want of memory.
    Raises ModelNotFound.
    """
    catalog = services(request).catalog
    record = catalog.find(name) or catalog.find(name.removesuffix(":latest")) or catalog.get(name)
    request[_ASKED] = record.id
    return record


async def tell_reduced(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: have an answer say what its model was loaded with less of."""
    model_id = request.get(_ASKED)
    if model_id is not None and (reduced := services(request).models.status(model_id).reduced):
        response.headers.setdefault(NOTICE, reduced)
