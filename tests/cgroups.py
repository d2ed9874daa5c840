"""Control groups of a test's own, to show what happens where memory is scarce. Needs root."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

TOP = Path("/sys/fs/cgroup")


class Group:
    """A control group with a memory limit. Processes join it by `command`, and are in it for good."""

    def __init__(self, path: Path, *, unified: bool) -> None:
        self.path = path
        self._unified = unified

    def command(self) -> list[str]:
        """What to put before a command so that it runs in the group."""
        script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return ["sh", "-c", script, str(self.path)]

    def limit(self, size_bytes: int) -> None:
        name = "memory.max" if self._unified else "memory.limit_in_bytes"
        (self.path / name).write_text(str(size_bytes))
        if self._unified:
            (self.path / "memory.swap.max").write_text("0")

    @property
    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        name = "memory.events" if self._unified else "memory.oom_control"
        lines = (self.path / name).read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])

    def remove(self) -> None:
        deadline = time.monotonic() + 5
        while True:
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # its last processes are being reaped
            else:
                return


def _own_group() -> tuple[Path, bool] | None:
    """Return this process's group of the memory controller, and whether it is of version 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if "memory" in controllers.split(","):
            return TOP / "memory" / inside, False
        if not controllers and (TOP / "cgroup.controllers").exists():
            return TOP / inside, True
    return None


@contextlib.contextmanager
def limited(size_bytes: int) -> Iterator[Group | None]:
    """Give a new group with that memory limit; None where this process can't make one."""
    found = _own_group()
    group = None
    if found is not None:
        own, unified = found
        # Of a group of version 2 that has processes in it, only the root can have limited children.
        parent = TOP if unified else own
        path = parent / f"modeld-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            if unified and "memory" not in (TOP / "cgroup.subtree_control").read_text().split():
                (TOP / "cgroup.subtree_control").write_text("+memory")
            path.mkdir()
            group = Group(path, unified=unified)
            group.limit(size_bytes)
    try:
        yield group
    finally:
        if group is not None:
            group.remove()
