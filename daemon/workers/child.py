"""The parent's handle on one child process: start, messages in order, stop ladder, last words.

Owns process lifetime for workers, probers and fetchers alike; knows none of their messages.
Must be used on the main thread: a child dies with the thread that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from backends import wire
from daemon.workers.environment import for_engines

_TAIL_BYTES = 8192
log = logging.getLogger(__name__)


def describe_exit(status: int) -> str:
    """Return how a process ended, in words: `exit status 1`, or `killed by SIGKILL (9)`."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name} ({-status})"
    return f"killed by signal {-status}"


async def _read_pipe(descriptor: int) -> tuple[asyncio.ReadTransport, asyncio.StreamReader]:
    """Return a reader of the pipe, which now owns `descriptor`."""
    stream = asyncio.StreamReader()
    pipe = open(descriptor, "rb", buffering=0)  # noqa: ASYNC230, SIM115  it does not block
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), pipe
    )
    return transport, stream


class _Words(asyncio.StreamReader):
    """What a child says. A reset of the connection is its end, and takes nothing that came before.

    A child that ends without having read all that it was told makes one, and asyncio's own reader
    then raises that at once.
    """

    def set_exception(self, exc: Exception) -> None:
        if isinstance(exc, ConnectionError):
            self.feed_eof()
        else:
            super().set_exception(exc)


async def _open_channel(channel: socket.socket) -> tuple[_Words, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = _Words(limit=wire.MAX_LINE_BYTES, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_connection(lambda: protocol, sock=channel)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class Child:
    """A running child. Make one with `start`; whoever makes it must `stop` it or await `exited`."""

    def __init__(
        self,
        *,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: wire.Decoder[Any],
        output: tuple[asyncio.ReadTransport, asyncio.StreamReader],
        name: str,
    ) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._tail = bytearray()
        self._output, stream = output
        self._drained = asyncio.create_task(self._drain(stream))
        self.exited: asyncio.Task[int] = asyncio.create_task(self._reap())

    @classmethod
    async def start(
        cls,
        arguments: Sequence[str],
        *,
        union: Any,
        name: str,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Child:
        """Start `python arguments…` with a channel; `union` is the type of what it will say.

        Raises OSError if the process cannot be started.
        """
        output, printed = os.pipe()
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            os.close(output)
            os.close(printed)
            raise
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                *arguments,
                f"--channel-fd={theirs.fileno()}",
                f"--parent-pid={os.getpid()}",
                stdin=asyncio.subprocess.DEVNULL,
                # With asyncio's own pipes an exit is seen only once all who hold them are gone.
                stdout=printed,
                stderr=printed,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=for_engines(os.environ) if environment is None else environment,
                cwd=cwd,
            )
        except BaseException:
            ours.close()
            os.close(output)
            raise
        finally:
            theirs.close()
            os.close(printed)
        reading = None
        try:
            reading = await _read_pipe(output)
            reader, writer = await _open_channel(ours)
        except BaseException:
            process.kill()
            ours.close()
            if reading is not None:
                reading[0].close()
            raise
        log.debug("child=%s pid=%d started", name, process.pid)
        return cls(
            process=process,
            reader=reader,
            writer=writer,
            decoder=wire.Decoder(union),
            output=reading,
            name=name,
        )

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message. One to a child that has gone is lost: `exited` tells."""
        if not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def messages(self) -> AsyncIterator[Any]:
        """Yield messages until the child closes the channel. A line that is none kills the child.

        Raises ProtocolError after that.
        """
        try:
            while (line := await self._reader.readline()).endswith(b"\n"):
                yield self._decoder.decode(line)
            # A line without its end was torn by the child's death, of which `exited` tells.
        except (ValueError, wire.ProtocolError) as error:  # ValueError: a line over the limit
            self._signal(signal.SIGKILL)
            raise wire.ProtocolError(f"{self.name} broke the protocol: {error}") from error

    @property
    def tail(self) -> str:
        """The last 8 KiB of what the child printed."""
        return self._tail.decode("utf-8", "replace").strip()

    def last_line(self) -> str:
        """Return the last line that the child printed, to explain how it ended."""
        return self.tail.rpartition("\n")[2]

    def first_complaint(self) -> str:
        """Return the first line that speaks of an error: the cause comes before the rest."""
        lines = self.tail.splitlines()
        return next((line.strip() for line in lines if "error" in line.lower()), "")

    async def _drain(self, stream: asyncio.StreamReader) -> None:
        unfinished = b""
        while chunk := await stream.read(65536):
            self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
            if log.isEnabledFor(logging.DEBUG):
                *lines, unfinished = (unfinished + chunk).split(b"\n")
                unfinished = unfinished[-_TAIL_BYTES:]
                for line in lines:
                    log.debug("child=%s %s", self.name, line.decode("utf-8", "replace"))

    async def _reap(self) -> int:
        status = await self._process.wait()
        # A grandchild must neither live on nor hold the pipe open.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await asyncio.wait([self._drained], timeout=0.5)
        self._drained.cancel()
        self._output.close()
        self._writer.close()
        log.debug("child=%s pid=%d ended: %s", self.name, self.pid, describe_exit(status))
        return status

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def stop(self, goodbye: msgspec.Struct | None = None, *, grace_s: float = 2.0) -> int:
        """End the child: `goodbye`, grace, SIGTERM, grace, SIGKILL. Return its exit status.

        May be called by several at once, and after the end.
        """
        if goodbye is not None:
            self.send(goodbye)
            if await self._gone_within(grace_s):
                return self.exited.result()
        self._signal(signal.SIGTERM)
        if not await self._gone_within(grace_s):
            self._signal(signal.SIGKILL)
        return await asyncio.shield(self.exited)

    async def _gone_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait([self.exited], timeout=seconds)
        return bool(done)

    def kill(self) -> None:
        """End the child at once; `exited` follows."""
        self._signal(signal.SIGKILL)
