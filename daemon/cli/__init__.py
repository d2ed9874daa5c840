"""The command line: `modeld serve`, and the commands that ask a running daemon."""

from daemon.cli.main import main

__all__ = ["main"]
