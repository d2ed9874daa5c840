"""The pinned part of the native surface."""

from __future__ import annotations

import asyncio

import pytest

from daemon.config import Config, Models

PINNED = {
    "id",
    "unique",
    "state",
    "backend",
    "worker_pid",
    "in_flight",
    "pinned",
    "estimate_bytes",
    "reserved_bytes",
    "measured_bytes",
    "context_length",
    "last_error",
}


async def get(client, path):
    response = await client.get(path)
    assert response.status == 200, await response.text()
    return await response.json()


async def test_a_model_shows_the_pinned_fields_in_every_state(client, add_model):
    model_id = await add_model()
    for key in (model_id, "tiny", "TINY"):
        shown = await get(client, f"/modeld/v1/models/{key}")
        assert set(shown) >= PINNED and shown["id"] == model_id
    assert shown["state"] == "unloaded" and shown["worker_pid"] is None
    loaded = await (await client.post("/modeld/v1/models/tiny/load")).json()
    assert loaded["state"] == "ready" and loaded["backend"] == "reference"
    assert loaded["worker_pid"] and loaded["context_length"] == 1024 and loaded["slots"] == 2
    assert loaded["reserved_bytes"] >= loaded["estimate_bytes"] > 0 < loaded["measured_bytes"]
    unloaded = await (await client.post("/modeld/v1/models/tiny/unload")).json()
    assert unloaded["state"] == "unloaded" and unloaded["reserved_bytes"] == 0
    listed = await get(client, "/modeld/v1/models")
    assert {model["unique"] for model in listed["models"]} >= {"tiny"}


async def test_memory_adds_up(client, add_model):
    await add_model("one")
    await add_model("two")
    for name in ("one", "two"):
        await client.post(f"/modeld/v1/models/{name}/load")
    memory = await get(client, "/modeld/v1/memory")
    assert set(memory) >= {"budget_bytes", "reserved_bytes", "available_bytes", "models"}
    assert memory["reserved_bytes"] == sum(m["reserved_bytes"] for m in memory["models"])
    assert {m["unique"] for m in memory["models"]} == {"one", "two"}
    assert 0 <= memory["available_bytes"] <= memory["budget_bytes"] - memory["reserved_bytes"]


async def test_adding_a_model_is_201_then_200_and_never_two(client, tmp_path):
    body = {"source": "hf:owner/repo/Some-Model.Q4_K_M.gguf"}
    first = await client.post("/modeld/v1/models", json=body)
    again = await client.post("/modeld/v1/models", json=body)
    assert (first.status, again.status) == (201, 200)
    record = await first.json()
    assert record["unique"] == "some-model.q4_k_m" and record["custom"]
    assert (await again.json())["id"] == record["id"]
    other = await client.post(
        "/modeld/v1/models", json=body | {"source": "hf:other/repo/Some-Model.Q4_K_M.gguf"}
    )
    assert other.status == 409 and (await other.json())["error"]["code"] == "conflict"
    named = await client.post("/modeld/v1/models", json=body | {"unique": "mine"})
    assert named.status == 201, "the same bytes may be there under several names"


async def test_wrong_bodies_and_sources_are_400_with_the_field(client):
    for body, words in (
        ({}, "source"),
        ({"source": 5}, "source"),
        ({"source": "ftp://x/y"}, "hf:owner/repo"),
        ({"source": "hf:a/b/../../etc"}, "hf:a/b/../../etc"),
        ({"source": "hf:a/b/x.gguf", "unique": "no spaces"}, "unique"),
        ({"source": "hf:a/b/x.gguf", "unique": "../up"}, "unique"),
        ({"source": "hf:a/b/x.gguf", "extra": 1}, "extra"),
    ):
        response = await client.post("/modeld/v1/models", json=body)
        error = (await response.json())["error"]
        assert response.status == 400 and words in error["message"], (body, error)


