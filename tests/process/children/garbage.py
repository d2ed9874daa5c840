"""Answers the first message with a line that is no message, then with a good one, and lives on."""

from __future__ import annotations

import os
import sys
import time

from backends import wire
from backends.child import attach

LINES = {
    "text": b"Loading model: 100%\n",
    "unknown": b'{"type":"nonsense"}\n',
    "incomplete": b'{"type":"delta","id":1}\n',
    "binary": bytes(range(14, 256)) + b"\n",
    "nested": b'{"type":"done","x":' + b"[" * 500_000 + b"\n",
    "long": b"x" * 4_000_000 + b"\n",
}
fd = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--channel-fd="))
channel, (kind,) = attach(wire.ToWorker)
next(channel.receive())
line = LINES[kind]
while line:
    line = line[os.write(fd, line) :]
channel.send(wire.Pong(id=1))
while True:
    time.sleep(3600)
