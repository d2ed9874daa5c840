"""The models that can answer."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from aiohttp import web

from daemon.api.context import requested_model, services
from daemon.catalog.record import ModelRecord


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.get("/v1/models", list_models), web.get("/v1/models/{model}", show_model)]


def _view(record: ModelRecord) -> dict[str, Any]:
    created = int(datetime.fromisoformat(record.created).timestamp())
    owner = "modeld:remote" if record.cloud else "modeld"  # another modeld does not list the former
    return {"id": record.unique, "object": "model", "created": created, "owned_by": owner}


async def list_models(request: web.Request) -> web.Response:
    """List the models that are on this machine, and those of upstreams, by unique name."""
    records = services(request).catalog.all()
    data = [_view(record) for record in records if record.downloaded]
    return web.json_response({"object": "list", "data": data})


async def show_model(request: web.Request) -> web.Response:
    """Show one model."""
    return web.json_response(_view(requested_model(request)))
