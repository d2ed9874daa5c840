"""Small file systems, for tests of what happens when a disk is full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, size_bytes: int, *, files: int = 0) -> Iterator[Path]:
    """A file system of its own with so much room, and for so many files; 0 is no bound."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    path.mkdir()
    mount = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size={size_bytes},nr_inodes={files}",
        "modeld-test",
        str(path),
    ]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield path
    finally:
        # Lazily: after a test that failed somebody may be at work there still.
        subprocess.run(["umount", "--lazy", str(path)], check=True)
