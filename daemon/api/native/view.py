"""What the native surface shows of a model."""

from __future__ import annotations

from aiohttp import web

from daemon.api.context import Services
from daemon.api.native.answers import ModelView
from daemon.catalog.record import ModelRecord
from daemon.sources import public


def model_view(parts: Services, record: ModelRecord) -> ModelView:
    """Return what the native surface shows of a model."""
    status = parts.models.status(record.id)
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
        "state": status.state,
        "backend": status.backend,
        "worker_pid": status.worker_pid,
        "in_flight": status.in_flight,
        "waiting": status.waiting,
        "load_progress": status.load_progress,
        "estimate_bytes": status.estimate_bytes or parts.models.ram_bytes(record),
        "reserved_bytes": status.reserved_bytes,
        "measured_bytes": status.measured_bytes,
        "context_length": status.context_length or record.context_length,
        "slots": status.slots,
        "unloads_in_s": status.unloads_in_s,
        "waits_for": status.waits_for or None,
        "reduced": status.reduced or None,
        "last_error": status.last_error or None,
        "passed_over": list(status.passed_over),
        "pinned": record.pinned,
        "keep_alive": record.keep_alive or None,
        "fixed_backend": record.backend or None,
        "options": record.options,
        "background": record.background,
        "files": [file.path for file in record.artifact.files] if record.artifact else [],
    }


def answer(parts: Services, model_id: str, status: int = 200) -> web.Response:
    """Return an answer that shows a model as it is now."""
    return web.json_response(model_view(parts, parts.catalog.get(model_id)), status=status)
