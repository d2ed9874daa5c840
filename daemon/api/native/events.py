"""One stream of all that changes, for apps that show it live: a WebSocket, or server-sent events.

The first event is a `snapshot` of everything. Then each change of a model, a download, a request or
the memory is an event that carries it whole, as it is when the event is sent: a client that reads
slowly misses what was between, never the last state.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import msgspec
from aiohttp import web

from daemon.api.context import BASE, Services, services
from daemon.api.native.answers import Event, MemoryNow
from daemon.api.native.downloads import job_view
from daemon.api.native.view import model_view
from daemon.api.operation import operation
from daemon.api.sockets import accept, is_upgrade, push
from daemon.api.streams import NamedEventStream
from daemon.downloads.job import Job

_PAUSE_S = 0.1  # between two looks at what changed: ten events a second of one thing are enough
_SILENCE_S = 15.0  # after which a comment shows that the stream is still there


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.get(f"{BASE}/events", events)]


@operation(stream=Event, frames=Event)
async def events(request: web.Request) -> web.StreamResponse:
    """Push all that changes: as server-sent events, or over a WebSocket."""
    parts = services(request)
    with _changes(parts) as coming:
        if is_upgrade(request):
            socket = await accept(request)

            async def send_frames() -> None:
                async for event in coming:
                    if event is not None:
                        await socket.send_str(msgspec.json.encode(event).decode())

            return await push(request, socket, send_frames())
        stream = NamedEventStream(request)

        async def send_events() -> None:
            async for event in coming:
                if event is None:
                    await stream.write(b": nothing new\n\n")
                else:
                    await stream.send(dict(event))

        await _until_stopping(parts, send_events())
    return stream.response


async def _until_stopping(parts: Services, sending: Coroutine[Any, Any, None]) -> None:
    """Send until the client leaves, or the daemon stops."""
    task = asyncio.ensure_future(sending)
    stopping = asyncio.create_task(parts.stopping.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, stopping):
            each.cancel()
        await asyncio.wait({task, stopping})


def _memory(parts: Services) -> MemoryNow:
    """Return what models take of the memory that they may take, in bytes."""
    ledger = parts.ledger
    return {
        "budget_bytes": ledger.budget_bytes,
        "reserved_bytes": ledger.reserved_bytes,
        "unreserved_bytes": ledger.budget_bytes - ledger.reserved_bytes,
        "critical": parts.models.critical,
    }


def _snapshot(parts: Services) -> Event:
    return {
        "type": "snapshot",
        "models": [model_view(parts, record) for record in parts.catalog.all()],
        "downloads": [job_view(job) for job in parts.downloads.all()],
        "requests": parts.models.requests(),
        "memory": _memory(parts),
    }


@contextlib.contextmanager
def _changes(parts: Services) -> Iterator[AsyncIterator[Event | None]]:
    """Give all events from now on; None from time to time while there are none."""
    changed: dict[tuple[str, str], None] = {}  # in the order of the changes
    more = asyncio.Event()

    def note(kind: str, key: str) -> None:
        changed[kind, key] = None
        more.set()

    def model_changed(model_id: str, *, deleted: bool) -> None:
        del deleted
        note("model", model_id)

    def job_changed(job: Job) -> None:
        note("download", job.model_id)

    ends: list[Callable[[], None]] = [
        parts.catalog.listen(model_changed),
        parts.downloads.listen(job_changed),
        parts.models.listen(lambda key: note("request", key)),
    ]
    try:
        yield _events(parts, changed, more)
    finally:
        for end in ends:
            end()


async def _events(
    parts: Services, changed: dict[tuple[str, str], None], more: asyncio.Event
) -> AsyncIterator[Event | None]:
    memory = _memory(parts)
    yield _snapshot(parts)
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                await more.wait()
        except TimeoutError:
            yield None
            continue
        more.clear()
        batch = list(changed)
        changed.clear()
        for kind, key in batch:
            if (event := _event(parts, kind, key)) is not None:
                yield event
        if (now := _memory(parts)) != memory:
            memory = now
            yield {"type": "memory", "memory": now}
        await asyncio.sleep(_PAUSE_S)


def _event(parts: Services, kind: str, key: str) -> Event | None:
    """Return the event that shows something as it is now."""
    if kind == "model":
        record = parts.catalog.find(key)
        if record is None:
            return {"type": "model_deleted", "id": key}
        return {"type": "model", "model": model_view(parts, record)}
    if kind == "download":
        job = parts.downloads.get(key)
        return {"type": "download", "download": job_view(job)} if job is not None else None
    status = parts.models.request(key)
    if status is None:
        return {"type": "request_ended", "id": key}
    return {"type": "request", "request": status}
