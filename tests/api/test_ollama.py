"""The Ollama surface against real workers."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub

from backends.contract import Delta, Done, ToolCall
from daemon.api.ollama import pull
from daemon.api.ollama.names import resolve, shown
from daemon.api.ollama.views import ChatView
from daemon.config import Config, Downloads
from daemon.errors import ModelNotFound
from daemon.models import ModelState

NANOSECONDS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def ask(content: str, **fields) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


async def lines(response) -> list[dict]:
    assert response.status == 200, await response.text()
    assert response.content_type == "application/x-ndjson"
    return [json.loads(line) for line in (await response.text()).splitlines()]


async def test_an_answer_comes_in_pieces_unless_it_is_asked_for_whole(client, add_model):
    await add_model()
    pieces = await lines(await client.post("/api/chat", json=ask("one two three")))
    assert "".join(piece["message"]["content"] for piece in pieces) == "one two three"
    assert [piece["done"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1]
    assert last["done_reason"] == "stop"
    assert (last["prompt_eval_count"], last["eval_count"]) == (3, 3)
    assert all(isinstance(last[name], int) and last[name] >= 0 for name in NANOSECONDS)
    assert last["total_duration"] >= last["load_duration"] > 0
    assert all(datetime.fromisoformat(piece["created_at"]) for piece in pieces)
    whole = await client.post("/api/chat", json=ask("one two three", stream=False))
    answer = await whole.json()
    assert answer["message"] == {"role": "assistant", "content": "one two three"}
    assert answer["done"] is True and answer["model"] == "tiny"
    generated = {"model": "tiny", "prompt": "one two", "stream": False}
    answer = await (await client.post("/api/generate", json=generated)).json()
    assert answer["response"] == "one two" and "message" not in answer


async def test_clients_see_that_it_is_there(client):
    for method in ("GET", "HEAD"):
        response = await client.request(method, "/")
        assert (response.status, response.content_type) == (200, "text/plain")
        assert await response.text() == ("Ollama is running" if method == "GET" else "")


async def test_a_generate_with_a_system_prompt_images_raw_and_suffix(client, add_model):
    await add_model()
    body = {"model": "tiny", "stream": False}

    async def generated(**fields) -> tuple[int, dict]:
        response = await client.post("/api/generate", json=body | fields)
        return response.status, await response.json()

    status, answer = await generated(prompt="a b", system="be kind now")
    assert status == 200 and answer["prompt_eval_count"] == 5
    status, answer = await generated(prompt="as it is", raw=True)
    assert status == 200 and answer["response"].startswith("as it is")
    status, answer = await generated(prompt="a", suffix="z")
    assert status == 400 and "infill" in answer["error"]
    for field, value in (("system", "x"), ("images", ["iVBORw0KGgo="])):
        status, answer = await generated(prompt="a", raw=True, **{field: value})
        assert status == 400 and answer["error"].startswith(field)
    template = "{{ if .System }}<{{ .System }}> {{ end }}{{ .Prompt }} |{{ .Response }} x"
    status, answer = await generated(prompt="a b", system="be kind", template=template)
    assert status == 200 and answer["response"] == "<be kind> a b |"
    for field, value in (("raw", True), ("images", ["iVBORw0KGgo="])):
        status, answer = await generated(prompt="a", template=template, **{field: value})
        assert status == 400 and "not with" in answer["error"]
    status, answer = await generated(prompt="a", template="{{ range .Messages }}")
    assert status == 400 and answer["error"].startswith("template: ")
    status, answer = await generated(prompt="a", images=["bm8gaW1hZ2U="])
    assert status == 400 and "PNG" in answer["error"]


async def test_options_reach_the_engine_and_wrong_ones_are_named(client, add_model):
    await add_model()
    short = await client.post("/api/chat", json=ask("a b c", options={"num_predict": 2}))
    pieces = await lines(short)
    assert pieces[-1]["done_reason"] == "length" and pieces[-1]["eval_count"] == 2
    for limit in (-1, -2, 0):
        answer = ask("a b c", options={"num_predict": limit}, stream=False)
        found = await (await client.post("/api/chat", json=answer)).json()
        assert found["message"]["content"] == "a b c"
    usual = {"num_gpu": 1, "num_thread": 4, "mirostat": 0, "repeat_last_n": 64, "tfs_z": 1.0}
    assert (await client.post("/api/chat", json=ask("a", options=usual))).status == 200
    for options, field in (
        ({"temperature": 9}, "options.temperature"),
        ({"num_ctx": 0}, "options.num_ctx"),
        ({"warmth": 1}, "options.warmth"),
    ):
        refused = await client.post("/api/chat", json=ask("a", options=options))
        assert refused.status == 400 and field in (await refused.json())["error"]
    for fields in ({"format": "yaml"}, {"think": "hard"}, {"template": "x"}, {"keep_alive": "5x"}):
        refused = await client.post("/api/chat", json=ask("a", **fields))
        assert refused.status == 400 and next(iter(fields)) in (await refused.json())["error"]


async def test_the_context_is_the_least_there_must_be_and_never_more_than_the_model_has(
    client, add_model
):
    await add_model()  # it has 2048
    for wanted, has in ((100, 100), (1500, 1500), (100_000, 2048)):
        asked = ask("a", options={"num_ctx": wanted}, stream=False)
        assert (await client.post("/api/chat", json=asked)).status == 200
        (running,) = (await (await client.get("/api/ps")).json())["models"]
        assert running["context_length"] == has


async def test_formats_tools_and_their_results(client, add_model):
    await add_model()
    shape = await client.post("/api/chat", json=ask("!shape", format="json", stream=False))
    assert ", {}, " in (await shape.json())["message"]["content"]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    shape = await client.post("/api/chat", json=ask("!shape", format=schema, stream=False))
    assert "integer" in (await shape.json())["message"]["content"]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    for stream in (True, False):
        asked = ask("!call weather", tools=[tool], stream=stream)
        response = await client.post("/api/chat", json=asked)
        pieces = await lines(response) if stream else [await response.json()]
        (said,) = [piece["message"] for piece in pieces if "tool_calls" in piece["message"]]
        (call,) = said["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert call["function"]["arguments"] == {"city": "Paris"}
    back = [
        {"role": "user", "content": "weather?"},
        said,
        {"role": "tool", "tool_name": "weather", "content": "it rains"},
    ]
    answer = await client.post(
        "/api/chat", json={"model": "tiny", "messages": back, "tools": [tool], "stream": False}
    )
    assert (await answer.json())["message"]["content"] == "it rains"


async def test_nothing_to_say_loads_or_unloads_the_model(client, add_model):
    await add_model()
    for path, nothing in (("/api/generate", {}), ("/api/chat", {"messages": []})):
        loaded = await (await client.post(path, json={"model": "tiny"} | nothing)).json()
        assert (loaded["done"], loaded["done_reason"]) == (True, "load")
        (running,) = (await (await client.get("/api/ps")).json())["models"]
        assert running["name"] == "tiny:latest" and running["size"] > 0
        assert re.fullmatch(r"[0-9a-f]{64}", running["digest"])
        stays = datetime.fromisoformat(running["expires_at"]) - datetime.now(UTC)
        assert timedelta(minutes=4) < stays <= timedelta(minutes=5), "it leaves by itself"
        gone = {"model": "tiny", "keep_alive": 0} | nothing
        unloaded = await (await client.post(path, json=gone)).json()
        assert unloaded["done_reason"] == "unload"
        assert (await (await client.get("/api/ps")).json())["models"] == []


@pytest.mark.parametrize("keep_alive", [-1, "1000000h", 10**15])
async def test_what_stays_for_ever_is_shown_to(client, add_model, keep_alive):
    await add_model()
    await client.post("/api/generate", json={"model": "tiny", "keep_alive": keep_alive})
    (running,) = (await (await client.get("/api/ps")).json())["models"]
    stays = datetime.fromisoformat(running["expires_at"]) - datetime.now(UTC)
    assert stays > timedelta(days=36_000)


async def test_models_have_names_with_and_without_a_tag(client, add_model, services):
    await add_model("tiny")
    await add_model("other:1b-q4")
    tags = (await (await client.get("/api/tags")).json())["models"]
    assert {tag["name"] for tag in tags} == {"tiny:latest", "other:1b-q4"}
    assert all(tag["size"] > 0 and tag["details"]["format"] == "gguf" for tag in tags)
    for name, unique in (
        ("tiny", "tiny"),
        ("tiny:latest", "tiny"),
        ("TINY", "tiny"),
        ("other", "other:1b-q4"),
        ("other:latest", "other:1b-q4"),
    ):
        assert resolve(services.catalog, name).unique == unique
    assert (shown("tiny"), shown("other:1b-q4")) == ("tiny:latest", "other:1b-q4")
    for name, words in (("nobody", "modeld list"), ("smollm2", "135m-instruct-q4_1")):
        with pytest.raises(ModelNotFound, match="not found") as caught:
            resolve(services.catalog, name)
        assert words in caught.value.message
    missing = await client.post("/api/chat", json=ask("a", model="nobody"))
    assert missing.status == 404 and "'nobody' not found" in (await missing.json())["error"]


@pytest.mark.parametrize("loading", [False, True])
async def test_who_unloads_a_model_ends_nobody_elses_answer(client, add_model, services, loading):
    model_id = await add_model("tiny", **({"test_load": "slow 1"} if loading else {}))
    answer = asyncio.create_task(client.post("/api/chat", json=ask("!slow 200", stream=False)))
    wanted = ModelState.LOADING if loading else ModelState.READY
    async with asyncio.timeout(20):
        while services.models.status(model_id).state is not wanted:
            await asyncio.sleep(0.01)
    told = await client.post("/api/generate", json={"model": "tiny", "keep_alive": 0})
    assert (await told.json())["done_reason"] == "unload"
    assert not answer.done()
    said = (await (await answer).json())["message"]["content"]
    assert said.split() == [f"word{number}" for number in range(200)]
    async with asyncio.timeout(20):
        while services.models.status(model_id).state is not ModelState.UNLOADED:
            await asyncio.sleep(0.01)


async def test_whether_and_how_much_to_think_reaches_the_backend(client, add_model):
    await add_model("tiny", tokenizer_chat_template="{% if enable_thinking %}{% endif %}")
    for think, told in ((None, None), (True, "medium"), (False, "none"), ("max", "high")):
        answer = await client.post("/api/chat", json=ask("!shape", think=think, stream=False))
        assert (await answer.json())["message"]["content"].endswith(f"{told!r})")
        body = {"model": "tiny", "prompt": "!shape", "think": think, "stream": False}
        answer = await (await client.post("/api/generate", json=body)).json()
        assert answer["response"].endswith(f"{told!r})")
    await add_model("plain", tokenizer_chat_template="{{ messages }}")
    for think, status in ((None, 200), (False, 200), (True, 400), ("low", 400)):
        asked = ask("a", model="plain", think=think, stream=False)
        answer = await client.post("/api/chat", json=asked)
        assert answer.status == status
    assert (await answer.json())["error"].startswith("think: plain does not think")


async def test_what_clients_of_other_makes_send_is_taken(client, add_model):
    """The fields that Go's client always sends, Home Assistant's numbers, Open WebUI's calls."""
    await add_model("tiny", tokenizer_chat_template="tool_calls")
    shown = {"model": "tiny", "system": "", "template": "", "options": None, "name": ""}
    assert (await client.post("/api/show", json=shown | {"verbose": False})).status == 200
    pulled = {"model": "tiny", "username": "", "password": "", "insecure": False, "name": ""}
    assert (await client.post("/api/pull", json=pulled | {"stream": False})).status == 200
    loaded = await client.post("/api/chat", json={"model": "tiny", "messages": None})
    assert (await loaded.json())["done_reason"] == "load"
    numbers = {"num_ctx": 512.0, "seed": 1.0, "top_k": -1, "num_predict": 2.0, "num_gqa": 1.0}
    answer = await client.post("/api/chat", json=ask("a b c", options=numbers, stream=False))
    assert (await answer.json())["eval_count"] == 2
    called = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": {}}}
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "content": "b", "tool_call_id": "c1"},
    ]
    body = {"model": "tiny", "messages": history, "stream": False}
    assert (await client.post("/api/chat", json=body)).status == 200
    for path in ("/v1/chat/completions", "/api/chat"):
        named = ask("a", model="tiny:latest", stream=False)
        assert (await client.post(path, json=named)).status == 200, "as /api/tags calls it"


