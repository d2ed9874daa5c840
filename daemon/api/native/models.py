"""Models: the list, adding, changing and removing them, and what runs them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from aiohttp import web

from backends.contract import BackendError, ClassifyRequest, check_options
from daemon.api.adding import new_model
from daemon.api.context import BASE, Services, requested_model, services
from daemon.api.errors import read_json
from daemon.api.native.answers import Explanation, Labels, Models, ModelView
from daemon.api.native.view import answer, model_view
from daemon.api.operation import NO_MODEL, WORK, operation
from daemon.api.terms import TermsBody, duration
from daemon.catalog.database import name_taken
from daemon.errors import Conflict, InvalidRequest
from daemon.sources import name_for, parse


class NewModel(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /modeld/v1/models."""

    source: str
    unique: str = ""
    backend: str = ""
    options: dict[str, bool | int | float | str] = {}
    architecture: Annotated[str, msgspec.Meta(max_length=64)] = ""
    chat_template: Annotated[str, msgspec.Meta(max_length=1024 * 1024)] = ""
    background: bool = False
    pinned: bool = False
    keep_alive: int | float | str = ""


class Changes(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PATCH /modeld/v1/models/{model}. An empty `keep_alive` is that of the settings."""

    pinned: bool | None = None
    keep_alive: int | float | str | None = None


class Texts(TermsBody, kw_only=True):
    """Body of POST /modeld/v1/models/{model}/classify."""

    input: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=2048)]
    truncate: bool = False


_SETTINGS = ("backend", "options", "architecture", "chat_template", "background", "pinned")


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.get(f"{BASE}/models", list_models),
        web.post(f"{BASE}/models", add_model),
        web.get(f"{BASE}/models/{{model}}", show_model),
        web.patch(f"{BASE}/models/{{model}}", change_model),
        web.delete(f"{BASE}/models/{{model}}", remove_model),
        web.get(f"{BASE}/models/{{model}}/explain", explain),
        web.post(f"{BASE}/models/{{model}}/classify", classify),
    ]


@operation(Models)
async def list_models(request: web.Request) -> web.Response:
    """List every model of the catalog."""
    parts = services(request)
    return web.json_response({"models": [model_view(parts, r) for r in parts.catalog.all()]})


@operation(ModelView, errors=NO_MODEL)
async def show_model(request: web.Request) -> web.Response:
    """Show one model."""
    return answer(services(request), requested_model(request).id)


@operation(answers={200: ModelView, 201: ModelView}, body=NewModel, errors=(Conflict,))
async def add_model(request: web.Request) -> web.Response:
    """Add a model by its source: 201 and its record, or 200 if it is there already.

    Settings that are given for a model that is there replace its own, from its next load on.
    """
    parts = services(request)
    body = await read_json(request, NewModel)
    unique = body.unique or name_for(parse(body.source))
    if body.backend and body.backend not in parts.registry.paths:
        names = ", ".join(sorted(parts.registry.paths))
        raise InvalidRequest(f"backend: {body.backend!r} is none of {names}", param="backend")
    _check_options(parts, body)
    known = parts.catalog.find(unique)
    if known is not None:
        if known.source != body.source:
            raise name_taken(known)
        given = {name: getattr(body, name) for name in _SETTINGS if getattr(body, name)}
        if body.keep_alive != "":
            given["keep_alive"] = _keep_alive(body.keep_alive)
        if any(getattr(known, name) != value for name, value in given.items()):
            parts.models.changed(parts.catalog.update(known.id, **given))
        return answer(parts, known.id)
    parse(body.source)
    settings = {name: getattr(body, name) for name in _SETTINGS}
    keep_alive = _keep_alive(body.keep_alive)
    record = new_model(parts, body.source, unique, keep_alive=keep_alive, **settings)
    return answer(parts, record.id, status=201)


def _keep_alive(value: float | str) -> str:
    """Return a duration as records keep it. Raises InvalidRequest."""
    if value == "":
        return ""
    duration(value, "keep_alive")
    # A duration has no exponent, which Python writes numbers with that are large or small enough.
    return f"{value:f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@operation(ModelView, body=Changes, errors=NO_MODEL)
async def change_model(request: web.Request) -> web.Response:
    """Change how long a model stays in memory, and whether it has to make room for others."""
    parts, record = services(request), requested_model(request)
    body = await read_json(request, Changes)
    changes: dict[str, Any] = {}
    if body.pinned is not None:
        changes["pinned"] = body.pinned
    if body.keep_alive is not None:
        changes["keep_alive"] = _keep_alive(body.keep_alive)
    parts.models.changed(parts.catalog.update(record.id, **changes))
    return answer(parts, record.id)


def _check_options(parts: Services, body: NewModel) -> None:
    """Raise InvalidRequest for options that no backend takes, or not the one that is asked for."""
    names = [body.backend] if body.backend else list(parts.registry.classes)
    refused = []
    for name in names:
        if name not in parts.registry.classes:
            continue
        try:
            check_options(name, parts.registry.classes[name].options, body.options)
        except BackendError as error:
            refused.append(error.message)
        else:
            return
    if body.options:
        raise InvalidRequest(f"options: {'; '.join(refused)}", param="options")


@operation(answers={204: None}, errors=(*NO_MODEL, Conflict, InvalidRequest))
async def remove_model(request: web.Request) -> web.Response:
    """Remove a model: its files, and its record too unless it is a built-in one."""
    parts, record = services(request), requested_model(request)
    if record.custom:
        await parts.delete_model(record)
    else:
        await parts.delete_files(record)
    return web.Response(status=204)


@operation(Explanation, errors=NO_MODEL)
async def explain(request: web.Request) -> web.Response:
    """Show what each backend makes of a model, which one is chosen, and why."""
    parts, record = services(request), requested_model(request)
    explanation = await parts.models.explain(record)
    candidates = [
        {
            "backend": candidate.backend,
            "score": candidate.fit.score,
            "reason": candidate.fit.reason,
            "tasks": candidate.fit.tasks,
        }
        for candidate in explanation.candidates
    ]
    return web.json_response(
        {
            "model": record.unique,
            "chosen": explanation.chosen or None,
            "fixed": explanation.fixed or None,
            "last_error": parts.models.status(record.id).last_error or None,
            "passed_over": parts.models.status(record.id).passed_over,
            "candidates": candidates,
        }
    )


@operation(Labels, body=Texts, errors=WORK)
async def classify(request: web.Request) -> web.Response:
    """Label texts: for each, the score of every label."""
    parts, record = services(request), requested_model(request)
    body = await read_json(request, Texts)
    inputs = (body.input,) if isinstance(body.input, str) else tuple(body.input)
    found = await parts.models.classify(
        record, ClassifyRequest(inputs=inputs, truncate=body.truncate), body.terms()
    )
    return web.json_response(
        {
            "model": record.unique,
            "labels": found.labels,
            "usage": {"prompt_tokens": found.usage.prompt_tokens},
        }
    )
