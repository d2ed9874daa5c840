"""Calls of tools that a request insists on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from backends import tools
from backends.contract import BackendError, ChatRequest, Sampling

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time"}}
ASKED = ChatRequest(
    messages=({"role": "user", "content": "Paris?"},), tools=(WEATHER, TIME), tool_choice="required"
)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_choice_that_is_left_open_insists_on_nothing(choice):
    assert tools.must_call(replace(ASKED, tool_choice=choice)) == ()


def test_required_leaves_every_tool_and_a_name_leaves_one():
    assert tools.must_call(ASKED) == (WEATHER, TIME)
    named = replace(ASKED, tool_choice="function", tool_name="time")
    assert tools.must_call(named) == (TIME,)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (replace(ASKED, tool_choice="function", tool_name="news"), "'news', which is not among"),
        (replace(ASKED, tools=()), "not among the tools"),
        (replace(ASKED, sampling=Sampling(json_schema={})), "response_format"),
        (replace(ASKED, sampling=Sampling(grammar="root ::= x")), "grammar"),
    ],
)
def test_what_cannot_be_insisted_on_is_refused(request_, words):
    with pytest.raises(BackendError, match=words) as refused:
        tools.must_call(request_)
    assert refused.value.code == "invalid_request"


def test_the_schema_of_one_tool_is_its_name_and_its_parameters():
    schema = tools.call_schema((WEATHER,))
    assert schema["properties"] == {"name": {"const": "weather"}, "arguments": CITY}
    assert schema["required"] == ["name", "arguments"]
    assert schema["additionalProperties"] is False


def test_definitions_move_to_the_root_where_references_find_them():
    """Pydantic writes nested models so."""
    city = {"type": "object", "properties": {"name": {"type": "string"}}}
    where = {"properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": city}}
    old = {"properties": {"city": {"$ref": "#/definitions/City"}}, "definitions": {"City": {}}}
    given = [
        {"function": {"name": name, "parameters": p}} for name, p in (("a", where), ("b", old))
    ]
    schema = tools.call_schema(tuple(given))
    first, second = (call["properties"]["arguments"] for call in schema["anyOf"])
    assert first == {"properties": {"city": {"$ref": "#/$defs/0_City"}}}
    assert second == {"properties": {"city": {"$ref": "#/$defs/1_City"}}}
    assert schema["$defs"] == {"0_City": city, "1_City": {}}


def test_a_stop_sequence_does_not_cut_a_call():
    asked = replace(ASKED, sampling=Sampling(stop=("\n",)))
    assert tools.insisting(asked, (WEATHER,)).sampling.stop == ()


def test_the_schema_of_several_tools_leaves_the_choice():
    schema = tools.call_schema((WEATHER, TIME))
    names = [call["properties"]["name"]["const"] for call in schema["anyOf"]]
    assert names == ["weather", "time"]
    assert schema["anyOf"][1]["properties"]["arguments"] == {"type": "object"}


def test_the_request_tells_the_model_of_the_tools_and_holds_it_to_the_schema():
    insisting = tools.insisting(ASKED, (WEATHER,))
    assert [message["role"] for message in insisting.messages] == ["system", "user"]
    assert json.dumps(WEATHER["function"]) in insisting.messages[0]["content"]
    assert insisting.tools == () and insisting.tool_choice == "none"
    assert insisting.sampling.json_schema == tools.call_schema((WEATHER,))


def test_a_system_message_that_is_there_is_kept_and_the_caller_s_own_is_not_changed():
    system = {"role": "system", "content": "Be brief."}
    asked = replace(ASKED, messages=(system, *ASKED.messages))
    insisting = tools.insisting(asked, (WEATHER,))
    assert len(insisting.messages) == 2
    assert insisting.messages[0]["content"].startswith("Be brief.\n\n")
    assert system["content"] == "Be brief."


def test_an_answer_becomes_a_call_and_one_that_was_cut_short_does_not():
    call = tools.parse_call('{"name": "weather", "arguments": {"city": "Zürich"}}')
    assert call is not None and call.name == "weather" and call.id.startswith("call_")
    assert json.loads(call.arguments) == {"city": "Zürich"}
    assert tools.parse_call('{"name": "weather", "arg') is None


def test_two_calls_have_two_ids():
    text = '{"name": "time", "arguments": {}}'
    first, second = tools.parse_call(text), tools.parse_call(text)
    assert first is not None and second is not None and first.id != second.id


def test_earlier_calls_are_spelled_out_for_a_template_that_knows_none():
    called = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"a": 1}'}}
    messages = (
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
    )
    assert tools.spelled_out(messages, "{{ message.tool_calls }}") == messages
    plain = tools.spelled_out(messages, "{{ message.content }}")
    assert plain[1] == {"role": "assistant", "content": '{"name": "time", "arguments": {"a": 1}}'}
    assert (plain[0], plain[2]) == (messages[0], messages[2])


def test_arguments_that_are_no_json_are_kept_as_they_are():
    called = {"function": {"name": "time", "arguments": "{broken"}}
    (plain,) = tools.spelled_out(
        ({"role": "assistant", "content": "hm", "tool_calls": [called]},), ""
    )
    assert plain["content"] == 'hm\n{"name": "time", "arguments": "{broken"}'
