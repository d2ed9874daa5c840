"""Child main: ask one upstream which models it has, say so, and exit.

The upstream and its key come over the channel: neither a process's arguments nor its environment
are private.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from backends import wire
from backends.child import attach
from backends.contract import BackendError, Upstream
from backends.remote.answers import listed
from backends.remote.client import Client
from backends.remote.messages import Listed, ListedModel, ListModels

_MAX_MODELS = 5000
_MAX_NAME = 512


async def _list(upstream: Upstream) -> list[ListedModel]:
    async with contextlib.aclosing(Client(upstream)) as client:
        found = await client.get("/v1/models", listed)
    return [
        ListedModel(model=model, context_length=context_length)
        for model, context_length in list(found.items())[:_MAX_MODELS]
        if len(model) <= _MAX_NAME and model.isprintable()
    ]


def main() -> None:
    """Answer one ListModels."""
    channel, _ = attach(ListModels)
    # A line that can't be decoded holds a key: it ends the process without a word.
    with contextlib.suppress(OSError, wire.ProtocolError):
        for message in channel.receive():
            try:
                answer = Listed(models=asyncio.run(_list(message.upstream)))
            except BackendError as error:
                channel.send(wire.Error(code=error.code, message=error.message))
            else:
                channel.send(answer)
            break
    os._exit(0)


if __name__ == "__main__":
    main()
