"""Loading, unloading, and what a load would take."""

from __future__ import annotations

import asyncio
import shutil
from typing import Annotated, Any

import msgspec
from aiohttp import web

from backends.contract import Artifact
from daemon.api.context import BASE, Services, requested_model, services
from daemon.api.errors import read_json, read_query
from daemon.api.native.answers import EstimateView, ModelView
from daemon.api.native.view import answer
from daemon.api.operation import NO_MODEL, WORK, operation
from daemon.api.terms import ContextLength, TermsBody
from daemon.catalog.database import now
from daemon.catalog.record import ModelRecord
from daemon.downloads.messages import Peeked
from daemon.downloads.publish import DISK_MARGIN_BYTES
from daemon.downloads.unfinished import missing_bytes
from daemon.errors import BackendUnavailable, DownloadFailed, InvalidRequest, ModelNotFound
from daemon.models.choice import Planned
from daemon.sources import name_for, parse
from daemon.store import Store

Slots = Annotated[int, msgspec.Meta(ge=1, le=1024)]


# What can go wrong when one looks at files that may be elsewhere.
_LOOK = (ModelNotFound, BackendUnavailable, DownloadFailed)


class Question(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The settings that an estimate is wanted for; None leaves one to modeld."""

    context_length: ContextLength | None = None
    slots: Slots | None = None


class SourceQuestion(Question, kw_only=True):
    """Body of POST /modeld/v1/estimate."""

    source: str
    architecture: Annotated[str, msgspec.Meta(max_length=64)] = ""


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.post(f"{BASE}/models/{{model}}/load", load),
        web.post(f"{BASE}/models/{{model}}/unload", unload),
        web.get(f"{BASE}/models/{{model}}/estimate", estimate),
        web.post(f"{BASE}/estimate", estimate_source),
    ]


@operation(ModelView, body=TermsBody, optional_body=True, errors=WORK)
async def load(request: web.Request) -> web.Response:
    """Load a model and answer when it is ready.

    It stays until it is unloaded or has to make room; with a `keep_alive` for that long.
    """
    parts, record = services(request), requested_model(request)
    terms = (await read_json(request, TermsBody, empty=True)).terms()
    await parts.models.load(record, terms)
    return answer(parts, record.id)


@operation(ModelView, errors=NO_MODEL)
async def unload(request: web.Request) -> web.Response:
    """Unload a model and answer when its memory is back."""
    parts, record = services(request), requested_model(request)
    await parts.models.unload(record.id)
    return answer(parts, record.id)


@operation(EstimateView, query=Question, errors=_LOOK)
async def estimate(request: web.Request) -> web.Response:
    """Show what a load of a model would take, also of one that is not downloaded."""
    parts, record = services(request), requested_model(request)
    return await _estimate(parts, record, read_query(request, Question))


@operation(EstimateView, body=SourceQuestion, errors=_LOOK)
async def estimate_source(request: web.Request) -> web.Response:
    """Show what a load of what is at a source would take. Nothing is downloaded or added."""
    parts = services(request)
    question = await read_json(request, SourceQuestion)
    unique = name_for(parse(question.source))
    record = parts.catalog.find(unique)
    if record is None or record.source != question.source:
        record = ModelRecord(
            id="",
            unique=unique,
            name=unique,
            created=now(),
            source=question.source,
            architecture=question.architecture,
        )
    return await _estimate(parts, record, question)


async def _estimate(parts: Services, record: ModelRecord, question: Question) -> web.Response:
    artifact = record.artifact
    peeked = None
    if artifact is None:
        peeked = await parts.peeker.peek(record.source, architecture=record.architecture)
        artifact = peeked.artifact
    planned = await parts.models.plan(
        record,
        artifact,
        context_length=question.context_length or 0,
        slots=question.slots or 0,
    )
    _check_given(question, record, artifact, planned)
    if peeked is not None and record.id and question == Question():
        parts.catalog.update(record.id, ram_bytes=planned.estimate.total_bytes)
    download = None if peeked is None else await _download_view(parts, peeked)
    return web.json_response(
        {
            "model": record.unique,
            "downloaded": record.downloaded,
            "download": download,
            **estimate_view(planned),
            **_verdict(parts, record, planned),
        }
    )


async def _download_view(parts: Services, peeked: Peeked) -> dict[str, Any]:
    """Return what is shown of a download that might be. Sizes are in bytes."""
    disk = await asyncio.to_thread(shutil.disk_usage, parts.store.root)
    missing = await asyncio.to_thread(_missing_bytes, parts.store, peeked)
    return {
        "size_bytes": peeked.size_bytes,
        "files": [{"name": f.name, "size_bytes": f.size_bytes} for f in peeked.files],
        "license": peeked.license or None,
        "revision": peeked.revision or None,
        "disk_free_bytes": disk.free,
        "fits_disk": disk.free >= missing + DISK_MARGIN_BYTES,
    }


def _missing_bytes(store: Store, peeked: Peeked) -> int:
    """Return what the disk must have room for: the files, less what is here of them."""
    missing = 0
    for file in peeked.files:
        if not file.key:
            missing += file.size_bytes
        elif not (store.blobs / file.key).exists():
            missing += missing_bytes(store.partials / file.key, file.size_bytes)
    return missing


def _check_given(
    question: Question, record: ModelRecord, artifact: Artifact, planned: Planned
) -> None:
    """Raise InvalidRequest if a load could not have the settings that are asked for."""
    most = artifact.context_length
    if question.context_length and most and question.context_length > most:
        raise InvalidRequest(
            f"context_length: {record.unique} has a context of {most} tokens at most",
            param="context_length",
        )
    if question.slots and planned.estimate.slots < question.slots:
        raise InvalidRequest(
            f"slots: {planned.backend} has {planned.estimate.slots} at most for {record.unique}",
            param="slots",
        )


def estimate_view(planned: Planned) -> dict[str, Any]:
    """Return what is shown of a load that might be. Sizes are in bytes of RAM, or of a GPU."""
    found = planned.estimate
    return {
        "backend": planned.backend,
        "context_length": found.context_length,
        "slots": found.slots,
        "estimate_bytes": found.total_bytes,
        "parts": found.parts,
        "gpu_parts": found.gpu_parts,
        "placement": found.placement.reason,
        "measured": planned.measured,
    }


def _verdict(parts: Services, record: ModelRecord, planned: Planned) -> dict[str, Any]:
    """Say whether it would run here: now, once other models made room, with less, or never.

    `not now`: pinned models or other programs have the memory.
    """
    ledger = parts.ledger
    free = max(0, ledger.book().room({record.id}))
    least = min(step.total_bytes for step in (planned.estimate, *planned.smaller))
    fits, smaller = "not now" if least <= ledger.budget_bytes else "no", None
    for step in (planned.estimate, *planned.smaller):
        need = step.total_bytes
        if need <= free:
            fits = "now"
        elif parts.models.could_ever(need, record.id):
            fits = "after others made room"
        else:
            continue
        if step is not planned.estimate:
            fits += ", with less"
            smaller = {
                "context_length": step.context_length,
                "slots": step.slots,
                "estimate_bytes": need,
            }
        break
    return {
        "fits": fits,
        "smaller": smaller,
        "budget_bytes": ledger.budget_bytes,
        "available_bytes": free,
    }
