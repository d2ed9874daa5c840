"""The models that can answer, in the form of the OpenAI API and of Anthropic's at once."""

from __future__ import annotations

from datetime import datetime

from aiohttp import web

from daemon.api.context import requested_model, services
from daemon.api.openai.answers import OpenAIModel, OpenAIModelList
from daemon.api.operation import NO_MODEL, operation
from daemon.catalog.record import ModelRecord
from daemon.errors import ModelNotDownloaded


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.get("/v1/models", list_models), web.get("/v1/models/{model}", show_model)]


def _view(record: ModelRecord) -> OpenAIModel:
    created = datetime.fromisoformat(record.created)
    owner = "modeld:remote" if record.cloud else "modeld"  # another modeld does not list the former
    return {
        "id": record.unique,
        "object": "model",
        "created": int(created.timestamp()),
        "owned_by": owner,
        "type": "model",
        "display_name": record.name,
        "created_at": created.isoformat(),
        "lifecycle": "active",
    }


@operation(OpenAIModelList)
async def list_models(request: web.Request) -> web.Response:
    """List the models that are on this machine, and those of upstreams, by unique name."""
    records = services(request).catalog.all()
    data = [_view(record) for record in records if record.downloaded]
    answer: OpenAIModelList = {
        "object": "list",
        "data": data,
        "has_more": False,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
    return web.json_response(answer)


@operation(OpenAIModel, errors=NO_MODEL)
async def show_model(request: web.Request) -> web.Response:
    """Show one of the models that are listed."""
    record = requested_model(request)
    if not record.downloaded:
        raise ModelNotDownloaded(
            f"{record.unique} is not on this machine: download it, as with `modeld pull "
            f"{record.unique}`"
        )
    return web.json_response(_view(record))
