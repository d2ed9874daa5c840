"""The doctor's route, and how a running daemon finds the facts of its report."""

from __future__ import annotations

from aiohttp import web

from backends import hardware
from daemon import __version__
from daemon.api.context import Services, services
from daemon.api.native.answers import Report
from daemon.api.operation import operation
from daemon.catalog.record import ModelRecord
from daemon.doctor import Facts, ModelFacts, report
from daemon.errors import ModeldError

_PATIENCE_S = 10.0  # for engines that hang


async def _model(parts: Services, record: ModelRecord) -> ModelFacts:
    status = parts.models.status(record.id)
    try:
        planned = await parts.models.plan(record)
    except ModeldError as error:
        return ModelFacts(unique=record.unique, state=status.state, problem=error.message)
    estimate = planned.estimate
    return ModelFacts(
        unique=record.unique,
        state=status.state,
        backend=planned.backend,
        reason=planned.reason,
        placement=estimate.placement.reason,
        gpu_layers=estimate.placement.gpu_layers,
        threads=planned.options.threads,
        context_length=estimate.context_length,
        slots=estimate.slots,
        parts=estimate.parts,
        gpu_parts=estimate.gpu_parts,
    )


async def facts(parts: Services, *, running: bool = True) -> Facts:
    """Return what the report is made of. `running` is false where no daemon serves."""
    probes = await parts.probers.all(patience_s=_PATIENCE_S)
    machine = await parts.machine.look()
    records = [record for record in parts.catalog.all() if record.downloaded]
    return Facts(
        version=__version__,
        running=running,
        hardware=machine,
        probes=probes,
        models=[await _model(parts, record) for record in records],
        budget_bytes=parts.ledger.budget_bytes,
        available_bytes=parts.ledger.available_bytes(),
        pressure_percent=hardware.pressure_percent(),
    )


@operation(Report)
async def doctor(request: web.Request) -> web.Response:
    """Show what this computer is, what runs on it where and why, and what would help."""
    return web.json_response(report(await facts(services(request))))
