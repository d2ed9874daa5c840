"""Asks each backend, in a child of its own, what it can do here. Answers are kept.

A backend that crashes, hangs or can't be imported becomes a Probe with a reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from backends import wire
from backends.contract import Probe
from backends.registry import Registry
from daemon.workers.child import Child, describe_exit

_TIMEOUT_S = 30.0
log = logging.getLogger(__name__)


class Probers:
    """What the backends of `registry` can do here, found out once and when first asked."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._probes: dict[str, asyncio.Task[Probe]] = {}

    async def ask(self, names: Iterable[str]) -> dict[str, Probe]:
        """Return the probes of these backends; those not known yet are asked side by side."""
        names = list(names)
        for name in names:
            if name not in self._probes:
                self._probes[name] = asyncio.create_task(self._probe(name))
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
