"""The Anthropic surface on the reference backend: blocks in, blocks and named events out."""

from __future__ import annotations

import ast
import json

import pytest

PATH = "/v1/messages"
TOOL = {"name": "weather", "input_schema": {"type": "object"}}
PIXEL = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}


def ask(content="one two three", **fields):
    messages = [{"role": "user", "content": content}]
    return {"model": "tiny", "max_tokens": 100, "messages": messages} | fields


@pytest.fixture(autouse=True)
async def model(add_model):
    await add_model()


async def post(client, body, path=PATH):
    response = await client.post(path, json=body)
    return response.status, await response.json()


async def answered(client, body):
    status, answer = await post(client, body)
    assert status == 200, answer
    return answer


async def events(client, body):
    """The events of a stream, each under the name that its data repeats."""
    response = await client.post(PATH, json=body | {"stream": True})
    assert response.headers["Content-Type"] == "text/event-stream"
    found = []
    for event in (await response.text()).strip().split("\n\n"):
        if not event.startswith(":"):
            name, data = event.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


# answers


async def test_an_answer_is_a_message_of_blocks(client):
    answer = await answered(client, ask())
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "one two three"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 3,
            "output_tokens": 3,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
        },
    }


async def test_the_prompt_is_what_was_read_and_what_was_cached(client):
    first = await answered(client, ask("one two"))
    said = [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": "three"},
    ]
    usage = (await answered(client, ask(messages=said)))["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (1, 4)


@pytest.mark.parametrize(
    ("fields", "reason", "sequence", "text"),
    [
        ({"max_tokens": 2}, "max_tokens", None, "one two"),
        ({"stop_sequences": ["x", " th"]}, "stop_sequence", " th", "one two"),
        ({"stop_sequences": ["x"]}, "end_turn", None, "one two three"),
    ],
)
async def test_an_answer_tells_what_ended_it(client, fields, reason, sequence, text):
    answer = await answered(client, ask(**fields))
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert answer["content"] == [{"type": "text", "text": text}]
    ended = (await events(client, ask(**fields)))[-2]
    assert ended["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


async def test_an_answer_that_fills_the_context_says_so(client):
    answer = await answered(client, ask("!fill", max_tokens=100_000))
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert "context" in answer["notice"]


async def test_an_answer_of_nothing_has_no_blocks(client):
    assert (await answered(client, ask("")))["content"] == []


async def test_calls_are_blocks_with_their_input(client):
    answer = await answered(client, ask("!call weather", tools=[TOOL]))
    assert answer["stop_reason"] == "tool_use"
    call = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Paris"}}
    assert answer["content"] == [call]


async def test_thoughts_are_blocks_before_the_text(client):
    thought = {"type": "thinking", "thinking": "Let me see.", "signature": "unsigned"}
    text = {"type": "text", "text": "yes"}
    for thinking in (None, {"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
        answer = await answered(client, ask("!think yes", thinking=thinking))
        assert answer["content"] == [thought, text]
    hidden = {"type": "adaptive", "display": "omitted"}
    answer = await answered(client, ask("!think yes", thinking=hidden))
    assert answer["content"] == [thought | {"thinking": ""}, text]
    answer = await answered(client, ask("!think yes", thinking={"type": "disabled"}))
    assert answer["content"] == [text]


# streams


async def test_a_stream_is_a_message_in_named_events(client):
    found = await events(client, ask("one two"))
    started, ping, *blocks, ended, stopped = found
    assert started["type"] == "message_start" and started["message"]["content"] == []
    assert started["message"]["stop_reason"] is None
    assert ping == {"type": "ping"} and stopped == {"type": "message_stop"}
    text = {"type": "text", "text": ""}
    assert blocks == [
        {"type": "content_block_start", "index": 0, "content_block": text},
        *(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": word},
            }
            for word in ("one", " two")
        ),
        {"type": "content_block_stop", "index": 0},
    ]
    assert ended["type"] == "message_delta" and ended["delta"]["stop_reason"] == "end_turn"
    assert (ended["usage"]["input_tokens"], ended["usage"]["output_tokens"]) == (2, 2)


async def test_each_block_of_a_stream_ends_before_the_next(client):
    found = await events(client, ask("!think yes"))
    kinds = [(e["type"], e.get("index"), (e.get("delta") or {}).get("type")) for e in found]
    assert kinds[2:-2] == [
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
    ]
    hidden = await events(client, ask("!think yes", thinking={"type": "disabled"}))
    assert not any("thinking" in json.dumps(event) for event in hidden)


async def test_calls_stream_as_pieces_of_json(client):
    found = await events(client, ask("!call weather", tools=[TOOL]))
    assert found[2]["content_block"] == {
        "type": "tool_use",
        "id": "call_1",
        "name": "weather",
        "input": {},
    }
    pieces = [e["delta"]["partial_json"] for e in found if e["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == {"city": "Paris"} and len(pieces) == 2
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.usefixtures("patient")
async def test_what_fails_in_a_stream_is_an_event_and_before_it_a_status(client):
    found = await events(client, ask("!crash 3"))
    assert found[-1]["type"] == "error" and found[-1]["error"]["type"] == "api_error"
    assert not any(event["type"] == "message_stop" for event in found)
    status, answer = await post(client, ask("!error", stream=True))
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


# conversations


async def shape(client, **fields):
    """What of the request reached the backend."""
    answer = await answered(client, ask("!shape", **fields))
    names = ("tools", "tool_choice", "tool_name", "schema", "grammar", "logit_bias", "effort")
    values = ast.literal_eval(answer["content"][0]["text"])
    return dict(zip(names, values, strict=True))


async def test_whether_and_how_much_to_think_reaches_the_backend(client):
    enabled = {"type": "enabled", "budget_tokens": 1024}
    for thinking, effort, told in (
        (None, None, None),
        ({"type": "disabled"}, "high", "none"),
        (enabled, None, "medium"),
        (enabled, "max", "high"),
        ({"type": "adaptive"}, None, None),
        ({"type": "adaptive"}, "low", "low"),
    ):
        fields = {"thinking": thinking, "output_config": {"effort": effort}}
        assert (await shape(client, **fields))["effort"] == told


async def test_tools_and_the_choice_of_them_reach_the_backend(client):
    auto = await shape(client, tools=[TOOL])
    assert (auto["tools"], auto["tool_choice"]) == (["weather"], "auto")
    assert (await shape(client, tools=[TOOL | {"type": "custom"}])) == auto
    forced = await shape(client, tools=[TOOL], tool_choice={"type": "any"})
    assert forced["tool_choice"] == "required"
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    named = await shape(client, tools=[TOOL], tool_choice=choice)
    assert (named["tool_choice"], named["tool_name"]) == ("function", "weather")
    none = await shape(client, tools=[TOOL], tool_choice={"type": "none"})
    assert none["tools"] == []


async def test_a_schema_of_the_answer_reaches_the_backend(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    config = {"format": form, "effort": "low"}
    assert (await shape(client, output_config=config))["schema"] == schema
    assert (await shape(client, output_format=form))["schema"] == schema


async def test_what_has_no_effect_here_is_accepted(client):
    cache = {"type": "ephemeral", "ttl": "1h"}
    body = ask(
        [{"type": "text", "text": "hello", "cache_control": cache, "citations": None}],
        system=[{"type": "text", "text": "be brief", "cache_control": cache}],
        tools=[TOOL | {"cache_control": cache, "strict": True, "input_examples": [{}]}],
        cache_control=cache,
        metadata={"user_id": "x"},
        service_tier="auto",
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        mcp_servers=[],
        keep_alive="5m",
    )
    answer = await answered(client, body)
    assert answer["content"][0]["text"] == "hello" and answer["usage"]["input_tokens"] == 3


async def counted(client, **fields):
    """The words that reach the backend: it counts those of all messages."""
    status, answer = await post(client, {"model": "tiny"} | fields, f"{PATH}/count_tokens")
    assert status == 200, answer
    return answer["input_tokens"]


async def test_a_system_prompt_is_text_or_blocks_without_the_line_for_accounts(client):
    messages = ask("one two")["messages"]
    assert await counted(client, messages=messages) == 2
    assert await counted(client, messages=messages, system="be brief") == 4
    blocks = [{"type": "text", "text": text} for text in ("be brief", "and kind")]
    assert await counted(client, messages=messages, system=blocks) == 6
    billing = "x-anthropic-billing-header: cc_version=2; cch=1a2b3;"
    accounts = [{"type": "text", "text": billing}, *blocks]
    assert await counted(client, messages=messages, system=accounts) == 6
    assert await counted(client, messages=messages, system=f"{billing}\nbe brief") == 4


async def test_a_count_is_what_the_answer_has_read(client):
    body = ask("one two three", system="be brief")
    usage = (await answered(client, body))["usage"]
    del body["max_tokens"]
    assert await counted(client, **body) == 5 == usage["input_tokens"]


async def test_a_conversation_with_calls_thoughts_and_results_is_understood(client):
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "a b c d", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                call,
            ],
        },
        {"role": "user", "content": [result]},
    ]
    assert (await answered(client, ask(messages=messages)))["content"][0]["text"] == "sunny"
    failed = {**result, "is_error": True, "content": [{"type": "text", "text": "no net"}]}
    messages[-1] = {"role": "user", "content": [failed]}
    answer = await answered(client, ask(messages=messages))
    assert answer["content"][0]["text"] == "The tool failed: no net"  # its words, joined by spaces
    messages[-1] = {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]}
    assert (await answered(client, ask(messages=messages)))["content"][0]["text"] == "And now?"
    assert answer["usage"]["cache_read_input_tokens"] == 0


async def test_messages_of_one_role_in_a_row_are_one(client):
    messages = [{"role": "user", "content": text} for text in ("one", "two")]
    assert (await answered(client, ask(messages=messages)))["content"][0]["text"] == "one two"


async def test_images_are_taken_as_data_and_not_fetched(client):
    for source, status in (
        (PIXEL, 200),
        ({"type": "url", "url": "data:image/png;base64,iVBORw0KGgo="}, 200),
        ({"type": "url", "url": "http://127.0.0.1/x.png"}, 400),
        ({"type": "file", "file_id": "f"}, 400),
    ):
        image = [{"type": "image", "source": source}, {"type": "text", "text": "what is it"}]
        messages = [
            *ask(image)["messages"],
            {"role": "assistant", "content": "a dot"},
            *ask("seen")["messages"],
        ]
        found, answer = await post(client, ask(messages=messages))
        assert found == status, answer
        if status == 400:
            assert "source" in answer["error"]["message"]


# refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"frequency_penalty": 1}, "'frequency_penalty' is not supported"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "prefill"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ({"tools": [{"name": "w"}]}, "input_schema"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice"),
        ({"thinking": {"type": "hard"}}, "thinking.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "edits[0]"),
    ],
)
async def test_what_is_wrong_or_cannot_be_done_is_named(client, fields, words):
    status, answer = await post(client, ask(**fields))
    assert status == 400 and words in answer["error"]["message"], answer
    assert (answer["type"], answer["error"]["type"]) == ("error", "invalid_request_error")


@pytest.mark.parametrize(
    ("role", "block"),
    [
        ("assistant", {"type": "image", "source": PIXEL}),
        ("user", {"type": "tool_use", "id": "1", "name": "a", "input": {}}),
        ("assistant", {"type": "tool_result", "tool_use_id": "1"}),
        ("system", {"type": "thinking", "thinking": "a", "signature": ""}),
    ],
)
async def test_a_block_that_a_role_cannot_have_is_named(client, role, block):
    messages = [{"role": role, "content": [block]}, {"role": "user", "content": "x"}]
    status, answer = await post(client, ask(messages=messages))
    assert status == 400 and f"{role} can't have a {block['type']}" in answer["error"]["message"]


async def test_an_unknown_model_is_not_found(client):
    for path in (PATH, f"{PATH}/count_tokens"):
        body = ask(model="other")
        if path != PATH:
            del body["max_tokens"]
        status, answer = await post(client, body, path)
        assert status == 404 and answer["error"]["type"] == "not_found_error"
