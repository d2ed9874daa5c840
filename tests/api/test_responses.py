"""The Responses API on the reference backend: items in, items and typed events out."""

from __future__ import annotations

import ast
import json

import msgspec
import pytest

from backends.contract import Delta
from daemon.api.openai.responses.shown import ResponseView
from daemon.api.openai.responses.types import ResponseBody
from daemon.errors import EngineError

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(autouse=True)
async def model(add_model):
    await add_model()


def ask(given="one two three", **fields):
    return {"model": "tiny", "input": given} | fields


async def post(client, body, path=PATH):
    response = await client.post(path, json=body)
    return response.status, await response.json()


async def answered(client, body):
    status, answer = await post(client, body)
    assert status == 200, answer
    return answer


async def text_of(client, given, **fields):
    (item,) = (await answered(client, ask(given, **fields)))["output"]
    return item["content"][0]["text"]


async def events(client, body):
    """The events of a stream, each under the name that its data repeats, and numbered."""
    response = await client.post(PATH, json=body | {"stream": True})
    assert response.headers["Content-Type"] == "text/event-stream"
    found = []
    for event in (await response.text()).strip().split("\n\n"):
        if not event.startswith(":"):
            name, data = event.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


# answers


async def test_an_answer_is_a_response_with_a_message(client):
    answer = await answered(client, ask(instructions="be brief", metadata={"a": "b"}))
    (item,) = answer["output"]
    text = {"type": "output_text", "text": "one two three", "annotations": [], "logprobs": []}
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [text],
    }
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["status"], answer["model"]) == (
        "response",
        "completed",
        "tiny",
    )
    assert answer["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }
    assert answer["instructions"] == "be brief" and answer["metadata"] == {"a": "b"}
    assert answer["store"] is False and answer["text"] == {"format": {"type": "text"}}
    assert answer["error"] is None and answer["incomplete_details"] is None


async def test_an_answer_that_is_cut_short_is_incomplete(client):
    answer = await answered(client, ask(max_output_tokens=2))
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    last = (await events(client, ask(max_output_tokens=2)))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["status"] == "incomplete"


async def test_calls_are_items(client):
    answer = await answered(client, ask("!call weather", tools=[TOOL]))
    (item,) = answer["output"]
    assert item.pop("id").startswith("fc_")
    assert item == {
        "type": "function_call",
        "status": "completed",
        "call_id": "call_1",
        "name": "weather",
        "arguments": '{"city": "Paris"}',
    }
    assert answer["tools"][0]["name"] == "weather" and answer["tool_choice"] == "auto"


async def test_thoughts_are_an_item_before_the_message(client):
    thought, message = (await answered(client, ask("!think yes")))["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert message["content"][0]["text"] == "yes"


@pytest.mark.parametrize(
    ("fields", "alternatives"),
    [
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, 2),
        ({"top_logprobs": 1}, 1),
    ],
)
async def test_logprobs_come_with_every_token(client, fields, alternatives):
    answer = await answered(client, ask("one two", **fields))
    entries = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["one", " two"]
    assert all(len(entry["top_logprobs"]) == alternatives for entry in entries)
    found = await events(client, ask("one two", **fields))
    streamed = [e["logprobs"] for e in found if e["type"] == "response.output_text.delta"]
    assert streamed == [[entries[0]], [entries[1]]]


# streams


async def test_a_stream_builds_the_response_event_by_event(client):
    found = await events(client, ask("one two"))
    assert [event["type"] for event in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    created, _, added, part_added, first, second, text, part, item, completed = found
    assert created["response"]["status"] == "in_progress" and created["response"]["output"] == []
    assert added["item"]["status"] == "in_progress" and added["item"]["content"] == []
    assert part_added["part"]["text"] == ""
    assert (first["delta"], second["delta"], text["text"]) == ("one", " two", "one two")
    where = {"item_id": added["item"]["id"], "output_index": 0, "content_index": 0}
    for event in (part_added, first, second, text, part):
        assert {key: event[key] for key in where} == where
    assert item["item"]["content"] == [part["part"]]
    assert completed["response"]["output"] == [item["item"]]
    assert completed["response"]["usage"]["total_tokens"] == 4
    assert completed["response"]["id"] == created["response"]["id"]


async def test_thoughts_and_calls_stream_as_items_of_their_own(client):
    found = await events(client, ask("!think yes"))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[2:-7] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert [e["output_index"] for e in found[2:-1]] == [0] * 7 + [1] * 6
    found = await events(client, ask("!call weather", tools=[TOOL]))
    assert [event["type"].removeprefix("response.") for event in found][2:-1] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert found[2]["item"]["arguments"] == "" and found[2]["item"]["name"] == "weather"
    assert found[-2]["item"]["arguments"] == found[-3]["arguments"] == '{"city": "Paris"}'


@pytest.mark.usefixtures("patient")
async def test_what_fails_in_a_stream_ends_the_response_and_before_it_has_a_status(client):
    last = (await events(client, ask("!crash 3")))[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert "crashed" in last["response"]["error"]["message"]
    status, answer = await post(client, ask("!error", stream=True))
    assert status == 400 and answer["error"]["code"] == "invalid_request"


# conversations


async def test_a_conversation_with_calls_thoughts_and_results_is_understood(client):
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
        {"type": "message", "role": "user", "content": "weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "weather",
            "arguments": "{}",
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    assert await text_of(client, items) == "sunny"
    items[-1]["output"] = [{"type": "input_text", "text": "rain"}]
    assert await text_of(client, items) == "rain"


async def test_an_answer_can_be_sent_back_as_it_came(client):
    first = await answered(client, ask("!think yes", top_logprobs=1))
    items = [{"role": "user", "content": "!think yes"}, *first["output"]]
    second = await answered(client, ask([*items, {"role": "user", "content": "and now"}]))
    assert second["output"][0]["content"][0]["text"] == "and now"
    assert second["usage"]["input_tokens"] == 5


async def test_instructions_and_what_developers_say_are_one_system_message(client):
    items = [{"role": "developer", "content": "a b"}, {"role": "user", "content": "c"}]
    answer = await answered(client, ask(items, instructions="d e"))
    assert answer["usage"]["input_tokens"] == 5


async def shape(client, **fields):
    """What of the request reached the backend."""
    names = ("tools", "tool_choice", "tool_name", "schema", "grammar", "logit_bias", "effort")
    values = ast.literal_eval(await text_of(client, "!shape", **fields))
    return dict(zip(names, values, strict=True))


async def test_how_much_to_think_reaches_the_backend(client):
    for reasoning, told in ((None, None), ({}, None), ({"effort": "minimal"}, "minimal")):
        assert (await shape(client, reasoning=reasoning))["effort"] == told
    answer = await answered(client, ask("a", reasoning={"effort": "high", "summary": "auto"}))
    assert answer["reasoning"] == {"effort": "high", "summary": "auto"}


async def test_tools_and_the_choice_of_them_reach_the_backend(client):
    other = TOOL | {"name": "news"}
    auto = await shape(client, tools=[TOOL, other])
    assert (auto["tools"], auto["tool_choice"]) == (["weather", "news"], "auto")
    assert (await shape(client, tools=[TOOL], tool_choice="required"))["tool_choice"] == "required"
    assert (await shape(client, tools=[TOOL], tool_choice="none"))["tools"] == []
    choice = {"type": "function", "name": "weather"}
    named = await shape(client, tools=[TOOL], tool_choice=choice)
    assert (named["tool_choice"], named["tool_name"]) == ("function", "weather")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [choice]}
    some = await shape(client, tools=[TOOL, other], tool_choice=allowed)
    assert (some["tools"], some["tool_choice"]) == (["weather"], "auto")


async def test_the_form_of_the_text_reaches_the_backend(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    assert (await shape(client, text={"format": form}))["schema"] == schema
    assert (await shape(client, text={"format": {"type": "json_object"}}))["schema"] == {}
    assert (await shape(client, text={"verbosity": "low"}))["schema"] is None


async def test_what_has_no_effect_here_is_accepted(client):
    body = ask(
        "hello",
        store=True,
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        stream_options={"include_obfuscation": True},
        service_tier="auto",
        prompt_cache_key="k",
        truncation="disabled",
        background=False,
        previous_response_id=None,
        keep_alive="5m",
    )
    answer = await answered(client, body)
    assert answer["store"] is False and answer["reasoning"]["effort"] == "low"


async def test_a_count_is_what_the_answer_has_read(client):
    body = ask("one two three", instructions="be brief")
    read = (await answered(client, body))["usage"]["input_tokens"]
    status, counted = await post(client, body, f"{PATH}/input_tokens")
    assert status == 200
    assert counted == {"object": "response.input_tokens", "input_tokens": read}


async def test_images_are_taken_as_data_and_not_fetched(client):
    for url, status in ((PIXEL, 200), ("http://127.0.0.1/x.png", 400)):
        image = [
            {"type": "input_image", "image_url": url, "detail": "auto"},
            {"type": "input_text", "text": "what is it"},
        ]
        items = [
            {"role": "user", "content": image},
            {"role": "assistant", "content": "a dot"},
            {"role": "user", "content": "seen"},
        ]
        found, answer = await post(client, ask(items))
        assert found == status, answer
        if status == 400:
            assert answer["error"]["param"] == "input[0]"


# refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "a"}]}, "input[0].arguments"),
        ({"input": [{"type": "message", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "news"}}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ],
)
async def test_what_is_wrong_or_cannot_be_done_is_named(client, fields, param):
    status, answer = await post(client, ask(**fields))
    assert status == 400 and answer["error"]["param"] == param, answer
    assert param in answer["error"]["message"]


def test_what_fails_before_its_first_word_was_created_nonetheless():
    """As after a long wait for a load: clients know no response that was not created."""
    body = msgspec.convert(ask(), ResponseBody)
    events = ResponseView("tiny", body).failure(EngineError("no"))
    kinds = ["response.created", "response.in_progress", "response.failed"]
    assert [event["type"] for event in events] == kinds
    assert [event["sequence_number"] for event in events] == [0, 1, 2]


def test_what_was_said_before_a_failure_stays_in_the_response():
    view = ResponseView("tiny", msgspec.convert(ask(), ResponseBody))
    view.begin()
    view.piece(Delta(content="one"), 0)
    *_, done, failed = view.failure(EngineError("no"))
    assert done["type"] == "response.output_item.done" and done["item"]["status"] == "incomplete"
    assert failed["response"]["status"] == "failed"
    (item,) = failed["response"]["output"]
    assert item["content"][0]["text"] == "one"
