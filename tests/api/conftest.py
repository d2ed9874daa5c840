"""The application in this process, with the reference backend in real workers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from gguf_files import Tensor, write_gguf
from pytest_aiohttp.plugin import AiohttpClient

from backends.registry import Registry
from daemon import service
from daemon.api import streams
from daemon.api.app import build
from daemon.api.context import SERVICES, Services
from daemon.config import Config

Client = TestClient[web.Request, web.Application]
AddModel = Callable[..., Awaitable[str]]


@pytest.fixture
def config() -> Config:
    """The settings of the application; a test module may override this fixture."""
    return Config()


@pytest.fixture
def registry() -> Registry:
    """The backends of the application; a test module may override this fixture."""
    return Registry({"reference": "reference_backend:ReferenceBackend"})


@pytest.fixture
async def client(
    tmp_path: Path, config: Config, registry: Registry, aiohttp_client: AiohttpClient
) -> AsyncIterator[Client]:
    """A client of an application whose one backend is the reference backend."""
    data_dir = tmp_path / "modeld"
    data_dir.mkdir()
    async with service.running_services(config, data_dir, registry) as services:
        client = await aiohttp_client(build(services))
        try:
            yield client
        finally:
            services.stopping.set()
            await client.close()


@pytest.fixture
def services(client: Client) -> Services:
    return client.app[SERVICES]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer begins before its first piece, or its failure, however slow this machine is."""
    monkeypatch.setattr(streams, "_PATIENCE_S", 60.0)


@pytest.fixture
def add_model(client: Client, tmp_path: Path) -> AddModel:
    """Import a tiny GGUF: `await add_model("name", **metadata)` returns its id."""

    async def add(unique: str = "tiny", **metadata: Any) -> str:
        path = tmp_path / f"{unique}.gguf"
        write_tiny(path, **metadata)
        body = {"source": str(path), "unique": unique}
        answer = await client.post("/modeld/v1/models", json=body)
        assert answer.status == 201, await answer.text()
        model_id = (await answer.json())["id"]
        services = client.app[SERVICES]
        job = services.downloads.start(services.catalog.get(model_id))
        assert job.task is not None
        await job.task
        assert job.state == "completed", job.error
        return str(model_id)

    return add


def write_tiny(path: Path, **metadata: Any) -> None:
    """Write a GGUF with one small tensor; keyword `test_load` orders the reference backend."""
    facts: dict[str, Any] = {"general.architecture": "llama", "llama.context_length": 2048}
    facts |= {key.replace("_", ".", 1): value for key, value in metadata.items()}
    write_gguf(path, facts, [Tensor(name="blk.0.weight", dimensions=(32, 4))])
