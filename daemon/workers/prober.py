"""Asks each backend, in a child of its own, what it can do here. Answers are kept.

A backend that crashes, hangs or can't be imported becomes a Probe with a reason. What a working
engine said is remembered over restarts, until another version of it is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import msgspec

from backends import wire
from backends.contract import Probe
from backends.registry import Registry
from daemon import __version__
from daemon.workers.child import Child, describe_exit

_TIMEOUT_S = 30.0
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
    """A probe and what it was true of."""

    stamp: str
    probe: Probe


class Probers:
    """What the backends of `registry` can do here, found out once and when first asked."""

    def __init__(self, registry: Registry, memory: Memory) -> None:
        self._registry = registry
        self._memory = memory
        self._probes: dict[str, asyncio.Task[Probe]] = {}

    async def ask(self, names: Iterable[str]) -> dict[str, Probe]:
        """Return the probes of these backends; those not known yet are asked side by side."""
        names = list(names)
        for name in names:
            if name not in self._probes:
                self._probes[name] = asyncio.create_task(self._remembered_or_asked(name))
        tasks = {name: self._probes[name] for name in names}
        if tasks:
            await asyncio.wait(tasks.values())
        return {name: self._result(name, task) for name, task in tasks.items()}

    @staticmethod
    def _result(name: str, task: asyncio.Task[Probe]) -> Probe:
        if task.cancelled():
            return Probe(backend=name, available=False, reason="modeld is stopping")
        return task.result()

    async def all(self) -> list[Probe]:
        """Return the probes of all backends, those that can't be imported included.

        Backends that were not available are asked again: what was missing may be there by now.
        """
        for name, task in list(self._probes.items()):
            if task.done() and not self._result(name, task).available:
                del self._probes[name]
        probes = await self.ask(list(self._registry.classes))
        broken = [
            Probe(backend=name, available=False, reason=reason)
            for name, reason in self._registry.broken.items()
        ]
        return [*probes.values(), *broken]

    async def _remembered_or_asked(self, name: str) -> Probe:
        key, stamp = f"probe:{name}", self._stamp(name)
        text = self._memory.setting(key) if stamp else None
        if text is not None:
            with contextlib.suppress(msgspec.DecodeError):
                known = msgspec.json.decode(text, type=_Remembered)
                if known.stamp == stamp:
                    return known.probe
        probe = await self._probe(name)
        if stamp and probe.available:
            remembered = msgspec.json.encode(_Remembered(stamp, probe)).decode()
            self._memory.set_setting(key, remembered)
        return probe

    def _stamp(self, name: str) -> str:
        """Return what a backend's probe depends on: its code, its engine, the interpreter."""
        distribution = getattr(self._registry.classes[name], "distribution", "")
        try:
            engine = version(distribution) if distribution else ""
        except PackageNotFoundError:
            engine = ""
        return f"{__version__} {distribution} {engine} {sys.version}" if engine else ""

    async def _probe(self, name: str) -> Probe:
        path = self._registry.paths[name]
        try:
            child = await Child.start(
                ["-m", "backends.prober", f"--backend={path}"],
                union=wire.FromProber,
                name=f"prober:{name}",
            )
        except OSError as error:
            reason = f"its prober could not be started: {error.strerror}"
            return Probe(backend=name, available=False, reason=reason)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                async for message in child.messages():
                    if isinstance(message, wire.Probed):
                        return message.probe
                status = await asyncio.shield(child.exited)
            reason = f"its prober ended with {describe_exit(status)}: {child.last_line()}"
        except TimeoutError:
            reason = f"its prober did not answer within {_TIMEOUT_S:.0f} s"
        except wire.ProtocolError as error:
            reason = str(error)
        finally:
            await child.stop()
        log.warning("backend=%s unavailable: %s", name, reason)
        return Probe(backend=name, available=False, reason=reason)

    async def close(self) -> None:
        """End what is still being asked."""
        for task in self._probes.values():
            task.cancel()
        if self._probes:
            await asyncio.wait(self._probes.values())
