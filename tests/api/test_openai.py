"""The OpenAI surface on the reference backend: tools, schemas, logprobs, completions, vectors."""

from __future__ import annotations

import ast
import base64
import json
import struct

import pytest

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def say(content, **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


@pytest.fixture
async def model(add_model):
    await add_model()


async def post(client, path, body):
    response = await client.post(path, json=body)
    return response.status, await response.json()


async def events(client, body):
    response = await client.post("/v1/chat/completions", json=body | {"stream": True})
    text = await response.text()
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]", text
    return [json.loads(item) for item in data]


# tools


async def test_a_call_is_whole_in_an_answer(client, model):
    _, answer = await post(client, "/v1/chat/completions", say("!call weather", tools=[TOOL]))
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert call == {"id": "call_1", "type": "function", "function": function}


async def test_a_call_streams_in_pieces_of_which_the_first_has_id_and_name(client, model):
    chunks = await events(client, say("!call weather", tools=[TOOL]))
    pieces = [piece for c in chunks for piece in c["choices"][0]["delta"].get("tool_calls", ())]
    assert pieces[0]["id"] == "call_1" and pieces[0]["function"]["name"] == "weather"
    assert not any("id" in piece for piece in pieces[1:])
    assert "".join(p["function"]["arguments"] for p in pieces) == '{"city": "Paris"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def shape(client, **fields):
    """What of the request reached the backend."""
    _, answer = await post(client, "/v1/chat/completions", say("!shape", **fields))
    names = ("tools", "tool_choice", "tool_name", "schema", "grammar", "logit_bias")
    return dict(
        zip(names, ast.literal_eval(answer["choices"][0]["message"]["content"]), strict=True)
    )


async def test_what_a_request_asks_for_reaches_the_backend(client, model):
    plain = await shape(client)
    assert plain["tools"] == [] and plain["tool_choice"] == "auto" and plain["schema"] is None
    named = await shape(
        client, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}
    )
    assert (named["tools"], named["tool_choice"]) == (["weather"], "function")
    assert named["tool_name"] == "weather"
    assert (await shape(client, tools=[TOOL], tool_choice="required"))["tool_choice"] == "required"
    assert (await shape(client, tools=[TOOL], tool_choice="none"))["tools"] == []
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert (await shape(client, response_format=given))["schema"] == schema
    assert (await shape(client, response_format={"type": "json_object"}))["schema"] == {}
    assert (await shape(client, response_format={"type": "text"}))["schema"] is None
    assert (await shape(client, grammar="root ::= x"))["grammar"] == "root ::= x"
    assert (await shape(client, logit_bias={"7": -100}))["logit_bias"] == {7: -100.0}


async def test_a_conversation_with_calls_and_their_results_is_understood(client, model):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    answered = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    body = {
        "model": "tiny",
        "messages": [
            {"role": "user", "content": "?"},
            answered,
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ],
    }
    status, answer = await post(client, "/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "sunny"


# log-probabilities


async def test_logprobs_come_with_every_token(client, model):
    body = say("one two", logprobs=True, top_logprobs=2)
    _, answer = await post(client, "/v1/chat/completions", body)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["one", " two"]
    assert entries[0]["bytes"] == list(b"one") and len(entries[0]["top_logprobs"]) == 2
    chunks = await events(client, body)
    streamed = [
        entry["token"]
        for c in chunks
        for entry in (c["choices"][0].get("logprobs") or {}).get("content", ())
    ]
    assert streamed == ["one", " two"]
    _, plain = await post(client, "/v1/chat/completions", say("one two"))
    assert "logprobs" not in plain["choices"][0]


# images


async def test_images_are_passed_on_and_only_as_data(client, model):
    for url, status in ((PIXEL, 200), ("http://127.0.0.1/x.png", 400), ("file:///etc/passwd", 400)):
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "what is it"},
        ]
        body = say(content)
        body["messages"].append({"role": "user", "content": "seen"})
        found, answer = await post(client, "/v1/chat/completions", body)
        assert found == status, answer
        if status == 400:
            assert "data URL" in answer["error"]["message"]


