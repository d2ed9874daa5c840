"""Reads the built-in catalog, `configs/models.toml`."""

from __future__ import annotations

import tomllib
from importlib import resources

import msgspec

from daemon.catalog.record import SeedRecord


def builtin() -> list[SeedRecord]:
    """Return the entries of the catalog that comes with modeld."""
    text = resources.files("configs").joinpath("models.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text)["model"], list[SeedRecord])
