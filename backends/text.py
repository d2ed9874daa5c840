"""From token bytes to the text of an answer: whole characters, ended by stop sequences. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class StopScanner:
    """Passes text on until a stop sequence appears, of which nothing is ever passed on.

    Text that may be the beginning of a stop sequence is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped_by = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence has appeared: `stopped_by` is which."""
        return bool(self.stopped_by)

    def feed(self, piece: bytes) -> str:
        """Take the next token's bytes and return the text that is now certain."""
        return self._scan(self._decoder.decode(piece))

    def flush(self) -> str:
        """Return what was held back, at the end of an answer that no stop sequence ended.

        The first bytes of a character that was cut off by the end are dropped.
        """
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _scan(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, at = min(found)
            certain, self.stopped_by, self._held = self._held[:at], self._held[at:end], ""
            return certain
        keep = self._tail_that_may_stop()
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def _tail_that_may_stop(self) -> int:
        """Return the length of the longest tail that begins a stop sequence."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
