"""Models that run elsewhere: keeps the catalog true to what the configured upstreams list.

Upstreams are asked at the start, and again when somebody looks for models and the last answer is
old; nobody ever waits for that. What is known of one that does not answer stays. Owns who runs
what under which name; knows no HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from backends.contract import Artifact, Upstream
from daemon.catalog.database import Catalog, cloud_id, now
from daemon.catalog.record import ModelRecord
from daemon.config import Remote
from daemon.errors import EngineError, LoadFailed
from daemon.sources import RemoteSource, parse_remote
from daemon.workers.lister import list_models

_STALE_S = 60.0  # an answer that is older is asked for again when somebody looks
_FAILED_S = 5.0  # the same for a question that was not answered
_NAME_LENGTH = 200
Gone = Callable[[ModelRecord], Awaitable[None]]
log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class _Inquiry:
    """What is known of asking one upstream. `due` is a monotonic time."""

    due: float = 0.0
    problem: str = ""
    task: asyncio.Task[None] | None = None


class Upstreams:
    """The upstreams of the settings, by name. Must be used on the event loop's thread."""

    def __init__(self, settings: Mapping[str, Remote], catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        self._inquiries = {name: _Inquiry() for name in settings}
        self._gone: Gone | None = None

    def begin(self, gone: Gone) -> None:
        """Forget what the settings no longer allow, and begin to ask.

        `gone` removes a model that its upstream has no more. Called before anything is loaded.
        """
        for record in self._catalog.cloud():
            if not self._allowed(parse_remote(record.source)):
                self._catalog.remove(record.id)
        self._gone = gone
        self._catalog.on_lookup(self._looked_up)
        self._looked_up("")

    async def close(self) -> None:
        """End what is still being asked, and ask no more."""
        self._gone = None
        tasks = [inquiry.task for inquiry in self._inquiries.values() if inquiry.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def of(self, record: ModelRecord) -> Upstream | None:
        """Return where a cloud model runs, None for any other. Raises LoadFailed."""
        if not record.cloud:
            return None
        source = parse_remote(record.source)
        if not self._allowed(source):
            raise LoadFailed(f"{record.unique}: the settings have no [remote.{source.upstream}]")
        inquiry = self._inquiries[source.upstream]
        if inquiry.problem:
            self._ask_if_due(source.upstream)
        return self._settings[source.upstream].upstream(source.model)

    def _allowed(self, source: RemoteSource) -> bool:
        settings = self._settings.get(source.upstream)
        return settings is not None and settings.allows(source.model)

    def _looked_up(self, key: str) -> None:
        """Ask again what is due: all upstreams for a listing, one for a name that is not known."""
        for name in self._inquiries:
            if not key or key.lower().startswith(f"{name}:"):
                self._ask_if_due(name)

    def _ask_if_due(self, name: str) -> None:
        inquiry = self._inquiries[name]
        asking = inquiry.task is not None and not inquiry.task.done()
        if self._gone is not None and not asking and time.monotonic() >= inquiry.due:
            inquiry.task = asyncio.create_task(self._ask(name, inquiry, self._gone))

    async def _ask(self, name: str, inquiry: _Inquiry, gone: Gone) -> None:
        try:
            listed = await list_models(name, self._settings[name].upstream())
            changed = await self._take_over(name, listed, gone)
        except EngineError as error:
            if inquiry.problem != error.message:
                log.warning("upstream=%s its models are not known now: %s", name, error.message)
            inquiry.problem = error.message
            inquiry.due = time.monotonic() + _FAILED_S
        except Exception as error:  # whatever it was: the next one who looks asks again
            log.exception("upstream=%s its models could not be recorded", name)
            inquiry.problem, inquiry.due = repr(error), time.monotonic() + _FAILED_S
        else:
            if changed or inquiry.problem or not inquiry.due:
                log.info(
                    "upstream=%s lists %d models; %s", name, len(listed), changed or "as known"
                )
            inquiry.problem, inquiry.due = "", time.monotonic() + _STALE_S

    async def _take_over(self, name: str, listed: Mapping[str, int], gone: Gone) -> str:
        """Make the catalog's models of one upstream the allowed ones of those that it listed.

        Return, for the log, what changed.
        """
        sources = {
            str(RemoteSource(upstream=name, model=model)): model
            for model in listed
            if self._settings[name].allows(model)
        }
        known = {
            record.source: record
            for record in self._catalog.cloud()
            if parse_remote(record.source).upstream == name
        }
        removed = [record for source, record in known.items() if source not in sources]
        for record in removed:
            await gone(record)
        added = 0
        # Names that need no change first, so that they are the ones which stay as they are.
        for source, model in sorted(
            sources.items(), key=lambda item: (_named(name, item[1]) != f"{name}:{item[1]}", item)
        ):
            artifact = _artifact(name, model, listed[model])
            if source not in known:
                self._catalog.add(_record(self._free_name(name, model), source, model, artifact))
                added += 1
            elif known[source].artifact != artifact:
                self._catalog.update(
                    known[source].id, artifact=artifact, context_length=artifact.context_length
                )
        return f"{added} are new, {len(removed)} are gone" if added or removed else ""

    def _free_name(self, name: str, model: str) -> str:
        """Return a unique name that no other model has."""
        unique = _named(name, model)
        if self._catalog.find(unique) is None:
            return unique
        digest = hashlib.sha256(model.encode()).hexdigest()[:8]
        return f"{unique[: _NAME_LENGTH - 9]}-{digest}"


def _named(name: str, model: str) -> str:
    return f"{name}:{re.sub(r'[^A-Za-z0-9._:-]', '-', model)}"[:_NAME_LENGTH]


def _artifact(name: str, model: str, context_length: int) -> Artifact:
    return Artifact(
        format="remote",
        files=(),
        architecture="",
        parameters=0,
        quantization="",
        context_length=context_length,
        weights_bytes=0,
        metadata={"remote.upstream": name, "remote.model": model},
    )


def _record(unique: str, source: str, model: str, artifact: Artifact) -> ModelRecord:
    return ModelRecord(
        id=cloud_id(source),
        unique=unique,
        name=model,
        created=now(),
        source=source,
        description=f"Runs on the upstream {artifact.metadata['remote.upstream']}.",
        format="remote",
        context_length=artifact.context_length,
        artifact=artifact,
        # Not for the setting that names a backend for every model: no other can run this one.
        backend="remote",
        cloud=True,
    )
