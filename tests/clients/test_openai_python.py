"""The real Python library of OpenAI against a running daemon and real models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import threading
import time

import openai
import psutil
import pytest
from json_answers import check_object
from openai import AsyncOpenAI, OpenAI
from pictures import png
from pydantic import BaseModel, Field
from running import SAMPLE

EIFFEL = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
GREEDY = {"model": SAMPLE, "messages": EIFFEL, "temperature": 0, "max_tokens": 32}
# Its weights are float32: what else an engine computes at the time does not show in its text.
LETTERS = GREEDY | {"model": "letters", "temperature": 1, "max_tokens": 12}
LIVELY = GREEDY | {"temperature": 1.5, "max_tokens": 12}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NEWS = {"type": "function", "function": {"name": "news", "parameters": {"type": "object"}}}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


class City(BaseModel):
    """What an answer is held to."""

    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=10**8)


@pytest.fixture(scope="module")
def daemon(furnished_daemon):
    return furnished_daemon


@pytest.fixture
def client(daemon):
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def text_of(answer) -> str:
    return answer.choices[0].message.content


def streamed(chunks, choice=0) -> str:
    return "".join(
        each.delta.content or ""
        for chunk in chunks
        for each in chunk.choices
        if each.index == choice
    )


# chat


def test_an_answer_is_whole(client):
    answer = client.chat.completions.create(**GREEDY)
    assert "Paris" in text_of(answer)
    assert (answer.object, answer.model) == ("chat.completion", SAMPLE)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == 37
    assert answer.usage.total_tokens == 37 + answer.usage.completion_tokens


def test_a_stream_says_the_same_and_what_it_cost_if_asked(client):
    whole = client.chat.completions.create(**GREEDY)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True))
    assert streamed(chunks) == text_of(whole)
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    counted = list(
        client.chat.completions.create(
            **GREEDY, stream=True, stream_options={"include_usage": True}
        )
    )
    assert counted[-1].choices == []
    assert counted[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in counted[:-1])


def test_the_library_s_own_stream_gathers_the_answer(client):
    with client.chat.completions.stream(**GREEDY) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert "Paris" in text_of(final)


async def test_many_at_once(daemon):
    """What runs beside it changes the rounding of quantized weights: these are float32."""
    asked = GREEDY | {"model": "letters"}
    async with AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="none", timeout=60) as client:

        async def one() -> str:
            return text_of(await client.chat.completions.create(**asked))

        async def piecewise() -> str:
            chunks = await client.chat.completions.create(**asked, stream=True)
            return streamed([chunk async for chunk in chunks])

        texts = await asyncio.gather(*(one() if k % 2 else piecewise() for k in range(8)))
    assert len(set(texts)) == 1 and len(texts[0]) > 8


def test_roles_and_parts_of_messages(client):
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the Eiffel Tower?"}]
    asked = GREEDY | {"messages": [{"role": "user", "content": parts, "name": "ann"}]}
    whole = text_of(client.chat.completions.create(**GREEDY))
    assert text_of(client.chat.completions.create(**asked)) == whole
    told = [{"role": "developer", "content": "You answer in one word."}, *EIFFEL]
    system = [{"role": "system", "content": "You answer in one word."}, *EIFFEL]
    answers = [
        text_of(client.chat.completions.create(**(GREEDY | {"messages": messages})))
        for messages in (told, system)
    ]
    assert answers[0] == answers[1]


def test_the_next_turn_finds_the_first_in_the_cache(client):
    first = client.chat.completions.create(**GREEDY)
    said = first.choices[0].message
    asked = [*EIFFEL, said, {"role": "user", "content": "And who built it?"}]
    second = client.chat.completions.create(**(GREEDY | {"messages": asked}))
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 8


# how tokens are chosen


def test_a_seed_settles_the_text(client):
    texts = [
        text_of(client.chat.completions.create(**LIVELY, seed=seed)) for seed in (7, 7, 8, 9, -1)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 4


def test_three_choices_differ_and_are_the_same_again(client):
    whole = client.chat.completions.create(**LETTERS, n=3, seed=5)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == 36
    chunks = list(
        client.chat.completions.create(
            **LETTERS, n=3, seed=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [streamed(chunks, choice) for choice in range(3)] == texts
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    unseeded = client.chat.completions.create(**LETTERS, n=3)
    assert len({choice.message.content for choice in unseeded.choices}) == 3


def test_stop_sequences(client):
    whole = text_of(client.chat.completions.create(**GREEDY))
    for stop in ("Paris", ["no such text", "Paris"]):
        answer = client.chat.completions.create(**GREEDY, stop=stop)
        assert text_of(answer) == whole[: whole.index("Paris")]
        assert answer.choices[0].finish_reason == "stop"


def test_a_bias_decides(client):
    asked = GREEDY | {"max_tokens": 4}
    text = text_of(client.chat.completions.create(**asked, logit_bias={"300": 100}))
    assert text and text == text[: len(text) // 4] * 4
    first = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs.content[0]
    banned = {str(token): -100 for token in range(300)}
    other = client.chat.completions.create(**asked, logprobs=True, logit_bias=banned)
    assert other.choices[0].logprobs.content[0].bytes
    assert first.bytes


def test_limits(client):
    asked = {key: value for key, value in GREEDY.items() if key != "max_tokens"}
    answer = client.chat.completions.create(**asked, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    assert client.chat.completions.create(**asked, max_tokens=-1).choices[0].finish_reason == "stop"


def test_logprobs(client):
    asked = GREEDY | {"logprobs": True, "top_logprobs": 3}
    (choice,) = client.chat.completions.create(**asked).choices
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
    chunks = client.chat.completions.create(**asked, stream=True)
    pieces = [
        entry
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [piece.token for piece in pieces] == [entry.token for entry in entries]


# tools


def test_a_tool_is_called_and_its_result_answered(client):
    asked = {"model": SAMPLE, "messages": QUESTION, "tools": [WEATHER, NEWS], "temperature": 0}
    answer = client.chat.completions.create(**asked, tool_choice="required")
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
    (call,) = message.tool_calls
    assert call.type == "function" and call.function.name in ("weather", "news")
    assert isinstance(json.loads(call.function.arguments), dict)
    named = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(**asked, tool_choice=named)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees, sunny"}
    told = client.chat.completions.create(
        model=SAMPLE,
        messages=[*QUESTION, message, result],
        tools=[WEATHER],
        tool_choice="none",
        temperature=0,
        max_tokens=32,
    )
    assert text_of(told) and told.choices[0].finish_reason in ("stop", "length")


def test_a_call_streams(client):
    asked = {"model": SAMPLE, "messages": QUESTION, "tools": [WEATHER], "tool_choice": "required"}
    with client.chat.completions.stream(**asked, temperature=0) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in kinds
    assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city"}


def test_tools_that_a_template_does_not_know_are_refused_unless_a_call_is_required(client):
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        client.chat.completions.create(model=SAMPLE, messages=QUESTION, tools=[WEATHER])


def test_one_of_the_tools_that_are_allowed_is_called(client):
    tool = {"type": "function", "function": {"name": "weather"}}
    allowed = {"mode": "required", "tools": [tool]}
    answer = client.chat.completions.create(
        model=SAMPLE,
        messages=QUESTION,
        tools=[NEWS, WEATHER],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"


# structured answers


# The library warns of what it made of an answer when that is sent back.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_an_answer_is_parsed_into_a_type(client):
    asked = {"model": SAMPLE, "messages": [{"role": "user", "content": "Describe Paris."}]}
    answer = client.chat.completions.parse(**asked, response_format=City, seed=1, max_tokens=100)
    message = answer.choices[0].message
    assert isinstance(message.parsed, City)
    assert City.model_validate_json(message.content) == message.parsed
    with client.chat.completions.stream(
        **asked, response_format=City, seed=1, max_tokens=100
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == message.parsed
    # and may be sent back as it is
    more = [*asked["messages"], message, {"role": "user", "content": "And Rome?"}]
    again = client.chat.completions.parse(
        model=SAMPLE, messages=more, response_format=City, seed=1, max_tokens=100
    )
    assert isinstance(again.choices[0].message.parsed, City)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_call_is_parsed_into_a_type(client):
    tool = openai.pydantic_function_tool(City, name="city")
    answer = client.chat.completions.parse(
        model=SAMPLE,
        messages=[{"role": "user", "content": "Describe Paris."}],
        tools=[tool],
        tool_choice="required",
        temperature=0,
    )
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)
    result = {"role": "tool", "tool_call_id": call.id, "content": "noted"}
    more = [{"role": "user", "content": "Describe Paris."}, message, result]
    again = client.chat.completions.create(model=SAMPLE, messages=more, max_tokens=8)
    assert text_of(again)


@pytest.mark.parametrize(
    "question", ["Where is the Eiffel Tower?", "Say hello.", 'Say {"a": 1}'], ids=str
)
def test_json_mode_gives_an_object(client, question):
    asked = {"model": SAMPLE, "messages": [{"role": "user", "content": question}]}
    asked |= {"temperature": 0, "max_tokens": 60}
    if "{" not in question:  # then only the format makes it an object
        assert "{" not in text_of(client.chat.completions.create(**asked))
    asked |= {"response_format": {"type": "json_object"}, "logprobs": True, "top_logprobs": 20}
    answer = client.chat.completions.create(**asked)
    check_object(text_of(answer), cut=answer.choices[0].finish_reason == "length")
    for entry in answer.choices[0].logprobs.content:
        assert all(-9999 <= top.logprob <= 0 for top in entry.top_logprobs)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    (reason,) = [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason]
    check_object(streamed(chunks), cut=reason == "length")


# what models think and see


def test_thoughts_are_apart_from_the_answer(client):
    grammar = 'root ::= "<think>\\nHm, " [a-z ]+ ".\\n</think>\\n\\n" [A-Z] [a-z ]+ "."'
    asked = {"model": "thinking", "messages": EIFFEL, "temperature": 0, "max_tokens": 64}
    answer = client.chat.completions.create(**asked, extra_body={"grammar": grammar})
    message = answer.choices[0].message
    assert message.reasoning_content.startswith("Hm, ")
    assert "think>" not in message.content + message.reasoning_content
    chunks = client.chat.completions.create(**asked, stream=True, extra_body={"grammar": grammar})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thoughts == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content
    more = [*EIFFEL, message, {"role": "user", "content": "Thanks."}]
    assert client.chat.completions.create(model="thinking", messages=more, max_tokens=4).choices


def test_an_image_is_seen(client):
    def data_url(shade):
        return f"data:image/png;base64,{base64.b64encode(png(shade)).decode()}"

    def look(url, model="seeing"):
        parts = [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        ]
        messages = [{"role": "user", "content": parts}]
        return client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=1, logprobs=True
        )

    dark, bright = (look(data_url(shade)) for shade in (10, 250))
    probabilities = [answer.choices[0].logprobs.content[0].logprob for answer in (dark, bright)]
    assert abs(probabilities[0] - probabilities[1]) > 1e-3
    with pytest.raises(openai.BadRequestError, match="can't do vision"):
        look(data_url(10), SAMPLE)
    with pytest.raises(openai.BadRequestError, match="data URL"):
        look("https://example.com/cat.png")


# completions and embeddings


def test_texts_are_completed(client):
    # whose weights are not quantized: who else is in a batch changes no rounding
    asked = {"model": "letters", "temperature": 0, "max_tokens": 6}
    prompts = ["The capital of Italy is", "One, two, three,"]
    singles = [client.completions.create(prompt=p, **asked).choices[0].text for p in prompts]
    together = client.completions.create(prompt=prompts, **asked)
    assert [choice.text for choice in together.choices] == singles
    chunks = list(
        client.completions.create(
            prompt=prompts, stream=True, stream_options={"include_usage": True}, **asked
        )
    )
    pieces = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        pieces[choice.index] += choice.text
    assert pieces == singles
    assert chunks[-1].usage.prompt_tokens == together.usage.prompt_tokens
    known = client.completions.create(prompt=prompts[0], logprobs=2, **asked).choices[0]
    assert "".join(known.logprobs.tokens) == known.text
    assert known.logprobs.text_offset[1] == len(known.logprobs.tokens[0])


def test_vectors(client):
    texts = ["A cat sits on the mat.", "A kitten is on a rug.", "Shares fell sharply."]
    packed = client.embeddings.create(model="minilm", input=texts)  # asks for base64 by itself
    numbers = client.embeddings.create(model="minilm", input=texts, encoding_format="float")
    assert [entry.index for entry in packed.data] == [0, 1, 2]
    for ours, theirs in zip(packed.data, numbers.data, strict=True):
        assert ours.embedding == pytest.approx(theirs.embedding, abs=1e-6)
        assert len(ours.embedding) == 384
    cat, kitten, shares = (entry.embedding for entry in packed.data)

    def cosine(a, b):
        return math.sumprod(a, b) if hasattr(math, "sumprod") else sum(map(float.__mul__, a, b))

    assert cosine(cat, cat) == pytest.approx(1, abs=1e-3)
    assert cosine(cat, kitten) > cosine(cat, shares) + 0.2
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 10
    short = client.embeddings.create(model="minilm", input=texts[0], dimensions=64)
    assert len(short.data[0].embedding) == 64
    with pytest.raises(openai.BadRequestError, match="send texts") as refused:
        client.embeddings.create(model="minilm", input=[[1, 2, 3]])
    assert refused.value.param == "input"


# models


def test_models_are_listed_and_shown(client):
    listed = [model.id for model in client.models.list()]
    assert set(listed) == {SAMPLE, "letters", "minilm", "seeing", "thinking"}
    shown = client.models.retrieve(SAMPLE)
    assert (shown.id, shown.object, shown.owned_by) == (SAMPLE, "model", "modeld")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


# errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"extra_body": {"keep_alive": "soon"}}, "keep_alive"),
    ],
)
def test_a_wrong_field_is_a_bad_request_that_names_it(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**(GREEDY | fields))
    assert refused.value.param == param and param in refused.value.message
    assert (refused.value.code, refused.value.type) == ("invalid_request", "invalid_request_error")


def test_other_refusals(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**(GREEDY | {"model": "nothing"}))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.list(extra_headers={"Origin": "https://evil.example"})
    long = [{"role": "user", "content": "The cat sat on the mat. " * 1300}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**(GREEDY | {"messages": long}), stream=stream)
        assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="can't do chat, only embed"):
        client.chat.completions.create(**(GREEDY | {"model": "minilm"}))
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model=SAMPLE, prompt="a", echo=True)
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model=SAMPLE, prompt="a", best_of=3)


def test_a_full_queue_is_a_rate_limit(start_daemon):
    daemon = start_daemon(MODELD_MODELS_QUEUE_LIMIT="1", MODELD_MODELS_SLOTS="1")
    daemon.download()
    asked = GREEDY | {"max_tokens": 1000, "stream": True, "extra_body": {"ignore_eos": True}}
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client:
        running = client.chat.completions.create(**asked)
        next(running)  # it has the only slot
        waiting = threading.Thread(target=lambda: client.chat.completions.create(**asked).close())
        waiting.start()
        wait_until(lambda: daemon.model()["waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**GREEDY)
        assert refused.value.code == "queue_full"
        running.close()
        waiting.join(timeout=30)
        assert not waiting.is_alive()


def test_a_worker_that_dies_ends_a_stream_with_an_error(daemon, client):
    asked = GREEDY | {"max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**asked, stream=True)
    next(stream)
    psutil.Process(daemon.model()["worker_pid"]).kill()
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == "worker_crashed"
    assert "Paris" in text_of(client.chat.completions.create(**GREEDY))  # it is loaded again


def test_a_client_that_leaves_ends_its_request(daemon, client):
    asked = GREEDY | {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**asked, stream=True)
    next(stream)
    assert daemon.model()["in_flight"] == 1
    stream.close()
    wait_until(lambda: daemon.model()["in_flight"] == 0)


# what modeld alone knows


def test_terms_of_a_request(daemon, client):
    more = {"keep_alive": "17m", "context_length": 5000, "priority": "background"}
    client.chat.completions.create(**GREEDY, extra_body=more)
    shown = daemon.model()
    assert shown["context_length"] >= 5000
    assert 16 * 60 < shown["unloads_in_s"] <= 17 * 60
    client.chat.completions.create(**GREEDY, extra_body={"keep_alive": 0})
    wait_until(lambda: daemon.model()["state"] == "unloaded")


@pytest.mark.alone
def test_a_slow_load_keeps_streams_waiting(daemon, client):
    """The worker is halted while it loads: headers and comments come all the same."""
    daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/unload")
    before = {child.pid for child in daemon.children()}
    texts: list[str] = []
    resumed: list[float] = []

    def begun() -> list[psutil.Process]:
        """Return the worker; halted before it is a program of its own, it would halt the daemon."""
        found = []
        for child in daemon.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.pid not in before and "backends.worker" in child.cmdline():
                    found.append(child)
        return found

    def halt() -> None:
        wait_until(begun, step_s=0.002)
        halted = begun()
        for child in halted:
            child.suspend()
        time.sleep(7)
        resumed.append(time.monotonic())
        for child in halted:
            child.resume()

    def read() -> None:
        texts.append(streamed(client.chat.completions.create(**GREEDY, stream=True)))

    threads = [threading.Thread(target=each) for each in (halt, read)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    with client.chat.completions.with_streaming_response.create(**GREEDY, stream=True) as response:
        headers_at = time.monotonic()
        lines = list(response.iter_lines())
    for thread in threads:
        thread.join(timeout=60)
    assert began + 2.5 < headers_at < resumed[0]
    assert len([line for line in lines if line.startswith(":")]) >= 2
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in data)
    assert "Paris" in said and lines[-2:] == ["data: [DONE]", ""]
    # The library's own reader makes nothing of the comments.
    assert "Paris" in texts[0] and "waiting" not in texts[0]


def wait_until(condition, *, step_s=0.02) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(step_s)
