"""What this computer is, with its GPUs as they are at the moment.

The daemon itself reads files of the kernel and nothing else. NVIDIA's library may hang with its
driver or take its process down, so it is asked in a prober; without its answer the GPUs keep their
names and lack their memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

from backends import hardware, wire
from backends.contract import Hardware
from backends.hardware import nvidia
from daemon.workers.child import Child, describe_exit

_TIMEOUT_S = 5.0  # the prober gives up on the library after 1.5 s by itself
_RETRY_S = 60.0  # a driver in trouble makes a load wait once, not each time
log = logging.getLogger(__name__)


class Machine:
    """See the module. `root` is where /proc and /sys are; they are read at once, which is fast."""

    def __init__(self, root: Path = hardware.ROOT) -> None:
        self._root = root
        self._own = hardware.detect(root)
        self._known = self._own
        self._asking: asyncio.Task[Hardware] | None = None
        self._ask_again_at = 0.0  # of time.monotonic

    @property
    def known(self) -> Hardware:
        """What was found when it was looked at last."""
        return self._known

    async def look(self, *, afresh: bool = True) -> Hardware:
        """Return this computer with the free memory that its GPUs have now. Never raises.

        Not `afresh`, what was seen at any time is good enough. Takes no time where there is no GPU;
        several who look at once share one answer.
        """
        if not self._own.gpus and not nvidia.expected(self._root):
            return self._own
        if not afresh and self._asking is not None and self._asking.done():
            return self._known
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._looked())
        asking = self._asking
        await asyncio.wait([asking])  # who leaves does not end it for the others
        if not asking.cancelled():
            self._known = asking.result()
        return self._known

    async def gpu_use(self, pid: int) -> dict[str, int]:
        """Return what a process has of GPUs' own memory now, by `Gpu.id`, where that is told."""
        if not self._own.gpus and not nvidia.expected(self._root):
            return {}
        seen = (await self.look()).gpus
        told = {gpu.id: gpu.processes[pid] for gpu in seen if pid in gpu.processes}
        return await asyncio.to_thread(hardware.gpu_bytes, pid, self._root) | told

    async def _looked(self) -> Hardware:
        if not nvidia.expected(self._root):
            return await asyncio.to_thread(hardware.detect, self._root)
        if time.monotonic() < self._ask_again_at:
            return self._known
        found = await self._asked()
        if any(gpu.vendor == "nvidia" and gpu.free_bytes is None for gpu in found.gpus):
            self._ask_again_at = time.monotonic() + _RETRY_S
        return found

    async def _asked(self) -> Hardware:
        """Ask a prober; without an answer return what the kernel tells, and the reason."""
        try:
            child = await Child.start(
                ["-m", "backends.prober", f"--hardware={self._root}"],
                union=wire.FromProber,
                name="prober:hardware",
            )
        except OSError as error:
            return self._without(f"the prober could not be started: {error.strerror}")
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                async for message in child.messages():
                    if isinstance(message, wire.Detected):
                        return message.hardware
                status = await asyncio.shield(child.exited)
            reason = f"the prober ended with {describe_exit(status)}: {child.last_line()}"
        except TimeoutError:
            reason = f"no answer within {_TIMEOUT_S:.0f} s"
        except wire.ProtocolError as error:
            reason = str(error)
        finally:
            child.kill()
            await asyncio.shield(child.exited)
        return self._without(reason)

    def _without(self, reason: str) -> Hardware:
        problem = f"NVIDIA's library NVML can't be asked, so no GPU memory is known ({reason})"
        log.warning("%s", problem)
        self._ask_again_at = time.monotonic() + _RETRY_S
        return replace(self._own, problems=(*self._own.problems, problem))

    async def close(self) -> None:
        """End what is still being asked."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
