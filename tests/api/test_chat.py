"""POST /v1/chat/completions against real workers."""

from __future__ import annotations

import asyncio
import json

from aiohttp import ClientResponse


def ask(content: str, model: str = "tiny", **fields):
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


async def events(response: ClientResponse) -> list:
    """The data of every event of a stream; comments are left out."""
    text = await response.text()
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def text_of(chunks: list) -> str:
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


async def test_an_answer_has_text_reason_and_usage(client, add_model):
    await add_model()
    response = await client.post("/v1/chat/completions", json=ask("one two three"))
    answer = await response.json()
    assert response.status == 200
    message = {"role": "assistant", "content": "one two three", "refusal": None}
    assert answer["choices"][0]["message"] == message
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["total_tokens"] == 6
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert set(answer["timings"]) == {"prompt_ms", "predicted_ms"}


async def test_a_stream_says_the_same_and_ends_with_done(client, add_model):
    await add_model()
    body = ask("one two three", stream=True, stream_options={"include_usage": True})
    response = await client.post("/v1/chat/completions", json=body)
    chunks = await events(response)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert chunks.pop() == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert text_of(chunks) == "one two three"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3


async def test_max_tokens_ends_with_length(client, add_model):
    await add_model()
    response = await client.post("/v1/chat/completions", json=ask("a b c", max_tokens=2))
    choice = (await response.json())["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == "a b"


async def test_an_error_before_the_first_delta_keeps_its_status(client, add_model):
    await add_model()
    for stream in (False, True):
        body = ask("!error", stream=stream)
        response = await client.post("/v1/chat/completions", json=body)
        error = (await response.json())["error"]
        assert response.status == 400
        assert error["code"] == "invalid_request" and "made to fail" in error["message"]


async def test_a_crash_in_a_stream_is_an_error_event_and_no_done(client, add_model):
    await add_model()
    response = await client.post("/v1/chat/completions", json=ask("!crash 4", stream=True))
    chunks = await events(response)
    assert response.status == 200
    error = chunks.pop()["error"]
    assert error["code"] == "worker_crashed" and "SIGKILL" in error["message"]
    assert set(error) == {"message", "type", "code", "param"}
    assert text_of(chunks) == "word0 word1 word2 word3"
    shown = await (await client.get("/modeld/v1/models/tiny")).json()
    assert shown["state"] == "failed" and "SIGKILL" in shown["last_error"]
    again = await client.post("/v1/chat/completions", json=ask("back again"))
    assert (await again.json())["choices"][0]["message"]["content"] == "back again"
    shown = await (await client.get("/modeld/v1/models/tiny")).json()
    assert shown["state"] == "ready" and shown["last_error"] is None


async def test_requests_that_wait_outlive_the_crash_of_others(client, add_model):
    """Two slots: one request crashes the worker while others have not begun."""
    await add_model()
    crash = client.post("/v1/chat/completions", json=ask("!crash 50"))
    others = [client.post("/v1/chat/completions", json=ask(f"number {n}")) for n in range(8)]
    first, *rest = await asyncio.gather(crash, *others)
    assert first.status == 502
    answered = [r for r in rest if r.status == 200]
    # at most the one that shared the crashed worker's other slot went with it
    assert len(answered) >= len(rest) - 1
    for response in rest:
        text = await response.text()
        assert response.status == 200 or "SIGKILL" in text


async def test_many_requests_for_an_unloaded_model_load_it_once(client, add_model, services):
    await add_model("slowly", test_load="slow 0.5")
    loads = []
    loader = services.models._residency._loader
    start = loader.load

    async def counted(record, watch, wish):
        loads.append(record.unique)
        return await start(record, watch, wish)

    loader.load = counted
    bodies = [ask("the same", model="slowly") for _ in range(50)]
    responses = await asyncio.gather(
        *(client.post("/v1/chat/completions", json=body) for body in bodies)
    )
    texts = {(await r.json())["choices"][0]["message"]["content"] for r in responses}
    assert texts == {"the same"} and loads == ["slowly"]
    shown = await (await client.get("/modeld/v1/models/slowly")).json()
    assert shown["in_flight"] == 0


async def test_a_waiter_that_leaves_does_not_end_the_load(client, add_model):
    await add_model("slowly", test_load="slow 0.5")
    leaves = asyncio.create_task(client.post("/v1/chat/completions", json=ask("x", model="slowly")))
    await asyncio.sleep(0.1)
    leaves.cancel()
    response = await client.post("/v1/chat/completions", json=ask("y", model="slowly"))
    assert response.status == 200


async def test_a_client_that_leaves_frees_its_slot(client, add_model, services):
    await add_model()
    for _ in range(5):
        response = await client.post("/v1/chat/completions", json=ask("!slow 10000", stream=True))
        await response.content.readline()
        response.close()
    response = await client.post("/v1/chat/completions", json=ask("still here"))
    assert (await response.json())["choices"][0]["message"]["content"] == "still here"
    deadline = asyncio.get_running_loop().time() + 5
    while (await (await client.get("/modeld/v1/models/tiny")).json())["in_flight"]:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


async def test_a_long_load_keeps_the_client_waiting_with_comments(client, add_model):
    await add_model("slowly", test_load="slow 3.5")
    body = ask("hello", model="slowly", stream=True)
    response = await client.post("/v1/chat/completions", json=body)
    assert (await response.content.readline()).startswith(b": ")
    chunks = await events(response)
    assert chunks[-1] == "[DONE]" and text_of(chunks[:-1]) == "hello"


async def test_a_load_that_fails_says_why(client, add_model):
    await add_model("broken", test_load="fail")
    response = await client.post("/v1/chat/completions", json=ask("x", model="broken"))
    assert response.status == 502
    assert "made to fail" in (await response.json())["error"]["message"]
    shown = await (await client.get("/modeld/v1/models/broken")).json()
    assert shown["state"] == "failed" and "made to fail" in shown["last_error"]
    assert shown["reserved_bytes"] == 0 and shown["worker_pid"] is None


async def test_a_load_that_crashes_says_how_and_its_last_words(client, add_model):
    await add_model("crashes", test_load="crash")
    response = await client.post("/v1/chat/completions", json=ask("x", model="crashes"))
    message = (await response.json())["error"]["message"]
    assert response.status == 502 and "SIGSEGV" in message and "about to crash" in message


async def test_unknown_model_and_model_without_files(client):
    response = await client.post("/v1/chat/completions", json=ask("x", model="nobody"))
    assert response.status == 404
    assert (await response.json())["error"]["code"] == "model_not_found"
    body = ask("x", model="smollm2:135m-instruct-q4_1")
    response = await client.post("/v1/chat/completions", json=body)
    error = (await response.json())["error"]
    assert response.status == 404 and error["code"] == "model_not_downloaded"
    assert "modeld pull smollm2:135m-instruct-q4_1" in error["message"]


async def test_wrong_bodies_name_the_field(client, add_model):
    await add_model()
    for fields, param in (
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_k": -1}, "top_k"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[...].content"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[...].role"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"n": 17}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ):
        response = await client.post("/v1/chat/completions", json=ask("x") | fields)
        error = (await response.json())["error"]
        assert response.status == 400, fields
        assert error["param"] is not None and error["param"].startswith(param[:8]), error
        assert error["message"]
    for nonsense in (b'{"model": ', b"[" * 100_000, b"\xff", b""):
        response = await client.post("/v1/chat/completions", data=nonsense)
        assert response.status == 400, nonsense[:10]
    response = await client.post("/v1/chat/completions", data=b'{"model": ')
    assert response.status == 400
    assert "not JSON" in (await response.json())["error"]["message"]


async def test_models_lists_only_what_can_answer(client, add_model):
    await add_model()
    listed = await (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert listed["data"][0]["object"] == "model"
    alone = await client.get("/v1/models/tiny")
    assert await alone.json() == listed["data"][0]
    for name, words in (("smollm2:135m-instruct-q4_1", "`modeld pull"), ("nobody", "nobody")):
        absent = await client.get(f"/v1/models/{name}")
        assert absent.status == 404 and words in (await absent.json())["error"]["message"]


async def test_an_unknown_path_is_a_404_in_the_surface_s_form(client):
    response = await client.get("/v1/nothing")
    assert response.status == 404
    assert "/v1/nothing" in (await response.json())["error"]["message"]
    response = await client.get("/v1/chat/completions")
    assert response.status == 405


async def test_a_model_that_crashes_often_is_loaded_with_growing_delay(client, add_model):
    """Two crashes are free; after the third within a minute the next load waits a second."""
    await add_model()
    for _ in range(3):
        response = await client.post("/v1/chat/completions", json=ask("!crash 1"))
        assert response.status == 502
    clock = asyncio.get_running_loop().time
    asked = clock()
    response = await client.post("/v1/chat/completions", json=ask("hello"))
    assert response.status == 200 and 0.5 < clock() - asked < 10


async def test_an_unload_ends_the_wait_for_a_model_that_crashes_often(client, add_model):
    await add_model()
    for _ in range(5):
        await client.post("/v1/chat/completions", json=ask("!crash 1"))
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=ask("hello")))
    while (await (await client.get("/modeld/v1/models/tiny")).json())["state"] != "loading":
        await asyncio.sleep(0.01)
    asked = asyncio.get_running_loop().time()
    await client.post("/modeld/v1/models/tiny/unload")
    response = await asking
    assert response.status == 409 and asyncio.get_running_loop().time() - asked < 2
