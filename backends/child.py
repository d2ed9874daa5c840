"""The child's side of a channel: what every worker, prober and fetcher does before its own work.

Owns the ties of a child to its parent (it must never outlive it) and blocking I/O on the inherited
socket. Knows no message but Hello.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import msgspec

from backends import wire

_PR_SET_PDEATHSIG = 1
_OOM_SCORE_ADJ = 500  # the kernel's pick before any program the user is looking at
_NICE = 5  # the daemon and the user's apps go first; a free core is still used in full


class Channel:
    """Blocking messages over the inherited socket. `send` may be called from any thread."""

    def __init__(self, sock: socket.socket, union: Any) -> None:
        self._sock = sock
        self._decoder: wire.Decoder[Any] = wire.Decoder(union)
        self._send_lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Write one message. Raises OSError when the parent is gone."""
        line = wire.encode(message)
        with self._send_lock:
            self._sock.sendall(line)

    def receive(self) -> Iterator[Any]:
        """Yield messages until the parent closes the channel. Raises ProtocolError."""
        with self._sock.makefile("rb") as lines:
            while line := lines.readline(wire.MAX_LINE_BYTES + 1):
                if len(line) > wire.MAX_LINE_BYTES:
                    raise wire.ProtocolError(f"line over {wire.MAX_LINE_BYTES} bytes")
                yield self._decoder.decode(line)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies; exit if that has happened already.

    Elsewhere than on Linux the end of the channel has to do.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def _yield_to_others() -> None:
    """Rank this process behind the user's own programs, for the CPU and for the OOM killer."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(_OOM_SCORE_ADJ))
    except OSError:
        pass  # a courtesy that some systems do not offer


def attach(union: Any) -> tuple[Channel, list[str]]:
    """Tie this process to its parent, greet it, and return the channel and the other arguments.

    `union` is the type of the messages that the parent sends. Reads `--channel-fd` and
    `--parent-pid` from the command line.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    options, rest = parser.parse_known_args()
    die_with_parent(options.parent_pid)
    os.umask(0o077)  # what a child writes was said or downloaded by one user, and is theirs alone
    # Ctrl-C in a terminal goes to the daemon, which then ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _yield_to_others()
    channel = Channel(socket.socket(fileno=options.channel_fd), union)
    channel.send(wire.Hello(pid=os.getpid()))
    return channel, rest
