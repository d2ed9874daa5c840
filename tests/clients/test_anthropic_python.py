"""The real Python client of Anthropic against a running daemon, real engines and real models."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal

import anthropic
import gguf_models
import pydantic
import pytest
from pictures import png
from running import SAMPLE, RunningDaemon, needs_engine
from templates import PONDERING

ENGINES = ("xllamacpp", "llama_cpp")
ASK = {
    "max_tokens": 24,
    "extra_body": {"temperature": 0},  # the library has no word for it any more, the API does
    "messages": [{"role": "user", "content": "Count from one to ten."}],
}
WEATHER = {
    "name": "weather",
    "description": "Tells the weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon with the sample model, and one that sees; each of them once for each engine."""
    daemon = RunningDaemon(tmp_path_factory.mktemp("anthropic"))
    daemon.start()
    try:
        daemon.download()
        for engine in ENGINES:
            folder = tmp_path_factory.mktemp(engine)
            (folder / "model.gguf").hardlink_to(gguf_models.smollm2())
            add(daemon, f"plain-{engine}", engine, str(folder / "model.gguf"))
            gguf_models.image_encoder(folder)
            add(daemon, f"seeing-{engine}", engine, f"{folder}/")
        thinking = str(gguf_models.smollm2())
        add(daemon, "pondering", "xllamacpp", thinking, chat_template=PONDERING)
        yield daemon
    finally:
        daemon.stop()


def add(daemon, name, engine, source, **more):
    body = {"source": source, "unique": name, "backend": engine, **more}
    daemon.json("POST", "/modeld/v1/models", body)
    daemon.download(name)


def options(daemon):
    return {"base_url": daemon.url, "api_key": "none", "max_retries": 0, "timeout": 60}


@pytest.fixture
def client(daemon):
    with anthropic.Anthropic(**options(daemon)) as client:
        yield client


@pytest.fixture
async def async_client(daemon):
    async with anthropic.AsyncAnthropic(**options(daemon)) as client:
        yield client


def say(client, **fields):
    return client.messages.create(**{"model": SAMPLE} | ASK | fields)


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


# answers


def test_a_message_has_text_a_reason_and_what_it_cost(client):
    message = say(client)
    assert (message.type, message.role, message.model) == ("message", "assistant", SAMPLE)
    assert [block.type for block in message.content] == ["text"] and message.content[0].text
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 24
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens > 10


async def test_all_ways_to_ask_get_the_same_text(client, async_client):
    wanted = text_of(say(client))
    assert text_of(await async_client.messages.create(model=SAMPLE, **ASK)) == wanted
    assert text_of(client.beta.messages.create(model=SAMPLE, betas=["some"], **ASK)) == wanted
    with client.messages.stream(model=SAMPLE, **ASK) as stream:
        assert "".join(stream.text_stream) == wanted
        final = stream.get_final_message()
    assert text_of(final) == wanted and final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 24
    async with async_client.messages.stream(model=SAMPLE, **ASK) as stream:
        assert "".join([text async for text in stream.text_stream]) == wanted
        assert (await stream.get_final_message()).usage == final.usage
    events = list(say(client, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == wanted


@pytest.mark.parametrize("engine", ENGINES)
def test_the_stop_sequence_that_ended_it_is_told(client, engine):
    needs_engine(engine)
    model = f"plain-{engine}"
    whole = text_of(say(client, model=model))
    stop = whole[10:13]
    message = say(client, model=model, stop_sequences=["never said", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == whole[: whole.index(stop)]


def test_a_system_prompt_is_text_or_blocks(client):
    def fresh(system):
        messages = [{"role": "user", "content": "Who are you?"}]
        return text_of(say(client, system=system, messages=messages))

    as_text = fresh("You are a pirate.")
    cached = {"type": "text", "text": "You are a pirate.", "cache_control": {"type": "ephemeral"}}
    assert fresh([cached]) == as_text != fresh("You are a lawyer who speaks of contracts only.")


def test_a_conversation_goes_on_from_the_cache(client):
    messages = [{"role": "user", "content": "Tell me of the sea. " * 20}]
    first = say(client, messages=messages)
    messages += [first.to_param(), {"role": "user", "content": "Go on."}]
    second = say(client, messages=messages)
    assert second.usage.cache_read_input_tokens > 100
    assert second.usage.input_tokens < 60


# tools


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_called_and_its_result_is_taken(client, choice):
    asked = {"messages": [QUESTION], "tools": [WEATHER], "tool_choice": choice, "max_tokens": 64}
    message = say(client, **asked)
    (call,) = message.content
    assert message.stop_reason == "tool_use" and call.type == "tool_use"
    assert call.name == "weather" and isinstance(call.input["city"], str)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "It rains."}
    conversation = [
        QUESTION,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result, {"type": "text", "text": "What now?"}]},
    ]
    answer = say(client, messages=conversation, tools=[WEATHER], tool_choice={"type": "none"})
    assert text_of(answer)


def test_a_call_streams(client):
    choice = {"type": "any"}
    fields = ASK | {"messages": [QUESTION], "max_tokens": 64}
    pieces = []
    with client.messages.stream(
        model=SAMPLE, tools=[WEATHER], tool_choice=choice, **fields
    ) as stream:
        for event in stream:
            if event.type == "input_json":
                pieces.append(event.partial_json)
        (call,) = stream.get_final_message().content
    assert json.loads("".join(pieces)) == call.input and set(call.input) == {"city"}


def test_an_answer_is_read_into_the_type_that_was_asked_for(client):
    class City(pydantic.BaseModel):
        name: str
        people: int

    asked = ASK | {"messages": [QUESTION], "max_tokens": 200}
    message = client.messages.parse(model=SAMPLE, output_format=City, **asked)
    assert isinstance(message.parsed_output, City) and message.parsed_output.name


def test_what_a_model_thinks_is_a_block_of_its_own(client):
    thinking = {"type": "enabled", "budget_tokens": 1024}
    (block,) = say(client, model="pondering", thinking=thinking).content
    assert block.type == "thinking" and block.thinking and block.signature
    fields = ASK | {"thinking": thinking}
    with client.messages.stream(model="pondering", **fields) as stream:
        pieces = [event.thinking for event in stream if event.type == "thinking"]
        (streamed,) = stream.get_final_message().content
    assert len(pieces) > 5 and "".join(pieces) == streamed.thinking == block.thinking
    assert streamed.signature == block.signature
    said = [*ASK["messages"], {"role": "assistant", "content": [block]}, QUESTION]
    assert say(client, model="pondering", messages=said).usage.output_tokens
    (answer,) = say(client, model="pondering", thinking={"type": "disabled"}).content
    assert answer.type == "text" and answer.text and "think>" not in answer.text


# images


def picture(shade):
    data = base64.b64encode(png(shade)).decode()
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": data},
    }


