"""What models that are not on this machine are, without downloading them: asked of peeker children.

Owns when one is started, who waits for it, and for how long its answer holds. Knows no HTTP and no
hub: the peeker does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass

from backends import wire
from daemon import sources
from daemon.artifacts import InvalidModelFile
from daemon.config import Downloads as DownloadSettings
from daemon.downloads import messages
from daemon.downloads.messages import Peeked
from daemon.errors import DownloadFailed, InvalidRequest, ModeldError, QueueFull, Stopping
from daemon.workers.child import Child, describe_exit
from daemon.workers.environment import for_fetcher

_TIMEOUT_S = 60.0
_ARGUMENTS = ("--connect-timeout-s=10", "--stall-timeout-s=20")  # less, for an error that says more
_AT_ONCE = 2
_WAITING = 32  # looks that may wait for a place, of different sources
_KEPT = 64
_KEPT_S = 600.0
_ERRORS: dict[str, type[ModeldError]] = {
    error.code: error for error in (InvalidRequest, InvalidModelFile, DownloadFailed)
}
log = logging.getLogger(__name__)

Key = tuple[str, str]  # a source and an architecture


@dataclass(slots=True, kw_only=True, eq=False)
class _Look:
    """One peeker at work, or about to be; `waiting` callers want its answer.

    What is on this machine is quickly looked at again, and its owner may change it: `keeps` is
    whether the answer holds for a while.
    """

    task: asyncio.Task[Peeked | wire.Error]
    keeps: bool
    waiting: int = 0
    ending: bool = False

    def end(self) -> None:
        """End it and its child. A second cancel would cut the first one's reaping short."""
        if not self.ending:
            self.ending = True
            self.task.cancel()


class Peeker:
    """Looks at models where they are. Must be used on the event loop's thread.

    `memory_bytes` is what models may take here.
    """

    def __init__(self, settings: DownloadSettings, *, memory_bytes: int = 0) -> None:
        self._settings = settings
        self._memory_bytes = memory_bytes
        self._looks: dict[Key, _Look] = {}
        self._all: set[_Look] = set()  # those that are being ended too
        self._kept: dict[Key, tuple[float, Peeked]] = {}  # until a time of time.monotonic
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._closing = False

    async def peek(self, source: str, *, architecture: str = "") -> Peeked:
        """Return what a download of `source` would bring; `architecture` is as for a download.

        Callers who ask for the same share one child, which ends with the last of them, after a
        minute at the latest. What is on the network is taken to stay as it is for ten minutes.
        Raises what a download would (InvalidRequest, DownloadFailed), QueueFull if too many others
        wait, and Stopping when modeld does.
        """
        key = (source, architecture)
        until, kept = self._kept.get(key, (0.0, None))
        if kept is not None and time.monotonic() < until:
            return kept
        look = self._looks.get(key) or self._start(key)
        look.waiting += 1
        try:
            await asyncio.wait([look.task])
        finally:
            look.waiting -= 1
            if not look.waiting and not look.task.done():
                look.end()
                self._forget(key, look)
        if look.task.cancelled():
            raise Stopping
        answer = look.task.result()
        if isinstance(answer, wire.Error):
            raise _ERRORS.get(answer.code, DownloadFailed)(answer.message)
        return answer

    async def close(self) -> None:
        """End all looks, and start none any more."""
        self._closing = True
        for look in self._all:
            look.end()
        if self._all:
            await asyncio.wait([look.task for look in self._all])

    def _start(self, key: Key) -> _Look:
        source = sources.parse(key[0])  # nonsense needs no child
        if self._closing:
            raise Stopping
        if len(self._all) >= _AT_ONCE + _WAITING:
            raise QueueFull(
                f"{len(self._all)} other models are being looked at: try again in a moment",
                retry_after_s=10,
            )
        look = _Look(
            task=asyncio.create_task(self._look(key)),
            keeps=isinstance(source, sources.HubSource | sources.UrlSource),
        )
        self._looks[key] = look
        self._all.add(look)
        look.task.add_done_callback(lambda _: self._ended(key, look))
        return look

    def _ended(self, key: Key, look: _Look) -> None:
        self._all.discard(look)
        self._forget(key, look)
        if look.task.cancelled() or look.task.exception() is not None or not look.keeps:
            return
        answer = look.task.result()
        if isinstance(answer, Peeked):
            self._kept.pop(key, None)
            self._kept[key] = (time.monotonic() + _KEPT_S, answer)
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]

    def _forget(self, key: Key, look: _Look) -> None:
        if self._looks.get(key) is look:
            del self._looks[key]

    async def _look(self, key: Key) -> Peeked | wire.Error:
        """Run a peeker to its end and return its answer."""
        try:
            async with self._places, asyncio.timeout(_TIMEOUT_S):
                return await self._ask(key)
        except TimeoutError:
            problem = f"it took more than {_TIMEOUT_S:g} s"
        except wire.ProtocolError as error:
            problem = str(error)
        except OSError as error:
            problem = f"its process could not be started ({error.strerror})"
        return _failed(key, problem)

    async def _ask(self, key: Key) -> Peeked | wire.Error:
        child = await Child.start(
            ["-m", "daemon.downloads.peeker", *_ARGUMENTS],
            union=messages.FromPeeker,
            name=f"peeker:{sources.public(key[0])}",
            environment=for_fetcher(os.environ),
        )
        try:
            child.send(
                messages.Peek(
                    source=key[0],
                    hub_endpoint=self._settings.hub_endpoint,
                    offline=self._settings.offline,
                    architecture=key[1],
                    memory_bytes=self._memory_bytes,
                )
            )
            async for message in child.messages():
                if isinstance(message, Peeked | wire.Error):
                    return message
            status = await asyncio.shield(child.exited)
            words = f"its process ended with {describe_exit(status)}: {child.last_line()}"
            return _failed(key, words)
        finally:
            child.kill()
            await asyncio.shield(child.exited)


def _failed(key: Key, problem: str) -> wire.Error:
    shown = sources.public(key[0])
    return wire.Error(
        code=DownloadFailed.code, message=f"{shown} could not be looked at: {problem}"
    )
