"""Streams of identifiers: of all that there is of one kind, then of what changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, Literal, NotRequired, TypedDict

from aiohttp import web

from daemon.api.context import services
from daemon.api.operation import operation
from daemon.api.pieces.answers import Reference
from daemon.api.sockets import accept, is_upgrade, push

Kind = Literal["model", "conversation"]


class Identifier(TypedDict):
    """Something that is there, has changed, or is gone, by its kind."""

    model: NotRequired[Reference]
    conversation: NotRequired[Reference]
    deleted: NotRequired[bool]


class Identifiers(TypedDict):
    """Several of them."""

    iterable: list[Identifier]


class VisionStatus(TypedDict):
    """What a feature of Pieces OS does that modeld does not have: nothing."""


def routes() -> list[web.RouteDef]:
    """Return the streams of what modeld has nothing of: clients complain of a 404."""
    kinds = ("assets", "anchors", "ranges")
    return [
        *(web.get(f"/{kind}/stream/identifiers", nothing) for kind in kinds),
        web.get("/workstream_pattern_engine/processors/vision/status/stream", no_vision),
    ]


@operation(Identifiers, frames=Identifiers)
async def nothing(request: web.Request) -> web.StreamResponse:
    """Push that there is nothing of this kind, and never will be."""
    return await push_identifiers(request, "model", (), lambda _: lambda: None)


@operation(VisionStatus, frames=VisionStatus)
async def no_vision(request: web.Request) -> web.StreamResponse:
    """Stay open and push nothing: modeld watches nobody. Clients wait for it to open."""
    if not is_upgrade(request):
        status: VisionStatus = {}
        return web.json_response(status)
    return await push(request, await accept(request), _until_stopping(request))


async def _until_stopping(request: web.Request) -> None:
    await services(request).stopping.wait()


async def push_identifiers(
    request: web.Request,
    kind: Kind,
    every: Collection[str],
    listen: Callable[[Any], Callable[[], None]],
) -> web.StreamResponse:
    """Push the ids of `every`, then those that `listen` tells of; a plain GET gets the former.

    `listen` has a function called with an id and `deleted` after each change, and returns what ends
    that.
    """
    first: Identifiers = {"iterable": [_identifier(kind, key) for key in every]}
    if not is_upgrade(request):
        return web.json_response(first)
    changes: dict[str, bool] = {}
    more = asyncio.Event()

    def changed(key: str, /, *, deleted: bool) -> None:
        changes[key] = deleted  # a slow reader gets each once
        more.set()

    end = listen(changed)  # in the same step as `every`: no change is lost
    try:
        socket = await accept(request)

        async def send() -> None:
            await socket.send_json(first)
            while True:
                await more.wait()
                more.clear()
                batch = [_identifier(kind, key, deleted=gone) for key, gone in changes.items()]
                changes.clear()
                await socket.send_json({"iterable": batch})

        return await push(request, socket, send())
    finally:
        end()


def _identifier(kind: Kind, key: str, *, deleted: bool = False) -> Identifier:
    identifier: Identifier = (
        {"model": {"id": key}} if kind == "model" else {"conversation": {"id": key}}
    )
    if deleted:
        identifier["deleted"] = True
    return identifier
