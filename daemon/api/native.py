"""The native surface: models with all that modeld knows of them, downloads, memory, backends."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Annotated, Any

import msgspec
from aiohttp import web

from backends.contract import BackendError, ClassifyRequest, check_options
from daemon.api.context import Services, requested_model, services
from daemon.api.doctor import doctor
from daemon.api.errors import read_json
from daemon.catalog.database import name_taken, now
from daemon.catalog.record import ModelRecord
from daemon.downloads.jobs import Job
from daemon.errors import InvalidRequest
from daemon.sources import name_for, parse, public


class NewModel(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /modeld/v1/models."""

    source: str
    unique: str = ""
    backend: str = ""
    options: dict[str, bool | int | float | str] = {}
    architecture: Annotated[str, msgspec.Meta(max_length=64)] = ""
    chat_template: Annotated[str, msgspec.Meta(max_length=1024 * 1024)] = ""
    background: bool = False


class Texts(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /modeld/v1/models/{model}/classify."""

    input: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=2048)]
    truncate: bool = False


_SETTINGS = ("backend", "options", "architecture", "chat_template", "background")


def routes() -> list[web.RouteDef]:
    """Return the native routes."""
    base = "/modeld/v1"
    return [
        web.get(f"{base}/models", list_models),
        web.post(f"{base}/models", add_model),
        web.get(f"{base}/models/{{model}}", show_model),
        web.delete(f"{base}/models/{{model}}", remove_model),
        web.get(f"{base}/models/{{model}}/explain", explain),
        web.post(f"{base}/models/{{model}}/classify", classify),
        web.post(f"{base}/models/{{model}}/load", load),
        web.post(f"{base}/models/{{model}}/unload", unload),
        web.post(f"{base}/models/{{model}}/download", download),
        web.post(f"{base}/models/{{model}}/download/cancel", cancel_download),
        web.get(f"{base}/downloads", list_downloads),
        web.get(f"{base}/memory", memory),
        web.get(f"{base}/backends", list_backends),
        web.get(f"{base}/hardware", hardware),
        web.get(f"{base}/doctor", doctor),
    ]


def model_view(parts: Services, record: ModelRecord) -> dict[str, Any]:
    """Return what the native surface shows of a model."""
    status = asdict(parts.models.status(record.id))
    return {
        "id": record.id,
        "unique": record.unique,
        "name": record.name,
        "description": record.description,
        "source": public(record.source),
        "custom": record.custom,
        "cloud": record.cloud,
        "format": record.format,
        "parameters": record.parameters,
        "quantization": record.quantization,
        "size_bytes": record.size_bytes,
        "license": record.license,
        "downloaded": record.downloaded,
        "downloading": parts.downloads.active(record.id),
        **status,
        "context_length": status["context_length"] or record.context_length,
        "last_error": status["last_error"] or None,
        "fixed_backend": record.backend or None,
        "options": record.options,
        "background": record.background,
        "files": [file.path for file in record.artifact.files] if record.artifact else [],
    }


def _answer(parts: Services, model_id: str, status: int = 200) -> web.Response:
    return web.json_response(model_view(parts, parts.catalog.get(model_id)), status=status)


async def list_models(request: web.Request) -> web.Response:
    """List every model of the catalog."""
    parts = services(request)
    return web.json_response({"models": [model_view(parts, r) for r in parts.catalog.all()]})


async def show_model(request: web.Request) -> web.Response:
    """Show one model."""
    return _answer(services(request), requested_model(request).id)


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
        if any(getattr(known, name) != value for name, value in given.items()):
            parts.catalog.update(known.id, **given)
        return _answer(parts, known.id)
    parse(body.source)
    record = parts.catalog.add(
        ModelRecord(
            id=str(uuid.uuid4()),
            unique=unique,
            name=unique,
            created=now(),
            source=body.source,
            custom=True,
            backend=body.backend,
            options=body.options,
            architecture=body.architecture,
            chat_template=body.chat_template,
            background=body.background,
            provider="HUGGING_FACE" if body.source.startswith("hf:") else "",
        )
    )
    return _answer(parts, record.id, status=201)


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


async def remove_model(request: web.Request) -> web.Response:
    """Remove a model: its files, and its record too unless it is a built-in one."""
    parts, record = services(request), requested_model(request)
    if record.custom:
        await parts.delete_model(record)
    else:
        await parts.delete_files(record)
    return web.Response(status=204)


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


async def classify(request: web.Request) -> web.Response:
    """Label texts: for each, the score of every label."""
    parts, record = services(request), requested_model(request)
    body = await read_json(request, Texts)
    inputs = (body.input,) if isinstance(body.input, str) else tuple(body.input)
    found = await parts.models.classify(
        record, ClassifyRequest(inputs=inputs, truncate=body.truncate)
    )
    return web.json_response(
        {
            "model": record.unique,
            "labels": found.labels,
            "usage": {"prompt_tokens": found.usage.prompt_tokens},
        }
    )


async def load(request: web.Request) -> web.Response:
    """Load a model and answer when it is ready."""
    parts, record = services(request), requested_model(request)
    await parts.models.load(record)
    return _answer(parts, record.id)


async def unload(request: web.Request) -> web.Response:
    """Unload a model and answer when its memory is back."""
    parts, record = services(request), requested_model(request)
    await parts.models.unload(record.id)
    return _answer(parts, record.id)


async def download(request: web.Request) -> web.Response:
    """Start a model's download and answer at once."""
    parts, record = services(request), requested_model(request)
    return web.json_response(job_view(parts.downloads.start(record)))


async def cancel_download(request: web.Request) -> web.Response:
    """End a model's download, if there is one, and answer when it has ended."""
    parts, record = services(request), requested_model(request)
    await parts.downloads.cancel(record.id)
    return _answer(parts, record.id)


def job_view(job: Job) -> dict[str, Any]:
    """Return what the native surface shows of a download."""
    return {
        "model": job.model_id,
        "unique": job.unique,
        "state": job.state,
        "done_bytes": job.done_bytes,
        "total_bytes": job.total_bytes,
        "percentage": job.percentage,
        "error": {"code": job.error_code, "message": job.error} if job.error else None,
    }


async def list_downloads(request: web.Request) -> web.Response:
    """List the last download of every model that had one."""
    return web.json_response(
        {"downloads": [job_view(j) for j in services(request).downloads.all()]}
    )


async def memory(request: web.Request) -> web.Response:
    """Show what models may take, what is booked, what is free, and who holds what."""
    ledger = services(request).ledger
    return web.json_response(
        {
            "budget_bytes": ledger.budget_bytes,
            "reserved_bytes": ledger.reserved_bytes,
            "available_bytes": ledger.available_bytes(),
            "models": [
                {
                    "id": model_id,
                    "unique": entry.unique,
                    "estimate_bytes": entry.estimate_bytes,
                    "reserved_bytes": entry.reserved_bytes,
                    "measured_bytes": entry.measured_bytes,
                }
                for model_id, entry in ledger.reservations.items()
            ],
        }
    )


async def list_backends(request: web.Request) -> web.Response:
    """Show every backend: what it can do here, or why it can do nothing."""
    parts = services(request)
    backends = []
    for probe in await parts.probers.all():
        cls = parts.registry.classes.get(probe.backend)
        options = cls.options if cls is not None else {}
        backends.append(
            asdict(probe) | {"options": {name: asdict(given) for name, given in options.items()}}
        )
    return web.json_response({"backends": backends})


async def hardware(request: web.Request) -> web.Response:
    """Show this computer as modeld sees it."""
    return web.json_response(asdict(await services(request).machine.look()))