async def test_an_unload_waits_for_the_answer_that_is_being_written(client, add_model):
    await add_model()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "!slow 30"}]}
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
    while (await get(client, "/modeld/v1/models/tiny"))["worker_pid"] is None:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    await client.post("/modeld/v1/models/tiny/unload")
    answer = await asking
    assert answer.status == 200
    assert (await answer.json())["usage"]["completion_tokens"] == 30
    assert (await get(client, "/modeld/v1/models/tiny"))["state"] == "unloaded"


async def test_an_unload_ends_an_answer_that_takes_too_long(client, add_model, monkeypatch):
    monkeypatch.setattr("daemon.models.residency.DRAIN_S", 0.2)
    await add_model()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "!slow 1000"}]}
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
    while not (await get(client, "/modeld/v1/models/tiny"))["worker_pid"]:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    await client.post("/modeld/v1/models/tiny/unload")
    answer = await asking
    assert answer.status == 409 and "was unloaded while it answered" in await answer.text()
    shown = await get(client, "/modeld/v1/models/tiny")
    # an end that was asked for is no crash
    assert shown["state"] == "unloaded" and shown["last_error"] is None


async def test_an_unload_ends_a_load(client, add_model):
    await add_model("slowly", test_load="slow 30")
    loading = asyncio.create_task(client.post("/modeld/v1/models/slowly/load"))
    while (await get(client, "/modeld/v1/models/slowly"))["load_progress"] == 0:
        await asyncio.sleep(0.01)
    await client.post("/modeld/v1/models/slowly/unload")
    answer = await loading
    assert answer.status == 409 and "unloaded while it loaded" in await answer.text()
    shown = await get(client, "/modeld/v1/models/slowly")
    assert shown["state"] == "unloaded" and shown["reserved_bytes"] == 0


async def test_a_busy_model_is_not_removed(client, add_model):
    await add_model()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "!slow 40"}]}
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
    while (await get(client, "/modeld/v1/models/tiny"))["in_flight"] == 0:
        await asyncio.sleep(0.01)
    refused = await client.delete("/modeld/v1/models/tiny")
    assert refused.status == 409 and "is answering 1 request" in await refused.text()
    assert (await asking).status == 200
    assert (await client.delete("/modeld/v1/models/tiny")).status == 204
    assert (await client.get("/modeld/v1/models/tiny")).status == 404


@pytest.mark.parametrize("config", [Config(models=Models(queue_limit=3))])
async def test_a_full_queue_is_429_with_retry_after(client, add_model):
    await add_model()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "!slow 100"}]}
    running = [
        asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(5)
    ]
    await until_waiting(client, 3)
    refused = await client.post("/v1/chat/completions", json=body)
    assert refused.status == 429 and int(refused.headers["Retry-After"]) > 0
    assert (await refused.json())["error"]["code"] == "queue_full"
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@pytest.mark.parametrize("config", [Config(models=Models(queue_limit=3))])
async def test_more_may_wait_for_what_takes_a_moment(client, add_model):
    """Clients ask for the vectors of all parts of a document at once."""
    await add_model()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "!slow 100000"}]}
    running = [
        asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(2)
    ]
    while {r["state"] for r in (await get(client, "/modeld/v1/requests"))["requests"]} != {
        "running"
    }:
        await asyncio.sleep(0.05)
    vectors = {"model": "tiny", "input": "one"}
    waiting = [asyncio.create_task(client.post("/v1/embeddings", json=vectors)) for _ in range(12)]
    await until_waiting(client, 12)
    for path, asked in (("/v1/embeddings", vectors), ("/v1/chat/completions", body)):
        assert (await client.post(path, json=asked)).status == 429
    for task in running:
        task.cancel()
    assert {(await task).status for task in waiting} == {200}


async def until_waiting(client, number):
    while (await get(client, "/modeld/v1/models/tiny"))["waiting"] < number:
        await asyncio.sleep(0.05)


async def test_health_and_hardware(client):
    assert (await get(client, "/health"))["status"] == "ok"
    facts = await get(client, "/modeld/v1/hardware")
    assert facts["physical_cores"] >= 1 and facts["ram_bytes"] > 10**9
