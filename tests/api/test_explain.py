"""A choice of backend that explains itself, and can be settled by the model or the settings."""

from __future__ import annotations

import pytest

from backends.registry import Registry
from daemon.config import Config, Models


@pytest.fixture
def registry() -> Registry:
    return Registry(
        {
            "reference": "reference_backend:ReferenceBackend",
            "missing": "reference_backend:MissingBackend",
            "broken": "no_such_module:Backend",
        }
    )


async def explain(client, model="tiny"):
    response = await client.get(f"/modeld/v1/models/{model}/explain")
    assert response.status == 200, await response.text()
    return await response.json()


async def test_every_backend_is_shown_with_score_and_reason(client, add_model):
    await add_model()
    answer = await explain(client)
    assert answer["chosen"] == "reference" and answer["fixed"] is None
    shown = {candidate["backend"]: candidate for candidate in answer["candidates"]}
    assert answer["candidates"][0]["backend"] == "reference"
    assert shown["reference"]["score"] == 1 and "chat" in shown["reference"]["tasks"]
    assert shown["missing"]["score"] == 0 and "pip install engine" in shown["missing"]["reason"]
    assert shown["broken"]["score"] == 0 and "no_such_module" in shown["broken"]["reason"]


async def test_a_load_takes_what_was_explained(client, add_model):
    await add_model()
    chosen = (await explain(client))["chosen"]
    loaded = await (await client.post("/modeld/v1/models/tiny/load")).json()
    assert loaded["backend"] == chosen


async def test_a_model_can_fix_its_backend(client, add_model, services):
    model_id = await add_model()
    services.catalog.update(model_id, backend="missing")
    answer = await explain(client)
    assert answer["chosen"] is None and answer["fixed"] == "the model asks for missing"
    refused = await client.post("/modeld/v1/models/tiny/load")
    assert refused.status == 501 and "pip install engine" in await refused.text()


async def test_a_new_model_can_name_its_backend(client):
    body = {"source": "hf:a/b/c.gguf", "backend": "reference"}
    assert (await client.post("/modeld/v1/models", json=body)).status == 201
    wrong = await client.post("/modeld/v1/models", json=body | {"unique": "x", "backend": "best"})
    error = (await wrong.json())["error"]
    assert wrong.status == 400 and error["param"] == "backend" and "reference" in error["message"]


@pytest.mark.parametrize("config", [Config(models=Models(backend="best"))])
async def test_a_backend_that_is_not_known_is_refused_by_name(client, add_model):
    await add_model()
    refused = await client.post("/modeld/v1/models/tiny/load")
    text = await refused.text()
    assert refused.status == 501 and "[models] backend asks for the backend 'best'" in text
    assert (await explain(client))["chosen"] is None


async def test_a_model_without_files_can_not_be_explained(client):
    response = await client.get("/modeld/v1/models/smollm2:135m-instruct-q4_1/explain")
    assert response.status == 404 and "modeld pull" in await response.text()


async def test_the_reason_of_the_last_failure_is_kept(client, add_model):
    await add_model("sick", test_load="fail")
    await client.post("/modeld/v1/models/sick/load")
    assert "made to fail" in (await explain(client, "sick"))["last_error"]
