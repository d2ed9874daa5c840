"""[models] load_on_demand = false: requests are answered by models that are in memory."""

from __future__ import annotations

import pytest

from daemon.config import Config, Models


@pytest.fixture
def config() -> Config:
    return Config(models=Models(load_on_demand=False))


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "one"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "tiny", "prompt": "one"}),
        ("/v1/embeddings", {"model": "tiny", "input": "one"}),
        ("/v1/rerank", {"model": "tiny", "query": "one", "documents": ["one"]}),
        ("/modeld/v1/models/tiny/classify", {"input": "one"}),
    ],
)
async def test_a_model_answers_once_it_was_loaded(client, add_model, path, body):
    await add_model()
    refused = await client.post(path, json=body)
    error = (await refused.json())["error"]
    assert refused.status == 409 and error["code"] == "model_not_loaded"
    assert "modeld load tiny" in error["message"] and "load_on_demand" in error["message"]
    assert (await client.post("/modeld/v1/models/tiny/load")).status == 200
    assert (await client.post(path, json=body)).status == 200
    assert (await client.post("/modeld/v1/models/tiny/unload")).status == 200
    assert (await client.post(path, json=body)).status == 409
