"""Starts `arguments…` as a child through Child, prints its pid once it said hello, and waits."""

from __future__ import annotations

import asyncio
import sys

from backends import wire
from daemon.workers.child import Child


async def main() -> None:
    child = await Child.start(sys.argv[1:], union=wire.FromWorker, name="child")
    async for message in child.messages():
        if isinstance(message, wire.Hello):
            print(child.pid, flush=True)
    await child.exited


asyncio.run(main())
