"""Never reads its channel, as an engine does that hangs on the main thread."""

from __future__ import annotations

import time

from backends import wire
from backends.child import attach

attach(wire.ToWorker)
while True:
    time.sleep(3600)
