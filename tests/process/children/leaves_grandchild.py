"""Starts a process that holds its stdout, stderr and channel for an hour; exits when told to."""

from __future__ import annotations

import os
import subprocess
import sys

from backends import wire
from backends.child import attach

fd = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--channel-fd="))
channel, _ = attach(wire.ToWorker)
program = "import time; time.sleep(3600)"
grandchild = subprocess.Popen([sys.executable, "-c", program], pass_fds=(fd,))
channel.send(wire.Pong(id=grandchild.pid))
for message in channel.receive():
    if isinstance(message, wire.Shutdown):
        break
print("last words", flush=True)
os._exit(0)
