"""What this computer and its engines offer, and who holds its memory."""

from __future__ import annotations

import os
from dataclasses import asdict

from aiohttp import web

from backends.contract import Hardware
from daemon.api.context import BASE, services
from daemon.api.doctor import doctor
from daemon.api.native.answers import Backends, Booked, Memory
from daemon.api.operation import operation
from daemon.memory.measure import private_bytes


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.get(f"{BASE}/memory", memory),
        web.get(f"{BASE}/backends", list_backends),
        web.get(f"{BASE}/hardware", hardware),
        web.get(f"{BASE}/doctor", doctor),
    ]


@operation(Memory)
async def memory(request: web.Request) -> web.Response:
    """Show what models may take, what is booked, who holds what, and what others use. In bytes.

    budget = reserved + unreserved, and reserved is the sum over models less what they share (or
    over the budget, `unreserved` is negative). RAM = what models and the daemon use + others +
    spare. What another load could take now, `available`, is the least of what both leave.
    """
    parts = services(request)
    ledger = parts.ledger
    entries = list(ledger.reservations.items())
    book = ledger.book()
    spare = book.spare_bytes()
    models_bytes = book.held_bytes([model_id for model_id, _ in entries])
    daemon_bytes = private_bytes(os.getpid())
    ram_bytes = parts.machine.known.ram_bytes
    reserved = ledger.reserved_bytes
    models: list[Booked] = [
        {
            "id": model_id,
            "unique": entry.unique,
            "state": parts.models.status(model_id).state,
            "estimate_bytes": entry.estimate_bytes,
            "reserved_bytes": entry.reserved_bytes,
            "measured_bytes": entry.measured_bytes,
            "in_use_bytes": entry.now.total_bytes,
            "gpu_bytes": dict(entry.gpus),
        }
        for model_id, entry in entries
    ]
    return web.json_response(
        {
            "budget_bytes": ledger.budget_bytes,
            "reserved_bytes": reserved,
            "shared_bytes": sum(entry.reserved_bytes for _, entry in entries) - reserved,
            "unreserved_bytes": ledger.budget_bytes - reserved,
            "available_bytes": max(0, book.room()),
            "watermark_bytes": ledger.watermark_bytes,
            "ram_bytes": ram_bytes,
            "models_bytes": models_bytes,
            "daemon_bytes": daemon_bytes,
            "others_bytes": ram_bytes - models_bytes - daemon_bytes - spare,
            "spare_bytes": spare,
            "conversations_bytes": parts.conversations.size_bytes(),
            "critical": parts.models.critical,
            "models": models,
        }
    )


@operation(Backends)
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


@operation(Hardware)
async def hardware(request: web.Request) -> web.Response:
    """Show this computer as modeld sees it."""
    return web.json_response(asdict(await services(request).machine.look()))
