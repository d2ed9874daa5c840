"""The OpenAI surface on the reference backend: tools, schemas, logprobs, completions, vectors."""

from __future__ import annotations

import ast
import base64
import json
import struct

import msgspec
import pytest

from daemon.api.openai.messages import whole
from daemon.api.openai.types import ChatBody

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
    names = ("tools", "tool_choice", "tool_name", "schema", "grammar", "logit_bias", "effort")
    return dict(
        zip(names, ast.literal_eval(answer["choices"][0]["message"]["content"]), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ("", "{}"),
        ('{"a": ', '{"arguments": "{\\"a\\": "}'),
        ("[1]", '{"arguments": "[1]"}'),
    ],
)
def test_calls_that_were_cut_short_come_back_as_objects(arguments, told):
    assert whole(arguments) == told
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    body = {"model": "tiny", "messages": [{"role": "assistant", "tool_calls": [call]}]}
    (message,) = msgspec.convert(body, ChatBody).to_backend().messages
    assert message["tool_calls"][0]["function"]["arguments"] == told


async def test_how_much_to_think_reaches_the_backend(client, model):
    for said, told in ((None, None), ("none", "none"), ("low", "low"), ("xhigh", "high")):
        assert (await shape(client, reasoning_effort=said))["effort"] == told
    status, refused = await post(client, "/v1/chat/completions", say("a", reasoning_effort="hard"))
    assert status == 400 and refused["error"]["param"] == "reasoning_effort"
    assert "minimal" in refused["error"]["message"]


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
    assert plain["choices"][0]["logprobs"] is None


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


async def test_each_prompt_has_its_choices(client, model):
    body = {"model": "tiny", "prompt": ["one", "two words"], "n": 2}
    _, answer = await post(client, "/v1/completions", body)
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "one"), (1, "one"), (2, "two words"), (3, "two words")]
    usage = {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert answer["usage"].items() >= usage.items()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/completions", json=body)
    lines = [
        line[6:] for line in (await response.text()).splitlines() if line.startswith("data: {")
    ]
    chunks = [json.loads(line) for line in lines]
    streamed = {0: "", 1: "", 2: "", 3: ""}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        streamed[choice["index"]] += choice["text"]
    assert streamed == dict(texts)
    assert chunks[-1]["usage"] == answer["usage"]


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
        ("/v1/embeddings", {"input": [1, 2]}, "input"),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/completions", {"prompt": "a", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": [1, 2]}, "prompt"),
        ("/v1/completions", {"prompt": [[1, 2]]}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 9, "n": 8}, "n"),
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


# what real clients send

NO_EFFECT = {
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": False,
    "user": "u",
    "verbosity": "low",
}
UNSUPPORTED = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
}


@pytest.mark.parametrize("field", NO_EFFECT)
async def test_what_has_no_effect_is_taken(client, model, field):
    for value in (NO_EFFECT[field], None):
        status, answer = await post(client, "/v1/chat/completions", say("hi", **{field: value}))
        assert status == 200, answer


@pytest.mark.parametrize("field", UNSUPPORTED)
async def test_what_cannot_be_done_is_refused_by_name_unless_it_is_null(client, model, field):
    body = say("hi", **{field: UNSUPPORTED[field]})
    status, answer = await post(client, "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["param"] == field
    assert answer["error"]["message"] == f"the field {field!r} is not supported"
    status, answer = await post(client, "/v1/chat/completions", say("hi", **{field: None}))
    assert status == 200, answer


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"n": 17}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"messages": [{"role": "function", "content": ""}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": []}, "messages"),
    ],
)
async def test_wrong_fields_of_a_chat_are_named(client, model, fields, param):
    status, answer = await post(client, "/v1/chat/completions", say("hi") | fields)
    assert status == 400 and answer["error"]["param"] == param, answer


async def test_only_the_tools_that_are_allowed_are_offered(client, model):
    other = {"type": "function", "function": {"name": "clock"}}

    def allowed(mode, *names):
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    some = await shape(client, tools=[TOOL, other], tool_choice=allowed("required", "clock"))
    assert (some["tools"], some["tool_choice"]) == (["clock"], "required")
    for choice in (
        allowed("auto", "nothing"),
        {"type": "function", "function": {"name": "nothing"}},
    ):
        body = say("x", tools=[TOOL], tool_choice=choice)
        status, answer = await post(client, "/v1/chat/completions", body)
        assert status == 400 and answer["error"]["param"] == "tool_choice"
        assert "'nothing' is not among the tools" in answer["error"]["message"]


async def test_a_limit_of_minus_one_is_none(client, model):
    _, answer = await post(client, "/v1/chat/completions", say("!words 40", max_tokens=-1))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 40


async def test_answers_may_be_sent_back_as_clients_keep_them(client, model):
    function = {"name": "weather", "arguments": "{}", "parsed_arguments": {}}
    said = {
        "role": "assistant",
        "content": [{"type": "text", "text": "well", "cache_control": {"type": "ephemeral"}}],
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "parsed": {"a": 1},
        "reasoning_content": "hm",
        "reasoning": "hm",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    body = say("and now?")
    body["messages"] = [*body["messages"], said, *body["messages"]]
    status, answer = await post(client, "/v1/chat/completions", body)
    assert status == 200, answer


# engine options


async def test_options_that_no_backend_has_are_refused_by_name(client, tmp_path):
    body = {"source": str(tmp_path / "x.gguf"), "options": {"n_gpu": 1}}
    status, answer = await post(client, "/modeld/v1/models", body)
    assert status == 400 and answer["error"]["param"] == "options"
    assert "no option 'n_gpu'" in answer["error"]["message"]


@pytest.mark.parametrize(("given", "wanted"), [(None, True), (True, True), (False, False)])
def test_several_calls_at_once_may_come_unless_somebody_says_otherwise(given, wanted):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    body |= {} if given is None else {"parallel_tool_calls": given}
    assert msgspec.convert(body, ChatBody).to_backend().parallel_tool_calls is wanted
