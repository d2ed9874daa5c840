"""Calls that a model itself chooses to make, one or several at once, through each real client."""

from __future__ import annotations

import contextlib
import json

import anthropic
import gguf_models
import ollama
import openai
import pytest
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI
from templates import KNOWS_TOOLS

MODEL = "calling"
WORDS = "Tell the weather of a city."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": WORDS, "parameters": SCHEMA}
CHAT_TOOL = {"type": "function", "function": FUNCTION}
RESPONSES_TOOL = {"type": "function", **FUNCTION}
ANTHROPIC_TOOL = {"name": "weather", "description": WORDS, "input_schema": SCHEMA}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
CASES = pytest.mark.parametrize("called", [["Paris"], ["Paris", "Rome"]], ids=["one", "two"])
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def daemon(furnished_daemon, tmp_path_factory):
    """The daemon, with the sample model under a template that knows tools."""
    path = tmp_path_factory.mktemp("calling") / "model.gguf"
    path.hardlink_to(gguf_models.smollm2())
    body = {"source": str(path), "unique": MODEL, "chat_template": KNOWS_TOOLS}
    furnished_daemon.json("POST", "/modeld/v1/models", body | {"backend": "xllamacpp"})
    furnished_daemon.download(MODEL)
    yield furnished_daemon
    furnished_daemon.json("DELETE", f"/modeld/v1/models/{MODEL}")


@pytest.fixture
def url(daemon) -> str:
    return daemon.url


def question(cities) -> list[dict]:
    text = "\n".join(CALL % city for city in cities)
    return [{"role": "user", "content": f"Repeat this text: {text}"}]


def cities(arguments) -> list[str]:
    return [
        json.loads(each)["city"] if isinstance(each, str) else each["city"] for each in arguments
    ]


@CASES
@STREAMED
def test_openai_chat(url, called, stream):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        fields = {"model": MODEL, "messages": question(called), "tools": [CHAT_TOOL]}
        fields |= {"temperature": 0, "max_completion_tokens": 100}
        if stream:
            with client.chat.completions.stream(**fields) as events:
                choice = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**fields).choices[0]
        calls = choice.message.tool_calls
        assert [call.function.name for call in calls] == ["weather"] * len(called)
        assert cities(call.function.arguments for call in calls) == called
        assert len({call.id for call in calls}) == len(called)
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        alone = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
        assert cities(call.function.arguments for call in alone.message.tool_calls) == called[:1]
        # Both results go back, each to its call.
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."} for call in calls
        ]
        said = choice.message.model_dump(exclude_none=True, include={"role", "tool_calls"})
        fields["messages"] = [*fields["messages"], said, *results]
        assert client.chat.completions.create(**fields).choices[0].message


@pytest.mark.parametrize("arguments", ["", '{"city": "Par', "[]"])
def test_a_call_that_was_cut_short_spoils_nothing_that_follows(url, arguments):
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": arguments}
    messages = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "It is sunny."},
    ]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        fields = {"model": MODEL, "messages": messages, "tools": [CHAT_TOOL]}
        answer = client.chat.completions.create(**fields, max_completion_tokens=8)
        assert answer.choices[0].finish_reason


@CASES
@STREAMED
def test_openai_responses(url, called, stream):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        fields = {"model": MODEL, "input": question(called), "tools": [RESPONSES_TOOL]}
        fields |= {"temperature": 0, "max_output_tokens": 100}
        if stream:
            with client.responses.stream(**fields) as events:
                response = events.get_final_response()
        else:
            response = client.responses.create(**fields)
        assert {item.type for item in response.output} == {"function_call"}
        assert {item.name for item in response.output} == {"weather"}
        assert cities(item.arguments for item in response.output) == called
        assert len({item.call_id for item in response.output}) == len(called)
        results = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "It is sunny."}
            for item in response.output
        ]
        fields["input"] = [*fields["input"], *response.output, *results]
        assert client.responses.create(**fields).status in ("completed", "incomplete")


@CASES
@STREAMED
def test_anthropic(url, called, stream):
    with anthropic.Anthropic(base_url=url, api_key="any") as client:
        fields = {"model": MODEL, "messages": question(called), "tools": [ANTHROPIC_TOOL]}
        fields |= {"max_tokens": 100, "extra_body": {"temperature": 0}}
        if stream:
            with client.messages.stream(**fields) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(**fields)
        assert {block.type for block in message.content} == {"tool_use"}
        assert {block.name for block in message.content} == {"weather"}
        assert cities(block.input for block in message.content) == called
        assert message.stop_reason == "tool_use"
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "It is sunny."}
            for block in message.content
        ]
        said = {"role": "assistant", "content": message.content}
        fields["messages"] = [*fields["messages"], said, {"role": "user", "content": results}]
        assert client.messages.create(**fields).stop_reason
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        fields |= {"messages": question(called), "tool_choice": choice}
        alone = client.messages.create(**fields)
        assert cities(block.input for block in alone.content) == called[:1]


@CASES
@STREAMED
def test_ollama(url, called, stream):
    with contextlib.closing(ollama.Client(host=url)) as client:
        options = {"temperature": 0, "num_predict": 100}
        answer = client.chat(
            MODEL, question(called), tools=[CHAT_TOOL], options=options, stream=stream
        )
        pieces = list(answer) if stream else [answer]
        calls = [call for piece in pieces for call in piece.message.tool_calls or ()]
        assert [call.function.name for call in calls] == ["weather"] * len(called)
        assert cities(call.function.arguments for call in calls) == called
        assert not "".join(piece.message.content or "" for piece in pieces)
        said = {"role": "assistant", "tool_calls": calls}
        results = [{"role": "tool", "tool_name": "weather", "content": "It is sunny."}] * len(calls)
        history = [*question(called), said, *results]
        assert client.chat(MODEL, history, tools=[CHAT_TOOL], options=options).done


async def langchain_calls(model, called) -> None:
    tooled = model.bind_tools([CHAT_TOOL])
    whole = await tooled.ainvoke(question(called))
    joined = None
    async for piece in tooled.astream(question(called)):
        joined = piece if joined is None else joined + piece
    for message in (whole, joined):
        assert [call["name"] for call in message.tool_calls] == ["weather"] * len(called)
        assert cities(call["args"] for call in message.tool_calls) == called


@CASES
async def test_langchain_openai(url, called):
    async with openai.DefaultAsyncHttpxClient() as client:
        options = {"base_url": f"{url}/v1", "api_key": "any", "http_async_client": client}
        model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=100, **options)
        await langchain_calls(model, called)


@CASES
async def test_langchain_ollama(url, called):
    model = ChatOllama(model=MODEL, base_url=url, temperature=0, num_predict=100)
    try:
        await langchain_calls(model, called)
    finally:
        await model._async_client._client.aclose()
        model._client._client.close()
