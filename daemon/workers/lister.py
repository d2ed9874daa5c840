"""Asks an upstream, in a child of its own, which models it has.

The daemon itself talks to nobody but its clients.
"""

from __future__ import annotations

import asyncio

from backends import wire
from backends.contract import Upstream
from backends.remote.messages import FromLister, Listed, ListModels
from daemon.errors import EngineError
from daemon.workers.child import Child, describe_exit

_TIMEOUT_S = 30.0


async def list_models(name: str, upstream: Upstream) -> dict[str, int]:
    """Return the upstream's models: their names there, and their context lengths (0: unknown).

    Raises EngineError with why that could not be had.
    """
    try:
        child = await Child.start(
            ["-m", "backends.remote.lister"], union=FromLister, name=f"lister:{name}"
        )
    except OSError as error:
        raise EngineError(f"its lister could not be started: {error.strerror}") from error
    try:
        child.send(ListModels(upstream=upstream))
        async with asyncio.timeout(_TIMEOUT_S):
            async for message in child.messages():
                match message:
                    case Listed():
                        return {entry.model: entry.context_length for entry in message.models}
                    case wire.Error():
                        raise EngineError(message.message)
            status = await asyncio.shield(child.exited)
        raise EngineError(f"its lister ended with {describe_exit(status)}: {child.last_line()}")
    except TimeoutError:
        raise EngineError(f"no answer within {_TIMEOUT_S:.0f} s") from None
    except wire.ProtocolError as error:
        raise EngineError(str(error)) from error
    finally:
        child.kill()
        await asyncio.shield(child.exited)
