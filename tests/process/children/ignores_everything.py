"""Ignores the goodbye, the end of its channel and SIGTERM; only SIGKILL ends it."""

from __future__ import annotations

import signal
import time

from backends import wire
from backends.child import attach

signal.signal(signal.SIGTERM, signal.SIG_IGN)
channel, _ = attach(wire.ToWorker)
for _ in channel.receive():
    pass
while True:
    time.sleep(3600)
