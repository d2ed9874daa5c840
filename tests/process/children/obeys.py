"""A child that behaves: answers pings, repeats what it is asked, exits when told to."""

from __future__ import annotations

from backends import contract, wire
from backends.child import attach

channel, rest = attach(wire.ToWorker)
if rest:
    print(*rest, flush=True)
for message in channel.receive():
    match message:
        case wire.Ping():
            channel.send(wire.Pong(id=message.id))
        case wire.Chat():
            content = message.request.messages[-1]["content"]
            channel.send(wire.Delta(id=message.id, delta=contract.Delta(content=content)))
        case wire.Shutdown():
            break
