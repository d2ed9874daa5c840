"""What a load is given of the machine: threads beside models that compute, and GPUs as they are."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest
from computers import lay_out
from reference_backend import ReferenceBackend

from backends.contract import (
    Artifact,
    LoadedModel,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
    Placement,
    Probe,
    Progress,
)
from backends.registry import Registry
from daemon import service
from daemon.models.threads import threads
from daemon.workers.machine import Machine

MIB = 1024**2


class Telling(ReferenceBackend):
    """Says what it was given: GPUs in the estimate's reason, threads in the engine's version."""

    name: ClassVar[str] = "telling"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(backend=cls.name, available=True, version="1", gpu_vendors=("nvidia",))

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        told = " ".join(f"{gpu.id}={gpu.free_bytes}" for gpu in options.gpus)
        return MemoryEstimate(
            context_length=1024,
            slots=2,
            parts={"weights": 1},
            gpu_parts={"0000:01:00.0": {"weights": 100 * MIB, "compute": 50 * MIB}},
            placement=Placement(reason=told),
        )

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        loaded = super().load(spec, progress)
        return LoadedModel(
            tasks=loaded.tasks,
            slots=loaded.slots,
            context_length=loaded.context_length,
            engine_version=str(spec.threads),
        )


@pytest.fixture
def registry(monkeypatch, request) -> Registry:
    folder = str(request.path.parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{request.path.parents[1]}")
    return Registry({"telling": "test_resources:Telling"})


@pytest.fixture
def two_cards(tmp_path, monkeypatch):
    """A computer with two cards of NVIDIA's; return its facts, which may be changed."""
    root = tmp_path / "root"
    lay_out(root, "two_nvidia")
    monkeypatch.setattr(service, "Machine", lambda: Machine(root))
    return root / "nvml.json"


@pytest.fixture
def with_nvml(two_cards, registry, monkeypatch, tmp_path, request):
    path = tmp_path / "nvml"
    path.mkdir()
    (path / "pynvml.py").write_text(
        "from pathlib import Path\nfrom computers import recorded_nvml\n"
        f"_nvml = recorded_nvml(Path({str(two_cards.parent)!r}))\n"
        "def __getattr__(name):\n    return getattr(_nvml, name)\n"
    )
    parents = request.path.parents
    monkeypatch.setenv("PYTHONPATH", f"{path}:{parents[0]}:{parents[1]}")
    return two_cards


async def placement(client):
    (model,) = (await (await client.get("/modeld/v1/doctor")).json())["models"]
    assert model["problem"] == ""
    return model["placement"]


async def test_a_load_sees_the_free_memory_of_the_moment(with_nvml, client, add_model):
    await add_model()
    assert await placement(client) == "0000:01:00.0=16093544448 0000:0c:00.0=7938768896"
    with_nvml.write_text(with_nvml.read_text().replace("7938768896", "5"))
    assert await placement(client) == "0000:01:00.0=16093544448 0000:0c:00.0=5"


async def test_what_a_load_that_goes_on_will_take_of_a_gpu_is_not_free(
    with_nvml, client, add_model
):
    model_id = await add_model(test_load="hang")
    loading = asyncio.create_task(client.post(f"/modeld/v1/models/{model_id}/load"))
    while (await (await client.get(f"/modeld/v1/models/{model_id}")).json())["worker_pid"] is None:
        state = await (await client.get("/modeld/v1/memory")).json()
        if state["models"]:
            break
        await asyncio.sleep(0.01)
    assert await placement(client) == (
        f"0000:01:00.0={16093544448 - 150 * MIB} 0000:0c:00.0=7938768896"
    )
    await client.post(f"/modeld/v1/models/{model_id}/unload")
    assert (await loading).status == 409
    assert await placement(client) == "0000:01:00.0=16093544448 0000:0c:00.0=7938768896"


async def test_a_model_beside_one_that_computes_gets_its_share_of_the_cores(
    client, add_model, services
):
    one, two = await add_model("one"), await add_model("two")
    cores = services.machine.known.physical_cores

    async def threads_of(model_id: str) -> int:
        assert (await client.post(f"/modeld/v1/models/{model_id}/load")).status == 200
        instance = services.models._residency.residents[model_id].instance
        return int(instance.loaded.engine_version)

    assert await threads_of(one) == threads(cores, 1)
    body = {"model": "one", "messages": [{"role": "user", "content": "!slow 500"}], "stream": True}
    async with client.post("/v1/chat/completions", json=body) as answer:
        await answer.content.readline()
        assert await threads_of(two) == threads(cores, 2)
    await client.post(f"/modeld/v1/models/{two}/unload")
    while services.models.status(one).in_flight:
        await asyncio.sleep(0.01)
    # one that is loaded and idle does not count
    assert await threads_of(two) == threads(cores, 1)
