"""What happens to models and downloads when things come at the wrong moment."""

from __future__ import annotations

import asyncio
import io
import json
import threading

import pytest

from daemon.errors import Stopping
from daemon.models import residency


async def get(client, path):
    response = await client.get(path)
    assert response.status == 200, await response.text()
    return await response.json()


async def until(condition, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


def ask(content, model="tiny", **fields):
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


async def shown(client, model="tiny"):
    return await get(client, f"/modeld/v1/models/{model}")


async def test_a_client_that_stops_reading_holds_no_slot(client, add_model):
    """The engine is done with its answer long before the client has read it."""
    await add_model()
    stalled = [
        await client.post("/v1/chat/completions", json=ask("!words 60000", stream=True))
        for _ in range(2)
    ]
    response = await asyncio.wait_for(
        client.post("/v1/chat/completions", json=ask("still here")), timeout=30
    )
    assert (await response.json())["choices"][0]["message"]["content"] == "still here"

    async def idle():
        return (await shown(client))["in_flight"] == 0

    await until(idle, 30)
    for response in stalled:
        response.close()


async def test_a_load_while_a_model_is_deleted_finds_no_files(
    client, add_model, services, monkeypatch
):
    await add_model()
    drop, go = services.store.drop_model, threading.Event()
    monkeypatch.setattr(services.store, "drop_model", lambda key: go.wait(10) and drop(key))
    deleting = asyncio.create_task(client.delete("/modeld/v1/models/tiny"))

    async def gone():
        return not (await shown(client))["downloaded"]

    await until(gone)
    assert (await client.post("/modeld/v1/models/tiny/load")).status == 404
    # neither does a download begin in a folder that is being removed
    refused = await client.post("/modeld/v1/models/tiny/download")
    assert refused.status == 409 and "being removed" in await refused.text()
    go.set()
    assert (await deleting).status == 204
    assert services.ledger.reservations == {}


async def test_a_client_that_leaves_while_a_model_is_deleted_leaves_nothing_half_done(
    client, add_model, services, monkeypatch
):
    await add_model()
    files = (await shown(client))["files"]
    drop, go, dropped = services.store.drop_model, threading.Event(), threading.Event()

    def slowly(model_id):
        go.wait(10)
        drop(model_id)
        dropped.set()

    monkeypatch.setattr(services.store, "drop_model", slowly)
    deleting = asyncio.create_task(client.delete("/modeld/v1/models/tiny"))

    async def gone():
        return not (await shown(client))["downloaded"]

    await until(gone)
    deleting.cancel()
    await asyncio.gather(deleting, return_exceptions=True)
    go.set()
    assert await asyncio.to_thread(dropped.wait, 10)
    assert services.store.model_dir((await shown(client))["id"]).exists() is False
    assert files and not (await shown(client))["downloaded"]


async def test_a_download_that_cannot_be_recorded_fails_and_says_so(
    client, add_model, services, monkeypatch
):
    model_id = await add_model()
    services.catalog.update(model_id, artifact=None)
    update = services.catalog.update

    def full(key, **changes):
        if "artifact" in changes:
            raise OSError("database or disk is full")
        return update(key, **changes)

    monkeypatch.setattr(services.catalog, "update", full)
    job = services.downloads.start(services.catalog.get(model_id))
    await job.task
    assert job.state == "failed" and "disk is full" in job.error
    monkeypatch.undo()
    job = services.downloads.start(services.catalog.get(model_id))
    await job.task
    assert job.state == "completed"


async def test_a_model_whose_file_was_changed_is_brought_again(client, add_model, tmp_path):
    """The error says to download or import again, so that must work."""
    await add_model()
    path = tmp_path / "tiny.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    refused = await client.post("/modeld/v1/models/tiny/load")
    assert refused.status == 409 and "import the model again" in await refused.text()
    path.write_bytes(whole)  # the same bytes, at another time
    assert (await client.post("/modeld/v1/models/tiny/download")).status == 200

    async def ended():
        (job,) = (await get(client, "/modeld/v1/downloads"))["downloads"]
        return job["state"] == "completed"

    await until(ended)
    assert (await client.post("/modeld/v1/models/tiny/load")).status == 200


async def test_a_load_that_cannot_even_begin_books_nothing(
    client, add_model, services, monkeypatch
):
    await add_model()

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(services.store, "new_scratch", full)
    refused = await client.post("/modeld/v1/models/tiny/load")
    assert refused.status == 502 and "No space left" in await refused.text()
    assert services.ledger.reservations == {}


async def test_a_model_that_never_loads_is_tried_with_growing_delay(client, add_model):
    await add_model("broken", test_load="crash")
    for _ in range(3):
        assert (await client.post("/modeld/v1/models/broken/load")).status == 502
    asked = asyncio.get_running_loop().time()
    assert (await client.post("/modeld/v1/models/broken/load")).status == 502
    assert asyncio.get_running_loop().time() - asked > 0.5


async def test_an_unload_ends_the_requests_that_wait(client, add_model, monkeypatch):
    """Otherwise the first of them would load the model again at once."""
    monkeypatch.setattr(residency, "DRAIN_S", 30.0)
    await add_model()
    body = ask("!slow 250")
    asking = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(6)]

    async def waiting():
        model = await shown(client)
        return model["state"] == "ready" and model["waiting"] == 4

    await until(waiting)
    await client.post("/modeld/v1/models/tiny/unload")
    statuses = sorted(response.status for response in await asyncio.gather(*asking))
    assert statuses == [200, 200, 409, 409, 409, 409]
    assert (await shown(client))["state"] == "unloaded"
    assert (await client.post("/v1/chat/completions", json=ask("again"))).status == 200


