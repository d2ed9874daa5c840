"""Says its last word when it is spoken to, and ends without having read a thing."""

from __future__ import annotations

import os
import select
import sys

from backends import wire
from backends.child import attach

fd = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--channel-fd="))
channel, _ = attach(wire.ToWorker)
select.select([fd], [], [])
channel.send(wire.Pong(id=7))
os._exit(0)
