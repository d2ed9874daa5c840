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


RESPONSE = {"model": "tiny", "input": "one"}
MESSAGES = {"model": "tiny", "max_tokens": 8, "messages": CHAT["messages"]}
COUNTED = {"model": "tiny", "messages": CHAT["messages"]}
QUESTION = {"query": "one", "relevant": {"iterable": []}}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/responses", RESPONSE, 409),
        ("/v1/responses/input_tokens", RESPONSE, 409),
        ("/v1/messages", MESSAGES, 409),
        ("/v1/messages/count_tokens", COUNTED, 409),
        ("/api/chat", CHAT, 409),
        ("/api/generate", {"model": "tiny", "prompt": "one"}, 409),
        ("/api/embed", {"model": "tiny", "input": "one"}, 409),
        ("/api/embeddings", {"model": "tiny", "prompt": "one"}, 409),
        ("/qgpt/question", QUESTION, 500),
    ],
)
async def test_every_surface_says_so_in_its_own_form(client, add_model, path, body, status):
    await add_model("tiny", tokenizer_chat_template="x")
    refused = await client.post(path, json=body)
    assert refused.status == status
    if path.startswith("/qgpt/"):
        said = await refused.text()
        assert refused.content_type == "text/plain"
    else:
        answer = await refused.json()
        said = answer["error"] if path.startswith("/api/") else answer["error"]["message"]
        assert (answer.get("type") == "error") is path.startswith("/v1/messages")
    assert "modeld load tiny" in said and "load_on_demand" in said
    assert (await client.post("/modeld/v1/models/tiny/load")).status == 200
    assert (await client.post(path, json=body)).status == 200


async def test_a_turn_of_a_pieces_conversation_says_so_too(client, add_model):
    await add_model("tiny", tokenizer_chat_template="x")
    async with client.ws_connect("/qgpt/stream") as socket:
        await socket.send_json({"question": QUESTION})
        frame = await socket.receive_json(timeout=20)
        assert (frame["status"], frame["statusCode"]) == ("FAILED", 409)
        assert "modeld load tiny" in frame["errorMessage"]
        assert (await client.post("/modeld/v1/models/tiny/load")).status == 200
        await socket.send_json({"question": QUESTION})
        while (frame := await socket.receive_json(timeout=20))["status"] == "IN-PROGRESS":
            pass
        assert frame["status"] == "COMPLETED"