async def test_many_texts_at_once_are_all_embedded(client, add_model):
    await add_model()
    body = {"model": "tiny", "input": [f"{'x' * (number % 7 + 1)}" for number in range(5000)]}
    found = await (await client.post("/api/embed", json=body)).json()
    lengths = [round(vector[1] / vector[0]) for vector in found["embeddings"]]
    assert lengths == [len(text) for text in body["input"]]
    assert found["prompt_eval_count"] == 5000


async def test_durations_add_up(client, add_model):
    await add_model("tiny", test_load="slow 1")
    for stream, cold in ((False, True), (False, False), (True, False)):
        answer = await client.post("/api/chat", json=ask("!slow 20", stream=stream))
        cost = json.loads((await answer.text()).splitlines()[-1])
        parts = cost["load_duration"] + cost["prompt_eval_duration"] + cost["eval_duration"]
        assert parts <= cost["total_duration"] * 1.05
        assert (cost["load_duration"] > 0.9e9) is cold, cost
    embed = {"model": "tiny", "input": "a"}
    assert (await (await client.post("/api/embed", json=embed)).json())["load_duration"] == 0
    await client.post("/api/generate", json={"model": "tiny", "keep_alive": 0})
    cost = await (await client.post("/api/embed", json=embed)).json()
    assert 0.9e9 < cost["load_duration"] <= cost["total_duration"]