async def test_brackets_of_a_grammar_are_not_nested_for_ever(client, model):
    grammar = f"root ::= {'(' * 201}x{')' * 201}"
    status, answer = await post(client, "/v1/chat/completions", say("x", grammar=grammar))
    assert status == 400 and answer["error"]["param"] == "grammar"
    wide = "root ::= " + "(x) " * 1000
    status, _ = await post(client, "/v1/chat/completions", say("x", grammar=wide))
    assert status == 200


# completions


async def test_a_text_is_completed(client, model):
    body = {"model": "tiny", "prompt": "once upon", "max_tokens": 5, "logprobs": 1}
    status, answer = await post(client, "/v1/completions", body)
    assert status == 200 and answer["object"] == "text_completion"
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("once upon", "stop")
    assert choice["logprobs"]["tokens"] == ["once upon"]
    assert choice["logprobs"]["text_offset"] == [0]
    assert answer["usage"]["prompt_tokens"] == 2
    streamed = await client.post("/v1/completions", json=body | {"stream": True})
    assert "once upon" in await streamed.text()


async def test_a_task_that_the_model_does_not_have_is_named(client, model):
    body = {"model": "tiny", "prompt": "a", "suffix": "b"}
    status, answer = await post(client, "/v1/completions", body)
    assert status == 400 and "can't do infill, only chat, complete" in answer["error"]["message"]


# vectors


async def test_vectors_as_numbers_and_as_base64_are_the_same(client, model):
    body = {"model": "tiny", "input": ["a b", "abc"]}
    _, numbers = await post(client, "/v1/embeddings", body)
    _, packed = await post(client, "/v1/embeddings", body | {"encoding_format": "base64"})
    assert [entry["index"] for entry in numbers["data"]] == [0, 1]
    for as_numbers, as_text in zip(numbers["data"], packed["data"], strict=True):
        raw = base64.b64decode(as_text["embedding"])
        assert list(struct.unpack("<3f", raw)) == as_numbers["embedding"]
    assert numbers["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_one_text_and_fewer_dimensions(client, model):
    body = {"model": "tiny", "input": "abc", "dimensions": 2}
    _, answer = await post(client, "/v1/embeddings", body)
    assert len(answer["data"]) == 1 and len(answer["data"][0]["embedding"]) == 2
    status, answer = await post(client, "/v1/embeddings", body | {"dimensions": 9})
    assert status == 400 and "dimensions is 9" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [1]}, "input[0]"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/completions", {"prompt": "a", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt"),
    ],
)
async def test_wrong_fields_are_named(client, model, path, body, param):
    status, answer = await post(client, path, {"model": "tiny"} | body)
    assert status == 400 and answer["error"]["param"] == param, answer


async def test_documents_come_back_in_order_of_their_scores(client, model):
    body = {
        "model": "tiny",
        "query": "red wine",
        "documents": ["green tea", {"text": "red wine"}, "white wine"],
        "return_documents": True,
        "top_n": 2,
    }
    _, answer = await post(client, "/v1/rerank", body)
    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == [(1, 1.0), (2, 0.5)]
    assert answer["results"][0]["document"] == {"text": "red wine"}


async def test_texts_are_labelled(client, model):
    path = "/modeld/v1/models/tiny/classify"
    _, answer = await post(client, path, {"input": ["a" * 25, "a" * 75]})
    assert answer["labels"] == [{"short": 0.75, "long": 0.25}, {"short": 0.25, "long": 0.75}]


# engine options


async def test_options_that_no_backend_has_are_refused_by_name(client, tmp_path):
    body = {"source": str(tmp_path / "x.gguf"), "options": {"n_gpu": 1}}
    status, answer = await post(client, "/modeld/v1/models", body)
    assert status == 400 and answer["error"]["param"] == "options"
    assert "no option 'n_gpu'" in answer["error"]["message"]
