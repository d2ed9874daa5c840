"""When the chosen backend cannot load a model, the next one does, and the reason is kept."""

from __future__ import annotations

import pytest

from backends.registry import Registry


@pytest.fixture
def registry() -> Registry:
    return Registry(
        {
            "failing": "reference_backend:FailingBackend",
            "reference": "reference_backend:ReferenceBackend",
        }
    )


async def shown(client, path=""):
    return await (await client.get(f"/modeld/v1/models/tiny{path}")).json()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "failing: its first choice was made to fail"),
        ({"test_estimate": "bug"}, "failing: its estimate failed: TypeError: another bug"),
        ({"test_estimate": "huge"}, "failing: "),  # it does not fit the memory
    ],
)
async def test_the_next_one_runs_the_model_and_the_reason_is_kept(client, add_model, facts, reason):
    await add_model(**facts)
    response = await client.post("/modeld/v1/models/tiny/load")
    assert response.status == 200, await response.text()
    model = await shown(client)
    assert (model["state"], model["backend"]) == ("ready", "reference")
    (kept,) = model["passed_over"]
    assert kept.startswith(reason)
    assert (await shown(client, "/explain"))["passed_over"] == [kept]
    memory = await (await client.get("/modeld/v1/memory")).json()
    assert memory["reserved_bytes"] == model["reserved_bytes"]  # nothing of the first try is left


async def test_a_fault_in_a_plugin_s_fit_costs_itself_alone(client, add_model):
    await add_model(test_fit="bug")
    explained = await shown(client, "/explain")
    assert explained["chosen"] == "reference"
    reasons = {c["backend"]: c["reason"] for c in explained["candidates"]}
    assert "its fit failed: KeyError" in reasons["failing"]
    assert (await client.post("/modeld/v1/models/tiny/load")).status == 200


async def test_settings_that_are_given_again_replace_those_of_a_model(client, add_model):
    await add_model()
    before = await shown(client)
    body = {"source": before["source"], "unique": "tiny", "backend": "reference"}
    response = await client.post("/modeld/v1/models", json=body)
    assert response.status == 200 and (await response.json())["fixed_backend"] == "reference"
    assert (await shown(client, "/explain"))["chosen"] == "reference"
    await client.post("/modeld/v1/models/tiny/load")
    assert (await shown(client))["passed_over"] == []
