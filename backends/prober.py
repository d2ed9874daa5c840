"""Child main: import one backend's engine, or ask the GPUs' libraries, say what is here, and exit.

A broken engine or driver may crash or hang; that must happen in here and nowhere else.
"""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path

from backends import hardware, wire
from backends.child import Channel, attach
from backends.hardware import nvidia
from backends.registry import load_class


def _leave_with_parent(channel: Channel) -> None:
    """End the process with its channel: an engine may hang while it is imported."""
    for _ in channel.receive():
        pass
    os._exit(0)


def main() -> None:
    """Probe the backend `--backend module:Class`, or the hardware below `--hardware DIR`."""
    channel, rest = attach(wire.Shutdown)
    parser = argparse.ArgumentParser()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--backend")
    what.add_argument("--hardware", type=Path)
    arguments = parser.parse_args(rest)
    threading.Thread(target=_leave_with_parent, args=(channel,), daemon=True).start()
    if arguments.backend:
        channel.send(wire.Probed(probe=load_class(arguments.backend).probe()))
    else:
        found = hardware.detect(arguments.hardware, open_nvml=nvidia.pynvml)
        channel.send(wire.Detected(hardware=found))
    os._exit(0)


if __name__ == "__main__":
    main()
