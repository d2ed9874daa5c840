"""Removing and copying models; and what this daemon does not do, said so."""

from __future__ import annotations

import asyncio
import uuid

import msgspec
from aiohttp import web

from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.ollama.names import here, named
from daemon.api.ollama.types import CopyBody, NameBody
from daemon.api.operation import NO_MODEL, operation
from daemon.catalog.database import check_unique, now
from daemon.errors import Conflict, InvalidRequest, ModelNotDownloaded, NotSupported


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.delete("/api/delete", delete),
        web.post("/api/copy", copy),
        web.post("/api/create", create),
        web.post("/api/push", push),
        web.head("/api/blobs/{digest}", has_blob),
        web.post("/api/blobs/{digest}", take_blob),
    ]


@operation(answers={200: None}, body=NameBody, errors=(*NO_MODEL, Conflict))
async def delete(request: web.Request) -> web.Response:
    """Remove a model: its files, and its record too unless it is a built-in one."""
    body = await read_json(request, NameBody)
    # What is removed has to be named in full: a bare name could mean another tag than was thought.
    record = named(request, body.asked, exact=True)
    parts = services(request)
    if record.custom:
        await parts.delete_model(record)
    else:
        await parts.delete_files(here(record))
    return web.Response()


@operation(answers={200: None}, body=CopyBody, errors=(*NO_MODEL, Conflict))
async def copy(request: web.Request) -> web.Response:
    """Have a model under another name too. Its files take no more room; each can be removed."""
    body = await read_json(request, CopyBody)
    parts, record = services(request), named(request, body.source)
    unique = check_unique(body.destination.removesuffix(":latest"))
    if record.cloud:
        raise InvalidRequest(f"{record.unique} runs on an upstream: it can't be copied here")
    if record.artifact is None:
        raise ModelNotDownloaded(
            f"{record.unique} has no files here to copy: download it first, as with `modeld pull "
            f"{record.unique}`"
        )
    if parts.catalog.find(unique) is not None:
        raise Conflict(f"a model named {unique!r} is there already", param="destination")
    model_id = str(uuid.uuid4())
    artifact = await asyncio.to_thread(parts.store.copy, record.artifact, record.id, model_id)
    copied = msgspec.structs.replace(
        record, id=model_id, unique=unique, created=now(), custom=True, uses=0, artifact=artifact
    )
    try:
        parts.catalog.add(copied)
    except BaseException:
        await asyncio.to_thread(parts.store.drop_model, model_id)
        raise
    return web.Response()


@operation(answers={}, errors=(NotSupported,))
async def create(_: web.Request) -> web.Response:
    """Refuse: models are not made of Modelfiles here."""
    raise NotSupported(
        "modeld makes no models of Modelfiles: add one with `modeld pull SOURCE` or `modeld import "
        "PATH`, or with POST /modeld/v1/models, which takes options and a chat_template"
    )


@operation(answers={}, errors=(NotSupported,))
async def push(_: web.Request) -> web.Response:
    """Refuse: nothing leaves this computer."""
    raise NotSupported("modeld pushes no models: publish the file with the tools of its hub")


_NO_UPLOADS = "modeld takes no uploads: import the file with `modeld import PATH`"


@operation(answers={}, errors=(NotSupported,))
async def has_blob(_: web.Request) -> web.Response:
    """Refuse: no upload is ever here."""
    raise NotSupported(_NO_UPLOADS)


@operation(answers={}, errors=(NotSupported,))
async def take_blob(_: web.Request) -> web.Response:
    """Refuse: files come by pull or import."""
    raise NotSupported(_NO_UPLOADS)
