"""Dies in the middle of a line, after a whole one."""

from __future__ import annotations

import os
import sys

from backends import contract, wire
from backends.child import attach

fd = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--channel-fd="))
channel, _ = attach(wire.ToWorker)
next(channel.receive())
channel.send(wire.Delta(id=1, delta=contract.Delta(content="whole")))
line = wire.encode(wire.Delta(id=1, delta=contract.Delta(content="torn")))
os.write(fd, line[: len(line) // 2])
os._exit(7)
