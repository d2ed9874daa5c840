"""The models that can answer, those in memory, and what is known of one."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web

from backends import thinking
from backends.contract import Task
from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.ollama.answers import (
    AllRunning,
    Details,
    Running,
    Shown,
    Tag,
    Tags,
    Version,
    timestamp,
)
from daemon.api.ollama.names import here, named, shown
from daemon.api.ollama.types import ShowBody
from daemon.api.operation import NO_MODEL, operation
from daemon.catalog.record import ModelRecord
from daemon.models import ModelState

_VERSION = "0.13.5"  # of those that have /v1/responses, as this does: Codex looks at that
_FOR_EVER = timedelta(days=100 * 365)
_CAPABILITIES = {
    Task.CHAT: "completion",
    Task.COMPLETE: "completion",
    Task.VISION: "vision",
    Task.INFILL: "insert",
    Task.EMBED: "embedding",
}


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.get("/", alive),
        web.get("/api/version", version),
        web.get("/api/tags", tags),
        web.get("/api/ps", running),
        web.post("/api/show", show),
    ]


@operation(str)
async def alive(_: web.Request) -> web.Response:
    """Answer the words by which Ollama's clients see that its API is spoken here."""
    return web.Response(text="Ollama is running")


@operation(Version)
async def version(_: web.Request) -> web.Response:
    """Say which version of Ollama's API this is; modeld's own is at /health."""
    answer: Version = {"version": _VERSION}
    return web.json_response(answer)


@operation(Tags)
async def tags(request: web.Request) -> web.Response:
    """List the models that are on this machine, and those of upstreams."""
    records = services(request).catalog.all()
    answer: Tags = {"models": [_tag(record) for record in records if record.downloaded]}
    return web.json_response(answer)


@operation(AllRunning)
async def running(request: web.Request) -> web.Response:
    """List the models in memory."""
    parts = services(request)
    found: list[Running] = []
    for record in parts.catalog.all():
        status = parts.models.status(record.id)
        if status.state is not ModelState.READY:
            continue
        booked = parts.ledger.reservations.get(record.id)
        gpu_bytes = sum(booked.gpus.values()) if booked is not None else 0
        stays_s = status.unloads_in_s
        stays = _FOR_EVER
        if stays_s is not None and stays_s < _FOR_EVER.total_seconds():
            stays = timedelta(seconds=stays_s)
        found.append(
            {
                "name": shown(record.unique),
                "model": shown(record.unique),
                "size": status.measured_bytes + gpu_bytes,
                "digest": _digest(record),
                "details": _details(record),
                "expires_at": timestamp(datetime.now(UTC) + stays),
                "size_vram": gpu_bytes,
                "context_length": status.context_length,
            }
        )
    answer: AllRunning = {"models": found}
    return web.json_response(answer)


@operation(Shown, body=ShowBody, errors=NO_MODEL)
async def show(request: web.Request) -> web.Response:
    """Show what is known of a model that is here: what is shown can answer, to its clients."""
    body = await read_json(request, ShowBody)
    record = here(named(request, body.asked))
    artifact, template = record.artifact, chat_template(record)
    tasks: tuple[Task, ...] = ()
    if artifact is not None:
        explained = await services(request).models.explain(record)
        chosen = [each for each in explained.candidates if each.backend == explained.chosen]
        tasks = chosen[0].fit.tasks if chosen else ()
    answer: Shown = {
        "modelfile": f"# made by modeld: it keeps no Modelfile\nFROM {record.unique}\n",
        "parameters": "",
        "template": template,
        "license": record.license,
        "details": _details(record),
        "model_info": _facts(record),
        "capabilities": _capabilities(record, tasks, template),
        "modified_at": record.created,
    }
    return web.json_response(answer)


def chat_template(record: ModelRecord) -> str:
    """Return the chat template that a model goes by; "" if it has none, or none is known here."""
    return record.chat_template or (record.artifact.chat_template if record.artifact else "")


def _capabilities(record: ModelRecord, tasks: tuple[Task, ...], template: str) -> list[str]:
    """Return what a model can do in Ollama's words: by its tasks, else by the catalog."""
    if record.artifact is None:
        usual = "embedding" if record.usage == "TEXT_EMBEDDING" else "completion"
        return list(dict.fromkeys([usual, *record.capabilities]))
    found = [_CAPABILITIES[task] for task in tasks if task in _CAPABILITIES]
    if "tools" in template:
        found.append("tools")
    if thinking.can_think(template):
        found.append("thinking")
    return list(dict.fromkeys(found))


def _facts(record: ModelRecord) -> dict[str, Any]:
    """Return the facts of a model's header, by the names that GGUF has for them."""
    artifact = record.artifact
    facts: dict[str, Any] = {"general.parameter_count": record.parameters}
    if artifact is None:
        return facts
    facts["general.architecture"] = artifact.architecture
    facts[f"{artifact.architecture}.context_length"] = artifact.context_length
    return facts | artifact.metadata


def _tag(record: ModelRecord) -> Tag:
    return {
        "name": shown(record.unique),
        "model": shown(record.unique),
        "modified_at": record.created,
        "size": record.size_bytes,
        "digest": _digest(record),
        "details": _details(record),
    }


def _digest(record: ModelRecord) -> str:
    """Return the SHA-256 of the model's first file; of its name, if an upstream has its files.

    Clients show the beginning of it, and some fail at an empty one.
    """
    files = record.artifact.files if record.artifact else ()
    return files[0].sha256 if files else hashlib.sha256(record.unique.encode()).hexdigest()


def _details(record: ModelRecord) -> Details:
    family = record.artifact.architecture if record.artifact else record.architecture
    return {
        "parent_model": "",
        "format": record.format,
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _parameters(record.parameters),
        "quantization_level": record.quantization,
    }


def _parameters(count: int) -> str:
    """Return a number of parameters as Ollama writes it, such as 134.52M or 7.6B."""
    if count >= 1e9:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.2f}M" if count else ""