def seen(*shades):
    content = [*(picture(shade) for shade in shades), {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("engine", ENGINES)
def test_images_are_seen_and_counted(client, daemon, engine):
    needs_engine(engine)
    model = f"seeing-{engine}"
    totals = []
    for messages in (seen(), seen(10), seen(10, 250)):
        usage = say(client, model=model, messages=messages, max_tokens=1).usage
        totals.append(usage.input_tokens + usage.cache_read_input_tokens)
        counted = client.messages.count_tokens(model=model, messages=messages)
        assert counted.input_tokens == totals[-1]
    assert totals[1] - totals[0] >= gguf_models.IMAGE_TOKENS
    assert totals[2] - totals[1] >= gguf_models.IMAGE_TOKENS
    daemon.json("POST", f"/modeld/v1/models/{model}/unload")


def test_a_model_without_eyes_refuses_images(client):
    with pytest.raises(anthropic.BadRequestError, match="can't do vision"):
        say(client, messages=seen(10))


# counting


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be brief."},
        {"tools": [WEATHER], "tool_choice": {"type": "any"}},
        {"messages": [QUESTION, {"role": "assistant", "content": "No."}, QUESTION]},
    ],
    ids=["plain", "system", "tools", "conversation"],
)
async def test_the_count_is_what_the_message_then_costs(client, async_client, engine, fields):
    needs_engine(engine)
    model = f"plain-{engine}"
    asked = {"model": model, "messages": ASK["messages"]} | fields
    counted = client.messages.count_tokens(**asked)
    assert (await async_client.messages.count_tokens(**asked)) == counted
    usage = client.messages.create(max_tokens=1, **asked).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


# models


async def test_models_are_listed_and_shown(client, async_client):
    listed = list(client.models.list())
    assert SAMPLE in [model.id for model in listed]
    assert [model async for model in async_client.models.list()] == listed
    shown = client.models.retrieve(SAMPLE)
    assert shown in listed and shown.type == "model" and shown.display_name
    assert shown.created_at.year >= 2024
    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


# errors


def test_errors_are_of_their_classes(client, daemon):
    with pytest.raises(anthropic.NotFoundError) as missing:
        say(client, model="nobody")
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="nobody", messages=[QUESTION])
    with pytest.raises(anthropic.BadRequestError, match="temperature") as wrong:
        say(client, extra_body={"temperature": 1.5})
    assert wrong.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        say(client, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    with pytest.raises(anthropic.BadRequestError):
        say(client, messages=[{"role": "user", "content": "word " * 100_000}])
    with pytest.raises(anthropic.PermissionDeniedError):
        say(client.with_options(default_headers={"Origin": "https://example.com"}))
    with pytest.raises(anthropic.ContentTooLargeError) as large:
        say(client, messages=[{"role": "user", "content": "x" * 21 * 1024 * 1024}])
    assert large.value.body["error"]["type"] == "request_too_large"


def test_a_model_that_does_not_fit_is_an_unavailable_service(start_daemon):
    daemon = start_daemon(MODELD_MEMORY_LIMIT="16MiB")
    daemon.download()
    with (
        anthropic.Anthropic(**options(daemon)) as client,
        pytest.raises(anthropic.ServiceUnavailableError) as refused,
    ):
        say(client)
    assert refused.value.body["error"]["type"] == "overloaded_error"
    assert "MiB" in refused.value.message


def test_a_crash_in_a_stream_is_an_error_with_words(client, daemon):
    stream = say(client, stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
    with stream, pytest.raises(anthropic.APIStatusError, match="crashed") as crash:
        said = (event for event in stream if event.type == "content_block_delta")
        next(said)
        os.kill(daemon.model()["worker_pid"], signal.SIGKILL)
        for _ in said:  # what was on its way
            pass
    assert crash.value.body["error"]["type"] == "api_error"


@pytest.mark.alone
def test_a_client_that_waits_long_is_kept_and_then_served(client, daemon):
    wanted = text_of(say(client))
    worker = daemon.model()["worker_pid"]
    with contextlib.ExitStack() as halted:
        os.kill(worker, signal.SIGSTOP)
        halted.callback(os.kill, worker, signal.SIGCONT)
        with client.messages.stream(model=SAMPLE, **ASK) as stream:  # comments came
            halted.close()
            text = "".join(stream.text_stream)
    assert text == wanted
