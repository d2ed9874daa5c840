"""A hub with four models, an application that downloads from it, and ones that are started again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from downloading import NAMES, REPO, model
from hub import LocalHub

from backends.registry import Registry
from daemon import service
from daemon.api.app import build
from daemon.config import Config, Downloads, Server


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as running:
        running.add(
            REPO,
            {f"{name}.gguf": model(tmp_path, 8, seed) for seed, name in enumerate(NAMES)},
        )
        yield running


@pytest.fixture
def config(hub: LocalHub) -> Config:
    return Config(server=Server(), downloads=Downloads(max_active=2, hub_endpoint=hub.url))


@pytest.fixture
async def start(config, registry: Registry, aiohttp_client) -> AsyncIterator[Callable]:
    """Start the application on a data directory; the one before must have ended."""
    running = []

    async def begin(data_dir: Path):
        data_dir.mkdir(exist_ok=True)
        context = service.running_services(config, data_dir, registry)
        services = await context.__aenter__()
        client = await aiohttp_client(build(services))
        running.append((context, services, client))
        return client

    async def end():
        context, services, client = running.pop()
        services.stopping.set()
        await client.close()
        await context.__aexit__(None, None, None)

    begin.end = end
    yield begin
    while running:
        await end()
