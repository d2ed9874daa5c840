"""LiteLLM's calls against a running daemon, as a server of OpenAI's kind and of Ollama's."""

from __future__ import annotations

import gc
import json
import os
import warnings
from types import ModuleType

import pytest
from running import SAMPLE

EIFFEL = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}
# It drops connections without closing them, and its types warn of what they hold.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning"
)


@pytest.fixture(scope="module")
def daemon(furnished_daemon):
    return furnished_daemon


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    """The library, which fetches its table of prices from the network unless told not to."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import litellm
    litellm.telemetry = False
    return litellm


@pytest.fixture(autouse=True)
async def no_connections_left(litellm):
    """Connections that it keeps outlive the loop that they were made on."""
    yield
    await litellm.close_litellm_async_clients()
    litellm.in_memory_llm_clients_cache.flush_cache()
    gc.collect()


@pytest.fixture
def options(daemon):
    base = {"api_base": f"{daemon.url}/v1", "api_key": "none", "num_retries": 0, "timeout": 60}
    return base | {"model": f"openai/{SAMPLE}", "temperature": 0, "max_tokens": 32}


def text_of(answer) -> str:
    return answer.choices[0].message.content


def streamed(chunks) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_an_answer_whole_and_in_pieces(litellm, options):
    answer = litellm.completion(messages=EIFFEL, **options)
    assert "Paris" in text_of(answer) and answer.usage.prompt_tokens == 37
    chunks = litellm.completion(
        messages=EIFFEL, stream=True, stream_options={"include_usage": True}, **options
    )
    assert streamed(chunks) == text_of(answer)


async def test_an_answer_is_awaited(litellm, options):
    # whose weights are not quantized: who else is in a batch changes no rounding
    asked = options | {"model": "openai/letters"}
    answer = await litellm.acompletion(messages=EIFFEL, seed=1, n=2, **asked)
    assert [choice.message.content for choice in answer.choices] == [text_of(answer)] * 2
    chunks = await litellm.acompletion(messages=EIFFEL, stream=True, **asked)
    assert streamed([chunk async for chunk in chunks]) == text_of(answer)


def test_a_tool_is_called_and_its_result_answered(litellm, options):
    answer = litellm.completion(
        messages=QUESTION, tools=[WEATHER], tool_choice="required", **options
    )
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees"}
    told = litellm.completion(messages=[*QUESTION, message, result], **options)
    assert text_of(told)


def test_an_answer_fits_its_schema(litellm, options):
    schema = WEATHER["function"]["parameters"] | {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    answer = litellm.completion(messages=QUESTION, response_format=form, **options)
    assert set(json.loads(text_of(answer))) == {"city"}


def test_what_modeld_alone_knows(litellm, options, daemon):
    litellm.completion(messages=EIFFEL, extra_body={"keep_alive": "17m"}, **options)
    assert 16 * 60 < daemon.model()["unloads_in_s"] <= 17 * 60


def test_a_text_is_completed(litellm, options):
    asked = options | {"model": f"text-completion-openai/{SAMPLE}", "max_tokens": 5}
    answer = litellm.text_completion(prompt="One, two, three,", **asked)
    assert answer.choices[0].text


def test_texts_are_embedded(litellm, daemon):
    found = litellm.embedding(
        model="openai/minilm",
        input=["A cat.", "A dog."],
        api_base=f"{daemon.url}/v1",
        api_key="none",
    )
    assert [len(entry["embedding"]) for entry in found.data] == [384, 384]


# as a server of Ollama's kind


@pytest.fixture(params=["ollama", "ollama_chat"])
def as_ollama(request, daemon):
    base = {"api_base": daemon.url, "num_retries": 0, "timeout": 60}
    return base | {"model": f"{request.param}/{SAMPLE}", "temperature": 0, "max_tokens": 32}


def test_an_answer_of_ollama_s_kind(litellm, as_ollama):
    answer = litellm.completion(messages=EIFFEL, **as_ollama)
    assert "Paris" in text_of(answer)
    assert answer.usage.completion_tokens > 5
    assert streamed(litellm.completion(messages=EIFFEL, stream=True, **as_ollama)) == text_of(
        answer
    )


async def test_an_answer_of_ollama_s_kind_is_awaited(litellm, as_ollama):
    answer = await litellm.acompletion(messages=EIFFEL, **as_ollama)
    chunks = await litellm.acompletion(messages=EIFFEL, stream=True, **as_ollama)
    assert "Paris" in text_of(answer)
    assert streamed([chunk async for chunk in chunks]) == text_of(answer)


def test_texts_are_embedded_in_ollama_s_way(litellm, daemon):
    found = litellm.embedding(
        model="ollama/minilm", input=["A cat.", "A dog."], api_base=daemon.url
    )
    assert [len(entry["embedding"]) for entry in found.data] == [384, 384]


def test_errors_are_the_library_s_own(litellm, options):
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=EIFFEL, **(options | {"model": "openai/nothing"}))
    with pytest.raises(litellm.BadRequestError, match="no_such_field"):
        litellm.completion(messages=EIFFEL, extra_body={"no_such_field": 1}, **options)
    long = [{"role": "user", "content": "The cat sat on the mat. " * 1300}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=long, **options)
