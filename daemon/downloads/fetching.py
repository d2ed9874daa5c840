"""One run of a fetcher child, from the daemon's side: its order, what it says, its end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

from backends import wire
from daemon.downloads import messages
from daemon.downloads.job import Job
from daemon.workers.child import Child, describe_exit
from daemon.workers.environment import for_fetcher


@dataclass(frozen=True, slots=True)
class Killed:
    """Somebody else killed the fetcher: `words` say how."""

    words: str


End = messages.Fetched | wire.Error | Killed


async def fetch(
    job: Job, order: messages.Fetch, *, started: Callable[[], None], heard: Callable[[], None]
) -> End:
    """Run a fetcher to its end for a job, and return its last word.

    Calls `started` once it takes further orders, and `heard` whenever it has said how far it is.
    To cancel this ends the fetcher.
    """
    child = await Child.start(
        ["-m", "daemon.downloads.fetcher"],
        union=messages.FromFetcher,
        name=f"fetcher:{job.unique}",
        environment=for_fetcher(os.environ),
    )
    try:
        child.send(order)
        job.child = child
        started()
        async for message in child.messages():
            match message:
                case messages.Fetched() | wire.Error():
                    return message
                case messages.Progress():
                    job.see(message)
                    heard()
        status = await asyncio.shield(child.exited)
        words = f"its process ended with {describe_exit(status)}"
        if status < 0:
            return Killed(words)
        return wire.Error(code="download_failed", message=f"{words}: {child.last_line()}")
    finally:
        job.child = None
        child.kill()
        await asyncio.shield(child.exited)
