"""The Responses API, driven by the real Python client of OpenAI: real engines, real models."""

from __future__ import annotations

import base64
import json
import os
import signal

import gguf_models
import openai
import pydantic
import pytest
from pictures import png
from running import SAMPLE, RunningDaemon
from templates import PONDERING

ASK = {"model": SAMPLE, "input": "Count from one to ten.", "temperature": 0}
SHORT = ASK | {"max_output_tokens": 24}
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
pytestmark = pytest.mark.timeout(180)


def options(daemon):
    return {"base_url": f"{daemon.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon with the sample model, one of it that always thinks first, and one that sees."""
    home = tmp_path_factory.mktemp("responses")
    daemon = RunningDaemon(home)
    daemon.start()
    try:
        daemon.download()
        for name in ("pondering", "seeing"):
            (home / name).mkdir()
            (home / name / "model.gguf").hardlink_to(gguf_models.smollm2())
        gguf_models.image_encoder(home / "seeing")
        for name, template in (("pondering", PONDERING), ("seeing", "")):
            body = {"source": f"{home / name}/", "unique": name, "chat_template": template}
            daemon.json("POST", "/modeld/v1/models", body)
            daemon.download(name)
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture
def client(daemon):
    with openai.OpenAI(**options(daemon)) as client:
        yield client


@pytest.fixture
async def async_client(daemon):
    async with openai.AsyncOpenAI(**options(daemon)) as client:
        yield client


# answers


def test_a_response_has_text_a_status_and_what_it_cost(client):
    response = client.responses.create(**SHORT)
    assert (response.object, response.model, response.status) == ("response", SAMPLE, "incomplete")
    assert response.output_text and response.output[0].type == "message"
    assert response.incomplete_details.reason == "max_output_tokens"
    usage = response.usage
    assert usage.output_tokens == 24 and usage.total_tokens == usage.input_tokens + 24
    whole = client.responses.create(**ASK, max_output_tokens=400)
    assert whole.status == "completed" and whole.incomplete_details is None
    assert whole.usage.input_tokens_details.cached_tokens > 0


async def test_all_ways_to_ask_get_the_same_text(client, async_client):
    wanted = client.responses.create(**SHORT).output_text
    assert (await async_client.responses.create(**SHORT)).output_text == wanted
    kinds, deltas = [], []
    for event in client.responses.create(**SHORT, stream=True):
        kinds.append(event.type)
        deltas += [event.delta] if event.type == "response.output_text.delta" else []
    assert "".join(deltas) == wanted
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    with client.responses.stream(**SHORT) as stream:
        last = [event for event in stream if event.type == "response.output_text.done"][-1]
    assert last.text == wanted
    async with async_client.responses.stream(**ASK, max_output_tokens=400) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.status == "completed" and final.output_text.startswith(wanted)


def test_a_conversation_goes_on_from_what_was_answered(client):
    items = [{"role": "user", "content": "Tell me of the sea. " * 20}]
    fields = {"model": SAMPLE, "temperature": 0, "max_output_tokens": 24}
    first = client.responses.create(input=items, instructions="Be brief.", **fields)
    items += [*first.output, {"role": "user", "content": "Go on."}]
    second = client.responses.create(input=items, instructions="Be brief.", **fields)
    assert second.output_text
    assert second.usage.input_tokens_details.cached_tokens > 100


def test_logprobs_come_with_the_text(client):
    include = ["message.output_text.logprobs"]
    response = client.responses.create(**SHORT, include=include, top_logprobs=2)
    (part,) = response.output[0].content
    assert "".join(entry.token for entry in part.logprobs) == part.text
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


# tools and forms


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_tool_is_called_and_its_result_is_taken(client, choice):
    fields = {"model": SAMPLE, "temperature": 0, "max_output_tokens": 64, "tools": [WEATHER]}
    response = client.responses.create(input=[QUESTION], tool_choice=choice, **fields)
    (call,) = response.output
    assert (call.type, call.name, response.status) == ("function_call", "weather", "completed")
    assert isinstance(json.loads(call.arguments)["city"], str)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    items = [QUESTION, call, result]
    answer = client.responses.create(input=items, tool_choice="none", **fields)
    assert answer.output_text


def test_a_call_streams(client):
    fields = {"model": SAMPLE, "temperature": 0, "max_output_tokens": 64, "tools": [WEATHER]}
    deltas = []
    with client.responses.stream(input=[QUESTION], tool_choice="required", **fields) as stream:
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                deltas.append(event.delta)
        (call,) = stream.get_final_response().output
    assert "".join(deltas) == call.arguments and set(json.loads(call.arguments)) == {"city"}


def test_an_answer_is_read_into_the_type_that_was_asked_for(client):
    class City(pydantic.BaseModel):
        name: str
        people: int

    asked = {"model": SAMPLE, "input": [QUESTION], "temperature": 0, "max_output_tokens": 200}
    response = client.responses.parse(text_format=City, **asked)
    assert isinstance(response.output_parsed, City) and response.output_parsed.name
    with client.responses.stream(text_format=City, **asked) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == response.output_parsed


# models that think, and that see


def test_what_a_model_thinks_is_an_item_of_its_own(client):
    fields = SHORT | {"model": "pondering"}
    thought = client.responses.create(**fields).output[0]
    assert thought.type == "reasoning" and thought.content[0].text
    events = list(client.responses.create(**fields, stream=True))
    deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert len(deltas) > 5 and "".join(deltas) == thought.content[0].text
    items = [{"role": "user", "content": fields["input"]}, thought, QUESTION]
    assert client.responses.create(**fields | {"input": items}).output


def test_images_are_seen_and_counted(client):
    totals = []
    for shades in ((), (10,)):
        images = [
            {
                "type": "input_image",
                "detail": "auto",
                "image_url": f"data:image/png;base64,{base64.b64encode(png(shade)).decode()}",
            }
            for shade in shades
        ]
        text = {"type": "input_text", "text": "What is it?"}
        asked = {"model": "seeing", "input": [{"role": "user", "content": [*images, text]}]}
        usage = client.responses.create(max_output_tokens=1, **asked).usage
        totals.append(usage.input_tokens)
        assert client.responses.input_tokens.count(**asked).input_tokens == totals[-1]
    assert totals[1] - totals[0] >= gguf_models.IMAGE_TOKENS


# errors


def test_errors_are_of_their_classes(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**SHORT | {"model": "nobody"})
    with pytest.raises(openai.BadRequestError, match="whole conversation") as refused:
        client.responses.create(**SHORT, previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.responses.create(**SHORT, tools=[{"type": "web_search"}])
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def test_a_crash_in_a_stream_fails_the_response(client, daemon):
    kinds = []
    endless = {"max_output_tokens": 2000, "extra_body": {"ignore_eos": True}}
    for event in client.responses.create(**ASK, **endless, stream=True):
        if event.type == "response.output_text.delta" and event.type not in kinds:
            os.kill(daemon.model()["worker_pid"], signal.SIGKILL)
        kinds.append(event.type)
    assert kinds[-1] == "response.failed"
    assert event.response.status == "failed" and "crashed" in event.response.error.message


@pytest.mark.alone
def test_a_client_that_waits_long_is_kept_and_then_served(client, daemon):
    wanted = client.responses.create(**SHORT).output_text
    worker = daemon.model()["worker_pid"]
    os.kill(worker, signal.SIGSTOP)
    try:
        stream = client.responses.create(**SHORT, stream=True)  # returns: comments came
    finally:
        os.kill(worker, signal.SIGCONT)
    text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == wanted
