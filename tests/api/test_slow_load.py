"""A model that takes over 3 s to load: clients are kept informed as far as their protocol can."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from daemon.models import ModelState

MESSAGES = [{"role": "user", "content": "one two"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "stream": True}
CASES = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "tiny", "prompt": "one two", "stream": True}),
    ("/v1/responses", {"model": "tiny", "input": "one two", "stream": True}),
    ("/v1/messages", CHAT | {"max_tokens": 8}),
]


@pytest.mark.alone
@pytest.mark.parametrize(("path", "body"), CASES)
async def test_events_begin_with_comments(client, add_model, services, path, body):
    model_id = await add_model("tiny", test_load="slow 6")
    began = time.monotonic()
    async with client.post(path, json=body) as response:
        first = await response.content.readline()
        assert response.status == 200 and first.startswith(b": still waiting")
        assert time.monotonic() - began > 2.5
        assert services.models.status(model_id).state is ModelState.LOADING
        text = (await response.content.read()).decode()
    assert "one" in text and " two" in text


async def test_lines_wait_and_native_events_tell_how_far_the_load_is(client, add_model):
    await add_model("tiny", test_load="slow 4")
    async with client.ws_connect("/modeld/v1/events") as events:
        asked = asyncio.create_task(client.post("/api/chat", json=CHAT))
        progress: list[float] = []
        async with asyncio.timeout(20):
            while not asked.done() or not progress:
                event = await events.receive_json()
                model = event.get("model") or {}
                if event["type"] == "model" and model.get("state") == "loading":
                    progress.append(model["load_progress"])
                if event["type"] == "model" and model.get("state") == "ready":
                    break
        response = await asked
        pieces = [json.loads(line) for line in (await response.text()).splitlines()]
    assert "".join(piece["message"]["content"] for piece in pieces) == "one two"
    assert any(0 < each < 1 for each in progress) and progress == sorted(progress)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("path", "body"), [*CASES, ("/api/chat", CHAT)])
async def test_a_load_that_fails_is_an_error_of_the_surface(client, add_model, path, body):
    await add_model("tiny", test_load="fail")
    response = await client.post(path, json=body)
    answer = await response.json()
    assert response.status == 502
    said = answer["error"] if path == "/api/chat" else answer["error"]["message"]
    assert "this model was made to fail" in said