async def test_a_request_after_an_unload_of_a_loading_model_loads_it_anew(
    client, add_model, services
):
    model_id = await add_model("slowly", test_load="slow 1")
    loading = asyncio.create_task(client.post("/modeld/v1/models/slowly/load"))

    async def begun():
        return (await shown(client, "slowly"))["load_progress"] > 0

    await until(begun)
    unloading = asyncio.create_task(client.post("/modeld/v1/models/slowly/unload"))
    await services.models._residency.residents[model_id].unload_wanted.wait()
    response = await client.post("/v1/chat/completions", json=ask("hello", model="slowly"))
    assert response.status == 200
    assert (await unloading).status == 200
    assert (await loading).status == 409


async def test_after_close_nothing_is_loaded_or_downloaded(client, add_model, services):
    model_id = await add_model()
    record = services.catalog.get(model_id)
    await services.models.close()
    await services.downloads.close()
    with pytest.raises(Stopping) as stopping:
        await services.models.load(record)
    assert stopping.value.retry_after_s
    with pytest.raises(Stopping):
        services.downloads.start(record)


async def test_a_hopeless_prompt_is_refused_before_it_costs_anything(client, add_model):
    await add_model()
    body = io.BytesIO(json.dumps(ask("a" * 21_000_000)).encode())
    response = await client.post("/v1/chat/completions", data=body)
    assert response.status == 413 and (await response.json())["error"]["message"]


async def test_credentials_in_a_source_are_not_shown(client):
    body = {"source": "https://me:secret@host.example/a/model.gguf?key=secret", "unique": "mine"}
    added = await client.post("/modeld/v1/models", json=body)
    again = await client.post("/modeld/v1/models", json=body | {"source": "https://other/x.gguf"})
    assert (added.status, again.status) == (201, 409)
    for response in (added, again):
        text = await response.text()
        assert "secret" not in text and "host.example/a/model.gguf" in text


async def test_wild_numbers_in_a_pieces_model_are_refused(client):
    model = {"version": "1", "name": "wild", "cloud": False, "type": "SPEED", "usage": "UNKNOWN"}
    for wild in ({"parameters": 1e300}, {"bytes": {"value": -5}}, {"maxTokens": {"total": 1e300}}):
        response = await client.post("/models/create", json=model | wild)
        assert response.status == 500 and next(iter(wild)) in await response.text()
