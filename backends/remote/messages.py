"""What the daemon and a lister say to each other, besides what every child says."""

from __future__ import annotations

import msgspec

from backends import wire
from backends.contract import Upstream


class ListModels(wire.Message):
    """Which models has this upstream? Answered by Listed or Error."""

    upstream: Upstream


class ListedModel(msgspec.Struct):
    """One model of an upstream, by its name there; a `context_length` of 0 is not known."""

    model: str
    context_length: int = 0


class Listed(wire.Message):
    """The models that an upstream has."""

    models: list[ListedModel]


FromLister = wire.Hello | wire.Error | Listed