async def test_what_is_known_of_a_model_is_shown(client, add_model):
    await add_model("tiny", tokenizer_chat_template="{% if tools %}{% endif %}<think>")
    known = await (await client.post("/api/show", json={"model": "tiny"})).json()
    assert known["model_info"]["general.architecture"] == "llama"
    assert known["model_info"]["llama.context_length"] == 2048
    assert {"completion", "embedding", "vision"} <= set(known["capabilities"])
    assert known["details"]["family"] == "llama"
    for body, status in (({}, 400), ({"model": "nobody"}, 404)):
        assert (await client.post("/api/show", json=body)).status == status


async def test_what_is_removed_has_to_be_named_in_full(client, add_model, services):
    await add_model("tiny:7b")
    answer = await client.post("/api/chat", json=ask("one", stream=False))
    assert answer.status == 200, "to be asked, its one tag need not be named"
    refused = await client.request("DELETE", "/api/delete", json={"model": "tiny"})
    assert refused.status == 404 and "its tags are 7b" in (await refused.json())["error"]
    assert services.catalog.get("tiny:7b").downloaded
    assert (await client.request("DELETE", "/api/delete", json={"model": "tiny:7b"})).status == 200


async def test_a_context_of_another_server_is_refused_by_name(client, add_model):
    await add_model()
    body = {"model": "tiny", "prompt": "one", "stream": False, "context": [1, 2]}
    refused = await client.post("/api/generate", json=body)
    assert refused.status == 400 and "context" in (await refused.json())["error"]
    assert (await client.post("/api/generate", json=body | {"context": []})).status == 200


