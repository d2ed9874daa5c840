"""Child main: import one backend's engine, say what it can do here, and exit.

A broken engine may crash or hang at import; that must happen in here and nowhere else.
"""

from __future__ import annotations

import argparse
import os

from backends import wire
from backends.child import attach
from backends.registry import load_class


def main() -> None:
    """Probe the backend named by `--backend module:Class`."""
    channel, rest = attach(wire.Shutdown)
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    channel.send(wire.Probed(probe=load_class(parser.parse_args(rest).backend).probe()))
    os._exit(0)


if __name__ == "__main__":
    main()
