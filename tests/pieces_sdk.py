"""The Python SDK of Pieces as the oracle: what it reads of an answer must be what was sent."""

from __future__ import annotations

import json
from typing import Any

from pieces_os_client.api_response import ApiResponse

_TIMES = ("created", "updated")  # it spells times in its own way


def check_understood(response: ApiResponse[Any]) -> None:
    """Check that what was read is what was sent: the SDK drops or replaces what it can't know."""
    if hasattr(response.data, "to_dict"):
        check_read(json.loads(response.raw_data), response.data)


def check_read(sent: Any, model: Any) -> None:
    """Check that one of the SDK's models has all of what was sent, and nothing else."""
    read = json.loads(json.dumps(model.to_dict(), default=str))
    assert comparable(read) == comparable(sent)


def comparable(value: Any) -> Any:
    """Return JSON without times, and without what is not there."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key not in _TIMES and one is not None}
        return {key: comparable(one) for key, one in kept.items()}
    return [comparable(one) for one in value] if isinstance(value, list) else value