async def test_a_model_that_is_not_here_is_not_found_so_that_clients_pull_it(client):
    absent = {"name": "smollm2:135m-instruct-q4_1"}
    for method, path in (("POST", "/api/show"), ("DELETE", "/api/delete")):
        refused = await client.request(method, path, json=absent)
        assert refused.status == 404 and "not found" in (await refused.json())["error"]


async def test_a_copy_and_its_original_are_removed_apart(client, add_model, services):
    await add_model("tiny")
    copied = await client.post("/api/copy", json={"source": "tiny", "destination": "twin:1"})
    assert copied.status == 200 and await copied.read() == b""
    taken = await client.post("/api/copy", json={"source": "tiny", "destination": "twin:1"})
    assert taken.status == 409
    files = [services.catalog.get(name).artifact.files[0] for name in ("tiny", "twin:1")]
    assert files[0].path != files[1].path and files[0].sha256 == files[1].sha256
    assert (await client.delete("/api/delete", json={"model": "tiny"})).status == 200
    services.store.sweep({record.id for record in services.catalog.all() if record.downloaded})
    answer = await client.post("/api/chat", json=ask("one", model="twin:1", stream=False))
    assert (await answer.json())["message"]["content"] == "one"
    assert (await client.delete("/api/delete", json={"name": "twin:1"})).status == 200
    assert list(services.store.blobs.iterdir()) == []
    gone = await client.delete("/api/delete", json={"model": "tiny"})
    assert gone.status == 404 and "not found" in (await gone.json())["error"]
    absent = {"source": "smollm2:135m-instruct-q4_1", "destination": "x"}
    assert (await client.post("/api/copy", json=absent)).status == 404


