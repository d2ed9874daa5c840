"""What `/openapi.json` says of the pieces of streams is true of every piece that is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from described import check

PROMPT = "!words 3"
FUNCTION = {"name": "weather", "parameters": {"type": "object"}}
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}]
RESPONSES_TOOLS = [{"type": "function", **FUNCTION}]
MESSAGES_TOOLS = [{"name": "weather", "input_schema": {"type": "object"}}]
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
SAID = ("!words 3", "!think yes", "!crash 2")


def asks(path: str, text: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """A request that streams, in the form of its surface."""
    body: dict[str, Any] = {"model": "tiny", "stream": True, **fields}
    if path == "/v1/responses":
        body["input"] = text
    elif path in ("/v1/completions", "/api/generate"):
        body["prompt"] = text
    else:
        body["messages"] = [{"role": "user", "content": text}]
    if path == "/v1/messages":
        body["max_tokens"] = 64
    return path, body


CASES = [
    *(
        asks(path, text)
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat")
        for text in SAID
    ),
    asks("/api/generate", "!think yes"),
    asks("/api/generate", "!crash 2"),
    asks("/v1/completions", "one two", logprobs=2),
    asks("/v1/chat/completions", "!call weather", tools=CHAT_TOOLS),
    asks("/v1/responses", "!call weather", tools=RESPONSES_TOOLS),
    asks("/v1/messages", "!call weather", tools=MESSAGES_TOOLS),
    asks("/api/chat", "!call weather", tools=CHAT_TOOLS),
    asks("/v1/chat/completions", PROMPT, n=2, stream_options={"include_usage": True}, **LOGPROBS),
    asks("/v1/responses", PROMPT, top_logprobs=2),
    asks("/api/chat", PROMPT, **LOGPROBS),
    ("/api/pull", {"model": "tiny"}),
]


def pieces_of(text: str, content_type: str) -> list[dict[str, Any]]:
    if content_type == "application/x-ndjson":
        return [json.loads(line) for line in text.splitlines()]
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(("path", "body"), CASES, ids=lambda value: str(value)[:60])
async def test_each_piece_is_as_described(client, add_model, path, body):
    await add_model("tiny", tokenizer_chat_template="tools tool_calls <think>")
    document = await (await client.get("/openapi.json")).json()
    response = await client.post(path, json=body)
    text = await response.text()
    assert response.status == 200, text
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    schema = content[response.content_type]["x-itemSchema"]
    pieces = pieces_of(text, response.content_type)
    assert pieces
    for piece in pieces:
        check(piece, schema, document)
