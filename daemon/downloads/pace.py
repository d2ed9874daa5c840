"""How fast, how often and over how many connections. Pure, but for the waits of Bucket."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

MAX_CONNECTIONS = 8
_FIRST_CONNECTIONS = 2
_GAIN = 1.1  # what another connection has to bring
_SETTLED_LOOKS = 10  # looks after which another connection is tried again
_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 30.0
_MAX_RETRY_AFTER_S = 3600.0  # who wants more says so again

Clock = Callable[[], float]


class Climb:
    """How many connections to use, found by hill climbing on the measured rate.

    One more is tried as long as that brings a tenth more; one that does not is given up again, and
    tried again after a while. A server that asks for less gets half.
    """

    def __init__(self, most: int = MAX_CONNECTIONS) -> None:
        self.wanted = min(_FIRST_CONNECTIONS, most)
        self._most = most
        self._before: float | None = None
        self._climbing = True
        self._looks = 0

    def look(self, bytes_per_s: float) -> int:
        """Take note of the rate with the connections that were wanted; return how many to use."""
        if not self._climbing:
            self._looks += 1
            if self._looks < _SETTLED_LOOKS or self.wanted >= self._most:
                return self.wanted
            self._climbing, self._before = True, bytes_per_s
            self.wanted += 1
        elif self._before is not None and bytes_per_s < _GAIN * self._before:
            self._settle(max(1, self.wanted - 1))
        elif self.wanted >= self._most:
            self._settle(self.wanted)
        else:
            self._before = bytes_per_s
            self.wanted += 1
        return self.wanted

    def less(self) -> None:
        """Use half as many: the server said that it is too much."""
        self._settle(max(1, self.wanted // 2))

    def _settle(self, wanted: int) -> None:
        self.wanted, self._climbing, self._looks = wanted, False, 0


class Bucket:
    """Lets through so many bytes a second; 0 is no limit. The limit may change at any time."""

    def __init__(self, bytes_per_s: int = 0, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._rate = bytes_per_s
        self._free_at = clock()
        self._changed = asyncio.Event()

    def limit(self, bytes_per_s: int) -> None:
        """Let through so many from now on. Whoever waits is told."""
        self._rate = bytes_per_s
        self._free_at = min(self._free_at, self._clock() + 1.0)
        self._changed.set()
        self._changed = asyncio.Event()

    async def take(self, count: int) -> None:
        """Wait until `count` bytes that are here already may have come."""
        if not self._rate:
            return
        now = self._clock()
        self._free_at = max(self._free_at, now) + count / self._rate
        while self._rate and (wait_s := self._free_at - self._clock()) > 0:
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                return


class Patience:
    """How long to go on without a single byte, in seconds awake: sleep does not count.

    Who has yet to get the first one is told sooner: it may be a mistake in the address.
    """

    def __init__(
        self, long_s: float, short_s: float, *, began: bool, clock: Clock = time.monotonic
    ) -> None:
        self._clock = clock
        self._long_s, self._short_s = long_s, short_s
        self._began = began
        self._failures = 0
        self._until = clock() + (long_s if began else short_s)

    def progress(self) -> None:
        """Take note of a byte."""
        self._began, self._failures = True, 0
        self._until = self._clock() + self._long_s

    def wait_s(self, retry_after_s: float | None) -> float | None:
        """Take note of a failure; return how long to wait, None if that was enough.

        A server's own word (`retry_after_s`) is heeded, and that time does not count.
        """
        self._failures += 1
        if retry_after_s is not None:
            wait_s = min(retry_after_s, _MAX_RETRY_AFTER_S)
            self._until = max(self._until, self._clock() + wait_s + self._short_s)
            return wait_s
        wait_s = backoff_s(self._failures)
        left_s = self._until - self._clock()
        return None if left_s <= 0 else min(wait_s, left_s)


def backoff_s(failures: int, draw: Callable[[], float] = random.random) -> float:
    """Return how long to wait after so many failures in a row.

    Exponential with full jitter, at least a tenth of it
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """
    most: float = min(_MAX_BACKOFF_S, _BACKOFF_S * 2 ** min(failures - 1, 10))
    return most * max(0.1, draw())
