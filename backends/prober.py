"""Child main: import one backend's engine, say what it can do here, and exit.

A broken engine may crash or hang at import; that must happen in here and nowhere else.
"""

from __future__ import annotations

import argparse
import os
import threading

from backends import wire
from backends.child import Channel, attach
from backends.registry import load_class


def _leave_with_parent(channel: Channel) -> None:
    """End the process with its channel: an engine may hang while it is imported."""
    for _ in channel.receive():
        pass
    os._exit(0)


def main() -> None:
    """Probe the backend named by `--backend module:Class`."""
    channel, rest = attach(wire.Shutdown)
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    threading.Thread(target=_leave_with_parent, args=(channel,), daemon=True).start()
    channel.send(wire.Probed(probe=load_class(parser.parse_args(rest).backend).probe()))
    os._exit(0)


if __name__ == "__main__":
    main()
