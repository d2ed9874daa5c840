"""Adding a model by its source, on whichever surface."""

from __future__ import annotations

import uuid
from typing import Any

from daemon.api.context import Services
from daemon.catalog.database import name_taken, now
from daemon.catalog.record import ModelRecord


def new_model(parts: Services, source: str, unique: str, **settings: Any) -> ModelRecord:
    """Add a custom model with these fields of its record. Raises Conflict if the name is taken."""
    known = parts.catalog.find(unique)
    if known is not None:
        raise name_taken(known)
    return parts.catalog.add(
        ModelRecord(
            id=str(uuid.uuid4()),
            unique=unique,
            name=unique,
            created=now(),
            source=source,
            custom=True,
            provider="HUGGING_FACE" if source.startswith("hf:") else "",
            **settings,
        )
    )