async def test_vectors(client, add_model, services):
    model_id = await add_model()
    body = {"model": "tiny", "input": ["one two", "three"], "options": {"num_ctx": 512}}
    found = await (await client.post("/api/embed", json=body)).json()
    expected = await (
        await client.post("/v1/embeddings", json={"model": "tiny", "input": body["input"]})
    ).json()
    assert found["embeddings"] == [entry["embedding"] for entry in expected["data"]]
    assert found["prompt_eval_count"] == 3 and found["total_duration"] > 0
    older = {"model": "tiny", "prompt": "three"}
    vector = await (await client.post("/api/embeddings", json=older)).json()
    assert vector == {"embedding": found["embeddings"][1]}
    for nothing in ({"input": []}, {"input": ""}, {"input": None}, {}):
        await services.models.unload(model_id)
        none = await (await client.post("/api/embed", json={"model": "tiny", **nothing})).json()
        assert none["embeddings"] == [], nothing
        assert services.models.status(model_id).state is ModelState.READY


async def test_what_is_not_done_is_said(client):
    for method, path in (
        ("POST", "/api/create"),
        ("POST", "/api/push"),
        ("POST", "/api/blobs/sha256:0"),
    ):
        response = await client.request(method, path, json={"model": "x"})
        assert response.status == 501 and "modeld" in (await response.json())["error"]
    assert (await client.head("/api/blobs/sha256:0")).status == 501
    assert re.fullmatch(
        r"\d+\.\d+\.\d+", (await (await client.get("/api/version")).json())["version"]
    )


@pytest.mark.usefixtures("patient")
async def test_a_failure_keeps_its_status_before_the_first_piece_and_is_a_line_after(
    client, add_model
):
    await add_model()
    refused = await client.post("/api/chat", json=ask("!error"))
    assert refused.status == 400 and "made to fail" in (await refused.json())["error"]
    crashed = asyncio.create_task(client.post("/api/chat", json=ask("!slow 400")))
    async with asyncio.timeout(20):
        while not (shown := await (await client.get("/modeld/v1/models/tiny")).json())["in_flight"]:
            await asyncio.sleep(0.02)
    response = await crashed
    requests = await (await client.get("/modeld/v1/requests")).json()
    await client.delete(f"/modeld/v1/requests/{requests['requests'][0]['id']}")
    pieces = [json.loads(line) for line in (await response.text()).splitlines()]
    assert pieces[-1] == {"error": "the request was killed"} and not pieces[-2]["done"], shown


MIB = 1024**2
REPO = "owner/tiny-model-GGUF"


@pytest.fixture
def hub(tmp_path):
    path = write_gguf(tmp_path / "big.gguf", tensors=[Tensor(dimensions=(256, 4 * 1024))])
    with LocalHub() as running:
        running.add(REPO, {"tiny-model.Q8_0.gguf": path.read_bytes()})
        yield running


