"""Memory as clients see it: estimates, who holds what, keep-alive, pins, requests and their end."""

from __future__ import annotations

import asyncio
import json

import psutil
import pytest

from daemon.config import Config, Memory
from daemon.models.choice import files_key


@pytest.fixture
def config() -> Config:
    return Config(memory=Memory(limit="500MB", wait_s=5))


async def get(client, path, status=200):
    response = await client.get(path)
    assert response.status == status, await response.text()
    return await response.json()


async def post(client, path, body=None, status=200):
    response = await client.post(path, json=body)
    assert response.status == status, await response.text()
    return await response.json()


def ask(content, model="tiny", **fields):
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


async def shown(client, model="tiny"):
    return await get(client, f"/modeld/v1/models/{model}")


async def until(condition, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def is_unloaded(client, model="tiny"):
    return (await shown(client, model))["state"] == "unloaded"


# what is held, and by whom


async def test_what_is_shown_of_memory_adds_up(client, add_model):
    await add_model("one")
    await add_model("two")
    for name in ("one", "two"):
        await post(client, f"/modeld/v1/models/{name}/load")
    memory = await get(client, "/modeld/v1/memory")
    assert memory["budget_bytes"] == 500_000_000
    assert memory["reserved_bytes"] + memory["unreserved_bytes"] == memory["budget_bytes"]
    models = memory["models"]
    assert {entry["unique"] for entry in models} == {"one", "two"}
    booked = sum(entry["reserved_bytes"] for entry in models)
    assert memory["reserved_bytes"] == booked - memory["shared_bytes"]
    for entry in models:
        assert entry["reserved_bytes"] == max(entry["estimate_bytes"], entry["measured_bytes"])
        assert 0 < entry["in_use_bytes"] <= entry["measured_bytes"]
    parts = ("models_bytes", "daemon_bytes", "others_bytes", "spare_bytes")
    assert sum(memory[part] for part in parts) == memory["ram_bytes"]
    assert memory["models_bytes"] == sum(entry["in_use_bytes"] for entry in models)
    assert memory["others_bytes"] > 0 and memory["critical"] is False
    assert memory["available_bytes"] <= memory["unreserved_bytes"]
    # and it is what processes have, as seen from outside
    pids = {e["unique"]: (await shown(client, e["unique"]))["worker_pid"] for e in models}
    for entry in models:
        own = psutil.Process(pids[entry["unique"]]).memory_full_info().uss
        assert 0.5 * own < entry["in_use_bytes"] < 1.5 * own
    assert memory["daemon_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)


async def test_memory_of_a_load_that_goes_on_is_a_model_s(client, add_model, services):
    await add_model(test_load="slow 6")
    loading = asyncio.create_task(client.post("/modeld/v1/models/tiny/load"))

    async def has_some():
        return (await get(client, "/modeld/v1/memory"))["models_bytes"] > 0

    await until(has_some)
    memory = await get(client, "/modeld/v1/memory")
    (entry,) = memory["models"]
    assert entry["state"] == "loading" and memory["models_bytes"] == entry["in_use_bytes"] > 0
    parts = ("models_bytes", "daemon_bytes", "others_bytes", "spare_bytes")
    assert sum(memory[part] for part in parts) == memory["ram_bytes"]
    assert (await loading).status == 200


async def test_a_model_s_memory_is_told_before_and_after_its_load(client, add_model):
    model_id = await add_model()
    before = await get(client, f"/model/{model_id}")
    assert before["ram"]["value"] > 20_000_000  # what the backend expects
    await post(client, "/modeld/v1/models/tiny/load")
    after, native = await get(client, f"/model/{model_id}"), await shown(client)
    assert after["ram"]["value"] == native["measured_bytes"] > 0


async def test_what_was_measured_corrects_the_next_estimate(client, add_model, services):
    await add_model()
    await post(client, "/v1/chat/completions", ask("hi"))
    await post(client, "/modeld/v1/models/tiny/unload")
    (past,) = services.catalog.measurements(
        files_key(services.catalog.get("tiny").artifact), "reference", "1.0"
    )
    assert past.served and past.peak_bytes > 0
    found = await get(client, "/modeld/v1/models/tiny/estimate")
    assert found["measured"] is True and found["parts"]["correction"] != 0
    assert past.peak_bytes <= found["estimate_bytes"] <= 1.1 * past.peak_bytes + 1


async def test_who_gets_no_memory_is_told_when_to_come_again(client, add_model):
    await add_model("one", test_slot_bytes=200_000_000)
    await add_model("two", test_slot_bytes=200_000_001)  # other bytes, so another model
    await client.patch("/modeld/v1/models/one", json={"pinned": True})
    await post(client, "/v1/chat/completions", ask("hi", "one"))
    response = await client.post("/v1/chat/completions", json=ask("hi", "two"))
    assert response.status == 503 and int(response.headers["Retry-After"]) > 0
    error = (await response.json())["error"]
    assert error["code"] == "insufficient_memory"
    assert "two needs 210 MiB, but only" in error["message"]
    assert "one has 401 MiB (pinned): unpin one (`modeld unpin one`)" in error["message"]
    found = await get(client, "/modeld/v1/models/two/estimate")
    assert found["fits"] == "not now"
    # what can never be is not to be tried again
    await add_model("giant", test_slot_bytes=900_000_000)
    response = await client.post("/v1/chat/completions", json=ask("hi", "giant"))
    assert response.status == 503 and response.headers["x-should-retry"] == "false"
    assert "Retry-After" not in response.headers
    assert (await get(client, "/modeld/v1/models/giant/estimate"))["fits"] == "no"


async def test_all_models_are_unloaded_at_once(client, add_model):
    for name in ("one", "two"):
        await add_model(name)
        await post(client, f"/modeld/v1/models/{name}/load")
    response = await client.post("/models/unload")
    assert response.status == 204
    memory = await get(client, "/modeld/v1/memory")
    assert memory["models"] == [] and memory["reserved_bytes"] == 0
    assert await is_unloaded(client, "one") and await is_unloaded(client, "two")


# what was not as it was asked for


async def test_a_model_that_was_loaded_with_less_says_so(client, add_model):
    await add_model(test_slot_bytes=300_000_000)
    notice = "for want of memory it has room for 1 at once instead of 2"
    response = await client.post("/v1/chat/completions", json=ask("hi"))
    assert response.headers["X-Modeld-Notice"] == (await response.json())["notice"] == notice
    for path, body in (
        ("/v1/embeddings", {"model": "tiny", "input": "hi"}),
        ("/modeld/v1/models/tiny/classify", {"input": "hi"}),
        ("/modeld/v1/models/tiny/load", {}),
    ):
        response = await client.post(path, json=body)
        assert response.headers["X-Modeld-Notice"] == notice
    assert (await shown(client))["reduced"] == notice


async def test_a_stream_whose_headers_are_out_says_it_at_its_end(client, add_model):
    await add_model(test_slot_bytes=300_000_000, test_load="slow 4")
    async with client.post("/v1/chat/completions", json=ask("hi", stream=True)) as response:
        assert "X-Modeld-Notice" not in response.headers  # nobody knew yet
        text = (await response.read()).decode()
    last = [line for line in text.splitlines() if line.startswith("data: {")][-1]
    assert "instead of 2" in json.loads(last.removeprefix("data: "))["notice"]


async def test_a_stream_that_fails_late_says_when_to_come_again(client, add_model):
    for name in ("one", "two"):
        await add_model(name, test_slot_bytes=400_000_000)
    async with client.post(
        "/v1/chat/completions", json=ask("!slow 900", "one", stream=True)
    ) as one:
        await one.content.readline()
        async with client.post("/v1/chat/completions", json=ask("hi", "two", stream=True)) as two:
            assert two.status == 200
            text = (await two.read()).decode()
    last = [line for line in text.splitlines() if line.startswith("data: {")][-1]
    found = json.loads(last.removeprefix("data: "))
    assert found["error"]["code"] == "insufficient_memory" and found["retry_after_s"] > 0


async def test_an_answer_that_the_context_ends_says_so(client, add_model):
    await add_model(llama_context_length=1024)
    response = await client.post("/v1/chat/completions", json=ask("!fill"))
    answer = await response.json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["notice"] == response.headers["X-Modeld-Notice"]
    assert "the context of 1024 tokens is full" in answer["notice"]
    answer = await post(client, "/v1/chat/completions", ask("!fill", max_tokens=5))
    assert answer["choices"][0]["finish_reason"] == "length" and "notice" not in answer


async def test_an_answer_gets_the_context_that_it_may_need(client, add_model):
    await add_model()
    await post(client, "/v1/chat/completions", ask("hi"))
    assert (await shown(client))["context_length"] == 1024
    answer = await post(client, "/v1/chat/completions", ask("!fill", max_tokens=1500))
    assert answer["usage"]["completion_tokens"] == 1500 and "notice" not in answer
    assert (await shown(client))["context_length"] == 2048


# estimates


async def test_an_estimate_says_what_a_load_takes_and_that_it_fits(client, add_model):
    await add_model()
    found = await get(client, "/modeld/v1/models/tiny/estimate?context_length=2048&slots=3")
    assert (found["context_length"], found["slots"]) == (2048, 3)
    assert found["estimate_bytes"] == sum(found["parts"].values())
    assert found["backend"] == "reference" and found["fits"] == "now"
    assert found["budget_bytes"] == 500_000_000 and found["download"] is None
    assert (await shown(client))["state"] == "unloaded"


async def test_an_estimate_of_a_source_needs_no_download_and_leaves_nothing(
    client, add_model, tmp_path
):
    await add_model()
    path = (tmp_path / "tiny.gguf").rename(tmp_path / "other.gguf")
    before = await get(client, "/modeld/v1/models")
    found = await post(client, "/modeld/v1/estimate", {"source": str(path), "slots": 1})
    assert found["estimate_bytes"] > 20_000_000 and found["downloaded"] is False
    assert found["download"]["size_bytes"] == path.stat().st_size
    assert await get(client, "/modeld/v1/models") == before


async def test_what_an_estimate_found_is_shown_before_the_download(client, add_model, tmp_path):
    await add_model()
    path = (tmp_path / "tiny.gguf").rename(tmp_path / "other.gguf")
    added = await post(client, "/modeld/v1/models", {"source": str(path)}, status=201)
    assert added["estimate_bytes"] == 0
    found = await get(client, "/modeld/v1/models/other/estimate")
    assert (await shown(client, "other"))["estimate_bytes"] == found["estimate_bytes"] > 0
    pieces = await get(client, f"/model/{added['id']}")
    assert pieces["ram"]["value"] == found["estimate_bytes"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("context_length=0", "context_length"),
        ("context_length=2049", "context_length"),
        ("slots=x", "slots"),
        ("slots=0", "slots"),
        ("nope=1", "nope"),
    ],
)
async def test_a_wrong_question_is_named(client, add_model, query, field):
    await add_model()
    answer = await get(client, f"/modeld/v1/models/tiny/estimate?{query}", status=400)
    assert field in answer["error"]["message"]


# keep-alive and pins


async def test_keep_alive_is_understood_as_ollama_writes_it(client, add_model):
    await add_model()
    await post(client, "/v1/chat/completions", ask("hi", keep_alive=0))
    await until(lambda: is_unloaded(client))
    await post(client, "/v1/chat/completions", ask("hi", keep_alive="10m"))
    assert 590 < (await shown(client))["unloads_in_s"] <= 600
    await post(client, "/v1/chat/completions", ask("hi", keep_alive=-1))
    assert (await shown(client))["unloads_in_s"] is None
    await post(client, "/v1/embeddings", {"model": "tiny", "input": "hi", "ttl": 120})
    assert 110 < (await shown(client))["unloads_in_s"] <= 120
    answer = await post(client, "/v1/chat/completions", ask("hi", keep_alive="soon"), status=400)
    assert answer["error"]["param"] == "keep_alive"
    await post(client, "/v1/chat/completions", ask("hi", keep_alive=1e-9))
    await until(lambda: is_unloaded(client))


@pytest.mark.parametrize(("asked", "kept"), [(4.5e252, f"{4.5e252:.0f}"), (1e-7, "0"), (90, "90")])
async def test_a_keep_alive_of_any_size_is_kept(client, add_model, asked, kept):
    await add_model("tiny")
    response = await client.patch("/modeld/v1/models/tiny", json={"keep_alive": asked})
    assert (response.status, (await response.json())["keep_alive"]) == (200, kept)
    await post(client, "/modeld/v1/models/tiny/load", {})
    assert (await client.get("/modeld/v1/models/tiny")).status == 200


async def test_a_model_has_a_keep_alive_of_its_own(client, add_model):
    await add_model()
    response = await client.patch("/modeld/v1/models/tiny", json={"keep_alive": "0.2s"})
    assert (await response.json())["keep_alive"] == "0.2s"
    await post(client, "/v1/chat/completions", ask("hi"))
    await until(lambda: is_unloaded(client))
    await client.patch("/modeld/v1/models/tiny", json={"keep_alive": ""})
    await post(client, "/v1/chat/completions", ask("hi"))
    assert 290 < (await shown(client))["unloads_in_s"] <= 300


async def test_a_load_stays_and_one_with_a_keep_alive_does_not(client, add_model):
    await add_model()
    assert (await post(client, "/modeld/v1/models/tiny/load"))["unloads_in_s"] is None
    await post(client, "/modeld/v1/models/tiny/unload")
    loaded = await post(client, "/modeld/v1/models/tiny/load", {"keep_alive": 0.2})
    assert loaded["state"] == "ready"
    await until(lambda: is_unloaded(client))


async def test_a_pin_is_kept_and_shown(client, add_model, services):
    model_id = await add_model()
    response = await client.patch("/modeld/v1/models/tiny", json={"pinned": True})
    assert (await response.json())["pinned"] is True
    assert services.catalog.get(model_id).pinned
    await post(client, "/v1/chat/completions", ask("hi", keep_alive=0))
    stays = await shown(client)
    assert (stays["state"], stays["unloads_in_s"]) == ("ready", None)
    await client.patch("/modeld/v1/models/tiny", json={"pinned": False})
    await until(lambda: is_unloaded(client))
    response = await client.patch("/modeld/v1/models/tiny", json={"pined": True})
    assert response.status == 400 and "pined" in await response.text()


# requests


async def test_a_request_can_be_listed_and_killed(client, add_model):
    await add_model()
    async with client.post("/v1/chat/completions", json=ask("!slow 500", stream=True)) as answer:
        await answer.content.readline()
        (found,) = (await get(client, "/modeld/v1/requests"))["requests"]
        assert (found["model"], found["kind"], found["state"]) == ("tiny", "chat", "running")
        assert found["priority"] == "interactive" and found["age_s"] >= found["running_s"] > 0
        response = await client.delete(f"/modeld/v1/requests/{found['id']}")
        assert response.status == 204
        text = (await answer.read()).decode()
        assert "the request was killed" in text and "[DONE]" not in text
    assert (await get(client, "/modeld/v1/requests"))["requests"] == []
    response = await client.delete(f"/modeld/v1/requests/{found['id']}")
    assert response.status == 404 and "modeld ps" in await response.text()


async def test_a_killed_request_that_does_not_stream_is_told_and_not_to_try_again(
    client, add_model
):
    await add_model()
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=ask("!slow 500")))

    async def runs():
        found = (await get(client, "/modeld/v1/requests"))["requests"]
        return bool(found) and found[0]["state"] == "running"

    await until(runs)
    (found,) = (await get(client, "/modeld/v1/requests"))["requests"]
    await client.delete(f"/modeld/v1/requests/{found['id']}")
    response = await asking
    assert response.status == 409 and response.headers["x-should-retry"] == "false"


