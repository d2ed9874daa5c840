"""Asks each backend, in a child of its own, what it can do here. Answers are kept.

A backend that crashes, hangs or can't be imported becomes a Probe with a reason. What a working
engine said is remembered over restarts, until the engine, the code or the GPUs' drivers change;
that one hangs is remembered too, for an hour.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError
from typing import Protocol

import msgspec

from backends import wire
from backends.contract import Probe
from backends.registry import Registry
from daemon import __version__
from daemon.workers.child import Child, describe_exit

_TIMEOUT_S = 30.0
_HUNG_FOR_S = 3600.0  # what made it hang may be over by then: a driver, a disk
log = logging.getLogger(__name__)


class Memory(Protocol):
    """Where texts are kept over restarts, by key."""

    def setting(self, key: str) -> str | None:
        """Return the text of `key`, or None."""
        ...

    def set_setting(self, key: str, value: str) -> None:
        """Keep a text."""
        ...


class _Remembered(msgspec.Struct, frozen=True):
    """A probe, what it was true of, and until when (of time.time; 0: for good)."""

    stamp: str
    probe: Probe
    until: float = 0.0

    def holds(self, stamp: str) -> bool:
        return self.stamp == stamp and (not self.until or time.time() < self.until)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A probe that is known or being asked for, and what it is true of."""

    stamp: str
    answer: asyncio.Task[_Remembered]

    def probe(self, name: str) -> Probe:
        if not self.answer.done():
            reason = "its engine has not answered yet; `modeld backends` shows when it has"
        elif self.answer.cancelled():
            reason = "modeld is stopping"
        else:
            return self.answer.result().probe
        return Probe(backend=name, available=False, reason=reason)


def _installed(distribution: str) -> str:
    """Return a text that is another one once this distribution was installed anew; "" without it.

    Versions do not tell a repair, or a build for a GPU, from what was there before.
    """
    try:
        found = Distribution.from_name(distribution)
    except (PackageNotFoundError, ValueError):
        return ""
    times = [
        file.locate().stat().st_mtime_ns  # type: ignore[attr-defined]
        for file in found.files or ()
        if file.name == "RECORD"
    ]
    return f"{distribution} {found.version} {times}"


class Probers:
    """What the backends of `registry` can do here, found out when first asked, and on changes.

    `drivers` returns a text that changes with the GPUs and their drivers.
    """

    def __init__(
        self, registry: Registry, memory: Memory, drivers: Callable[[], str] = lambda: ""
    ) -> None:
        self._registry = registry
        self._memory = memory
        self._drivers = drivers
        self._asked: dict[str, _Asked] = {}

    async def ask(self, names: Iterable[str], *, patience_s: float = math.inf) -> dict[str, Probe]:
        """Return the probes of these backends; those not known yet are asked side by side.

        After `patience_s` one that works is enough: those that have not answered by then are not
        available yet, and the reason says so.
        """
        asked = {name: self._current(name) for name in names}
        until = time.monotonic() + patience_s
        waiting = {each.answer for each in asked.values()}
        while waiting:
            left = until - time.monotonic()
            if left <= 0 and any(each.probe("").available for each in asked.values()):
                break
            _, waiting = await asyncio.wait(
                waiting,
                timeout=left if 0 < left < math.inf else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
        return {name: each.probe(name) for name, each in asked.items()}

    def _current(self, name: str) -> _Asked:
        """Return what is known of a backend as it is installed now, or begin to ask."""
        stamp = self._stamp(name)
        known = self._asked.get(name)
        if known is None or (known.stamp != stamp and known.answer.done()):
            answer = asyncio.create_task(self._remembered_or_asked(name, stamp))
            self._asked[name] = known = _Asked(stamp, answer)
        return known

    async def all(self, *, patience_s: float = math.inf) -> list[Probe]:
        """Return the probes of all backends, those that can't be imported included.

        Backends that were not available are asked again: what was missing may be there by now. One
        that hung is not, for an hour. `patience_s` is that of `ask`.
        """
        for name, known in list(self._asked.items()):
            if known.answer.done() and not known.probe(name).available:
                answer = None if known.answer.cancelled() else known.answer.result()
                if answer is None or not (answer.until and answer.holds(known.stamp)):
                    del self._asked[name]
        probes = await self.ask(list(self._registry.classes), patience_s=patience_s)
        broken = [
            Probe(backend=name, available=False, reason=reason)
            for name, reason in self._registry.broken.items()
        ]
        return [*probes.values(), *broken]

    def doubt(self, name: str) -> None:
        """Have a backend asked anew the next time: it failed although it said that it works."""
        known = self._asked.get(name)
        if known is not None and known.answer.done():
            del self._asked[name]
        self._memory.set_setting(f"probe:{name}", "")

    async def _remembered_or_asked(self, name: str, stamp: str) -> _Remembered:
        key = f"probe:{name}"
        text = self._memory.setting(key) if stamp else None
        if text:
            with contextlib.suppress(msgspec.DecodeError):
                known = msgspec.json.decode(text, type=_Remembered)
                if known.holds(stamp):
                    return known
        probe, hung = await self._probe(name)
        found = _Remembered(stamp, probe, time.time() + _HUNG_FOR_S if hung else 0.0)
        if stamp and (probe.available or hung):
            self._memory.set_setting(key, msgspec.json.encode(found).decode())
        return found

    def _stamp(self, name: str) -> str:
        """Return what a backend's probe depends on: modeld, the engine, drivers, interpreter."""
        distribution = getattr(self._registry.classes[name], "distribution", "")
        engine = _installed(distribution) if distribution else ""
        return f"{__version__} {engine} {sys.version} {self._drivers()}" if engine else ""

    async def _probe(self, name: str) -> tuple[Probe, bool]:
        """Ask a prober. The second part says whether the engine hung."""
        path = self._registry.paths[name]
        try:
            child = await Child.start(
                ["-m", "backends.prober", f"--backend={path}"],
                union=wire.FromProber,
                name=f"prober:{name}",
            )
        except OSError as error:
            reason = f"its prober could not be started: {error.strerror}"
            return Probe(backend=name, available=False, reason=reason), False
        hung = False
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                async for message in child.messages():
                    if isinstance(message, wire.Probed):
                        return message.probe, False
                status = await asyncio.shield(child.exited)
            reason = f"its prober ended with {describe_exit(status)}: {child.last_line()}"
        except TimeoutError:
            hung = True
            reason = f"its engine hangs: its prober did not answer within {_TIMEOUT_S:.0f} s"
        except wire.ProtocolError as error:
            reason = str(error)
        finally:
            await child.stop()
        log.warning("backend=%s unavailable: %s", name, reason)
        return Probe(backend=name, available=False, reason=reason), hung

    async def close(self) -> None:
        """End what is still being asked."""
        answers = [known.answer for known in self._asked.values()]
        for answer in answers:
            answer.cancel()
        if answers:
            await asyncio.wait(answers)