class TestPull:
    @pytest.fixture
    def config(self, hub) -> Config:
        return Config(downloads=Downloads(hub_endpoint=hub.url))

    async def test_a_pull_tells_how_it_goes_on_and_ends_when_the_model_can_be_loaded(
        self, client, hub, services
    ):
        hub.faults = Faults(rate_bytes_s=2 * MIB)
        body = {"model": f"hf.co/{REPO}:Q8_0"}
        told = []
        async with client.post("/api/pull", json=body) as response:
            assert response.content_type == "application/x-ndjson"
            async for line in response.content:
                told.append(json.loads(line))
                if told[-1]["status"] == "success":
                    (tag,) = (await (await client.get("/api/tags")).json())["models"]
                    assert tag["name"] == "tiny-model-gguf:q8_0"
        assert told[0]["status"] == "pulling manifest"
        assert [each["status"] for each in told[-3:]] == [
            "verifying sha256 digest",
            "writing manifest",
            "success",
        ]
        pieces = [each for each in told if "total" in each]
        done = [each.get("completed", 0) for each in pieces]
        (file,) = services.catalog.get("tiny-model-gguf:q8_0").artifact.files
        assert done == sorted(done) and done[-1] == pieces[-1]["total"] == file.size_bytes
        assert len(set(done)) > 3
        assert {each["digest"] for each in pieces} == {f"sha256:{file.sha256}"}
        assert {each["status"] for each in pieces} == {f"pulling {file.sha256[:12]}"}
        for name in (body["model"], f"hf.co/{REPO}:q8_0:latest", f"hf:{REPO}:Q8_0"):
            response = await client.post("/api/show", json={"model": name})
            assert response.status == 200, "it has the name that it was pulled by"
        again = await lines(await client.post("/api/pull", json=body))
        assert again[-1] == {"status": "success"} and len(services.catalog.all()) > 1

    async def test_what_is_known_is_said_again_while_nothing_comes(
        self, client, hub, services, monkeypatch
    ):
        monkeypatch.setattr(pull, "_SILENCE_S", 0.3)
        hub.faults = Faults(stall_at=MIB)
        told = []
        async with asyncio.timeout(20):
            async with client.post("/api/pull", json={"model": f"hf.co/{REPO}"}) as response:
                while len(told) < 3:
                    status = json.loads(await response.content.readline())
                    told += [status["completed"]] if "completed" in status else []
                    told = told if len(set(told)) == 1 else told[-1:]
        assert 0 < told[0] <= MIB
        (job,) = services.downloads.all()
        await services.downloads.cancel(job.model_id)

    async def test_a_pull_as_a_whole_and_by_a_source(self, client, services):
        body = {"name": f"hf:{REPO}/tiny-model.Q8_0.gguf", "stream": False}
        response = await client.post("/api/pull", json=body)
        assert (response.status, await response.json()) == (200, {"status": "success"})
        assert services.catalog.get("tiny-model.q8_0").downloaded

    async def test_a_client_that_leaves_does_not_end_the_download(self, client, hub, services):
        hub.faults = Faults(rate_bytes_s=4 * MIB)
        async with client.post("/api/pull", json={"model": f"hf.co/{REPO}"}) as response:
            await response.content.readline()
        (job,) = services.downloads.all()
        async with asyncio.timeout(20):
            while job.active:
                await asyncio.sleep(0.05)
        assert job.state == "completed"

    async def test_what_goes_wrong_is_told(self, client, services):
        for name, words in (
            ("nobody", "pull model manifest: file does not exist"),
            ("smollm2", "its tags are"),
        ):
            response = await client.post("/api/pull", json={"model": name})
            assert response.status == 404 and words in (await response.json())["error"]
        missing = {"model": "hf.co/owner/none:Q4_0"}
        told = await lines(await client.post("/api/pull", json=missing))
        assert told[-1].keys() == {"error"} and "owner/none" in told[-1]["error"]
        whole = await client.post("/api/pull", json=missing | {"stream": False})
        assert whole.status == 502 and "owner/none" in (await whole.json())["error"]

    async def test_a_download_that_is_cancelled_ends_the_pull(self, client, hub, services):
        hub.faults = Faults(rate_bytes_s=MIB)
        response = await client.post("/api/pull", json={"model": f"hf.co/{REPO}"})
        await response.content.readline()
        (job,) = services.downloads.all()
        await services.downloads.cancel(job.model_id)
        told = [json.loads(line) async for line in response.content]
        assert "canceled" in told[-1]["error"]


def test_a_call_that_the_limit_cut_short_is_left_out_and_the_text_is_not():
    whole, cut = (
        ToolCall(index=index, id=str(index), name="look", arguments=arguments)
        for index, arguments in enumerate(('{"city": "Paris"}', '{"ci'))
    )
    done = Done(finish_reason="length")
    said = Delta(content="Let me look.", tool_calls=(whole, cut))
    answer = ChatView("tiny", thinks=True).whole([(said, done)])
    assert answer["message"]["content"] == "Let me look." and answer["done_reason"] == "length"
    assert [call["id"] for call in answer["message"]["tool_calls"]] == ["0"]
    view = ChatView("tiny", thinks=True)
    view.piece(said, 0)
    *_, calls, last = view.end(done, 0)
    assert [call["id"] for call in calls["message"]["tool_calls"]] == ["0"]
    assert last["done"] and last["done_reason"] == "length"
