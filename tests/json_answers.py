"""Whether an answer that was to be a JSON object is one, also if it was cut short."""

from __future__ import annotations

import msgspec


def check_object(text: str, *, cut: bool) -> None:
    """Fail unless a text is a JSON object, or the beginning of one if it was cut short."""
    assert text.lstrip().startswith("{"), text
    try:
        assert isinstance(msgspec.json.decode(text), dict), text
    except msgspec.DecodeError as error:
        # What was cut within a number is told to be an invalid one.
        ends = ("truncated", "invalid number")
        assert cut and any(end in str(error) for end in ends), (str(error), text)