async def test_priority_is_one_of_two_words(client, add_model):
    await add_model()
    await post(client, "/v1/chat/completions", ask("hi", priority="background"))
    answer = await post(client, "/v1/chat/completions", ask("hi", priority="now"), status=400)
    assert answer["error"]["param"] == "priority"
    assert "interactive, background" in answer["error"]["message"]


# conversations


async def test_what_was_said_to_a_model_goes_with_it(client, add_model, services, tmp_path):
    await add_model()
    await add_model("copy")  # the same bytes
    for name in ("tiny", "copy"):
        await post(client, "/v1/chat/completions", ask("hi there", name))
        await post(client, f"/modeld/v1/models/{name}/unload")
    kept = services.conversations.size_bytes()
    assert kept > 0
    await client.delete("/modeld/v1/models/tiny")
    assert services.conversations.size_bytes() == kept, "the other one still has them"
    await client.delete("/modeld/v1/models/copy")
    assert services.conversations.size_bytes() == 0
    assert not list((tmp_path / "modeld").rglob("*.kv"))


# longer contexts


async def test_a_request_says_which_context_it_needs(client, add_model):
    await add_model()
    await post(client, "/v1/chat/completions", ask("hi"))
    assert (await shown(client))["context_length"] == 1024
    await post(client, "/v1/chat/completions", ask("hi", context_length=2000))
    assert (await shown(client))["context_length"] == 2000
    answer = await post(client, "/v1/chat/completions", ask("hi", context_length=3000), status=400)
    assert answer["error"]["param"] == "context_length" and "2048" in answer["error"]["message"]
