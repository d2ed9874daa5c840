"""Prints 25 MB to stdout and 25 MB to stderr, says so on its channel, and waits."""

from __future__ import annotations

import os

from backends import wire
from backends.child import attach

CHUNK = b"the quick brown engine\n" * 1000
channel, _ = attach(wire.ToWorker)
for _ in range(25_000_000 // len(CHUNK) + 1):
    for descriptor in (1, 2):
        rest = CHUNK
        while rest:
            rest = rest[os.write(descriptor, rest) :]
for descriptor in (1, 2):
    os.write(descriptor, b"last words\n")
channel.send(wire.Pong(id=0))
for message in channel.receive():
    if isinstance(message, wire.Shutdown):
        break
