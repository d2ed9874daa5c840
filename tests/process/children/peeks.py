"""Looks at `SOURCE` of the hub at `ENDPOINT` through Peeker, as the daemon does."""

from __future__ import annotations

import asyncio
import sys

from daemon.config import Downloads
from daemon.downloads.peek import Peeker


async def main() -> None:
    source, endpoint = sys.argv[1:]
    await Peeker(Downloads(hub_endpoint=endpoint)).peek(source)


asyncio.run(main())
