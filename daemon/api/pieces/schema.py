"""Translates between catalog records and the Model objects of the Pieces API."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from daemon.api.context import Services
from daemon.api.pieces import answers
from daemon.api.pieces.answers import Model
from daemon.api.pieces.enums import FOUNDATIONS, KINDS, PROVIDERS, USAGES
from daemon.catalog.record import ModelRecord
from daemon.errors import InvalidRequest
from daemon.models import ModelState
from daemon.sources import is_source, name_for, parse

_BILLION = 1e9


class Bytes(msgspec.Struct):
    """A size; clients demand both fields."""

    value: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    readable: str = ""


class MaxTokens(msgspec.Struct):
    """How many tokens a model takes; `total` alone is what modeld knows."""

    total: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None


class ModelBody(msgspec.Struct, kw_only=True):
    """What a client may set in POST /models/create and /model/update; other fields are calculated.

    Clients send back whole Model objects, so unknown and calculated fields are ignored.
    """

    name: str
    version: str = "1"
    type: str = "UNKNOWN"
    usage: str = "UNKNOWN"
    id: str | None = None
    unique: str | None = None
    description: str | None = None
    bytes: Bytes | None = None
    quantization: str | None = None
    foundation: str | None = None
    parameters: Annotated[float, msgspec.Meta(ge=0, le=1e6)] | None = None
    provider: str | None = None
    maxTokens: MaxTokens | None = None  # noqa: N815  the API's own spelling

    def check(self) -> None:
        """Raise InvalidRequest for a value that clients could not read back."""
        for field, value, allowed in (
            ("type", self.type, KINDS),
            ("usage", self.usage, USAGES),
            ("foundation", self.foundation, FOUNDATIONS),
            ("provider", self.provider, PROVIDERS),
        ):
            if value is not None and value not in allowed:
                raise InvalidRequest(f"{field}: {value!r} is not a value of the Pieces API")
        if not self.name.strip():
            raise InvalidRequest("name: a model needs a name")

    def changes(self) -> dict[str, Any]:
        """Return the record fields that this body sets, without the unique name."""
        changes: dict[str, Any] = {
            "name": self.name,
            "version": self.version,
            "kind": self.type,
            "usage": self.usage,
            "description": self.description,
            "quantization": self.quantization,
            "foundation": self.foundation,
            "provider": self.provider,
            "size_bytes": self.bytes.value if self.bytes else None,
            "parameters": int(self.parameters * _BILLION) if self.parameters else None,
            "context_length": (
                int(self.maxTokens.total) if self.maxTokens and self.maxTokens.total else None
            ),
        }
        return {field: value for field, value in changes.items() if value is not None}

    def name_and_source(self) -> tuple[str, str]:
        """Return the unique name and the source: a `unique` that is a source names both.

        Without a `unique` the name is made one.
        """
        if self.unique and is_source(self.unique):
            return name_for(parse(self.unique)), self.unique
        slug = re.sub(r"[^a-z0-9._:-]+", "-", self.name.lower()).strip("-._:")
        return self.unique or slug or "model", ""


def readable(size: int) -> str:
    """Return a size for people, such as 93.8 MB in units of 1024."""
    value, unit = float(size), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1024 or unit == "TB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _bytes(size: int) -> answers.Bytes:
    return {"value": int(size), "readable": readable(size)}


def model_view(parts: Services, record: ModelRecord) -> Model:
    """Return the record as a Pieces Model; optional fields that are not known are left out."""
    status = parts.models.status(record.id)
    view: Model = {
        "id": record.id,
        "version": record.version,
        "created": {"value": record.created},
        "name": record.name,
        "unique": record.unique,
        "cloud": record.cloud,
        "cpu": True,
        "custom": record.custom,
        "type": record.kind,
        "usage": record.usage,
        "downloaded": record.downloaded,
        "downloading": parts.downloads.active(record.id),
        "loaded": status.state is ModelState.READY,
    }
    for field in ("description", "quantization", "foundation", "provider"):
        if value := getattr(record, field):
            view[field] = value
    if record.size_bytes:
        view["bytes"] = _bytes(record.size_bytes)
    if ram := parts.models.ram_bytes(record):
        view["ram"] = _bytes(ram)
    if record.parameters:
        view["parameters"] = record.parameters / _BILLION
    if record.context_length:
        view["maxTokens"] = {"total": record.context_length}
    return view
