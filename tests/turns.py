"""Tests run side by side, each in its turn; one that measures time or needs a fixed port is alone.

Processes of one run (pytest-xdist) share two locked files. A test holds the room shared, one that is
marked `alone` holds it for itself. Who enters passes a gate: no crowd of shared ones keeps one out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Wait until a test may run, and keep its place while it runs."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        yield
        return
    place = Path(tempfile.gettempdir()) / f"modeld-tests-{run}"
    with _open(f"{place}.room") as room:
        with _open(f"{place}.gate") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _open(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
