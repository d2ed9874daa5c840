"""The Model endpoints of the Pieces API."""

from __future__ import annotations

import uuid

from aiohttp import web

from daemon.api.context import Services, services
from daemon.api.errors import read_json
from daemon.api.operation import operation
from daemon.api.pieces import aliases
from daemon.api.pieces.answers import Model, ModelReference, Models
from daemon.api.pieces.schema import ModelBody, model_view
from daemon.catalog.database import check_unique, name_taken, now
from daemon.catalog.record import ModelRecord
from daemon.errors import InvalidRequest, ModelNotFound


def routes() -> list[web.RouteDef]:
    """Return the routes of single models and of all models."""
    return [
        web.get("/models", snapshot_all),
        web.post("/models/create", create),
        web.post("/models/unload", unload_all),
        web.post("/models/{model}/delete", delete),
        web.post("/models/{model}/delete/cache", delete_cache),
        web.post("/model/update", update),
        web.get("/model/{model}", snapshot),
        web.post("/model/{model}/download", download),
        web.post("/model/{model}/download/cancel", cancel_download),
        web.post("/model/{model}/load", load),
        web.post("/model/{model}/unload", unload),
        web.post("/model/{model}/scores/increment", increment_score),
    ]


def _answer(request: web.Request, key: str) -> web.Response:
    return web.json_response(aliases.view(services(request), key))


def _key(request: web.Request) -> str:
    """Return the id that the path names: a model's, or an alias's."""
    return request.match_info["model"]


@operation(Models)
async def snapshot_all(request: web.Request) -> web.Response:
    """List all models."""
    parts = services(request)
    found = [model_view(parts, record) for record in parts.catalog.all()]
    answer: Models = {"iterable": [*found, *aliases.views(parts)]}
    return web.json_response(answer)


@operation(answers={200: Model, 410: str})
async def snapshot(request: web.Request) -> web.Response:
    """Show one model; 410 if there is none."""
    try:
        return _answer(request, _key(request))
    except ModelNotFound:
        return web.Response(status=410, text="model was not found.")


@operation(Model, body=ModelBody)
async def create(request: web.Request) -> web.Response:
    """Register a custom model. A model of that unique name is returned as it is, never doubled."""
    parts = services(request)
    body = await read_json(request, ModelBody, strict=False)
    body.check()
    unique, source = body.name_and_source()
    known = parts.catalog.find(check_unique(unique))
    if known is not None and source and known.source != source:
        known = _give_source(parts, known, source)
    if known is None:
        known = parts.catalog.add(
            ModelRecord(
                id=str(uuid.uuid4()),
                unique=unique,
                created=now(),
                source=source,
                custom=True,
                **body.changes(),
            )
        )
    return _answer(request, known.id)


def _give_source(parts: Services, known: ModelRecord, source: str) -> ModelRecord:
    """Return `known` with `source`, if it has waited for one. Raises Conflict otherwise."""
    if known.custom and not known.source and not known.downloaded:
        return parts.catalog.update(known.id, source=source)
    raise name_taken(known)


@operation(Model, body=ModelBody)
async def update(request: web.Request) -> web.Response:
    """Change a custom model."""
    parts = services(request)
    body = await read_json(request, ModelBody, strict=False)
    body.check()
    if body.id is None:
        raise InvalidRequest("id: the model to update is missing")
    record = aliases.no_alias(request, body.id)
    if not record.custom:
        raise InvalidRequest(
            f"{record.unique} is a built-in model; only custom ones can be changed"
        )
    changes = body.changes()
    if body.unique and body.unique != record.unique:
        unique, source = body.name_and_source()
        changes |= {"unique": unique} | ({"source": source} if source else {})
    parts.catalog.update(record.id, **changes)
    return _answer(request, record.id)


@operation(answers={204: None})
async def delete(request: web.Request) -> web.Response:
    """Remove a custom model, its files included."""
    parts, record = services(request), aliases.no_alias(request, _key(request))
    if not record.custom:
        raise InvalidRequest(
            f"{record.unique} is a built-in model and stays in the list; its downloaded files can "
            f"be removed with POST /models/{record.id}/delete/cache"
        )
    await parts.delete_model(record)
    return web.Response(status=204)


@operation(ModelReference)
async def delete_cache(request: web.Request) -> web.Response:
    """Remove a model's downloaded files."""
    parts, record = services(request), aliases.no_alias(request, _key(request))
    await parts.delete_files(record)
    return web.json_response({"model": {"id": record.id}})


@operation(Model)
async def download(request: web.Request) -> web.Response:
    """Start a model's download and answer at once."""
    parts, record = services(request), aliases.meant(request, _key(request))
    parts.downloads.start(record)
    return _answer(request, _key(request))


@operation(Model)
async def cancel_download(request: web.Request) -> web.Response:
    """End a model's download, if there is one."""
    parts, record = services(request), aliases.meant(request, _key(request))
    await parts.downloads.cancel(record.id)
    return _answer(request, _key(request))


@operation(Model)
async def load(request: web.Request) -> web.Response:
    """Load a model and answer when it is ready."""
    parts, record = services(request), aliases.meant(request, _key(request))
    await parts.models.load(record)
    return _answer(request, _key(request))


@operation(Model)
async def unload(request: web.Request) -> web.Response:
    """Unload a model and answer when its memory is back."""
    parts, record = services(request), aliases.meant(request, _key(request))
    await parts.models.unload(record.id)
    return _answer(request, _key(request))


@operation(answers={204: None})
async def unload_all(request: web.Request) -> web.Response:
    """Unload every model."""
    await services(request).models.unload_all()
    return web.Response(status=204)


@operation(answers={204: None})
async def increment_score(request: web.Request) -> web.Response:
    """Count one use of a model."""
    parts, record = services(request), aliases.meant(request, _key(request))
    parts.catalog.update(record.id, uses=record.uses + 1)
    return web.Response(status=204)
