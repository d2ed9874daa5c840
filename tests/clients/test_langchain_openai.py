"""LangChain's classes for OpenAI against a running daemon."""

from __future__ import annotations

import warnings

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from running import SAMPLE

QUESTION = "Where is the Eiffel Tower?"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=10**8)


@tool
def weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"17 degrees in {city}"


@pytest.fixture(scope="module")
def daemon(furnished_daemon):
    return furnished_daemon


@pytest.fixture
async def options(daemon):
    """Connections are this test's own: those that the library keeps outlive its loop."""
    base = {"base_url": f"{daemon.url}/v1", "api_key": "none", "max_retries": 0}
    with openai.DefaultHttpxClient() as client:
        async with openai.DefaultAsyncHttpxClient() as async_client:
            yield base | {"http_client": client, "http_async_client": async_client}


@pytest.fixture
def chat(options):
    return ChatOpenAI(model=SAMPLE, temperature=0, max_tokens=64, seed=1, **options)


def test_a_message_is_answered(chat):
    answer = chat.invoke([SystemMessage("You know much."), HumanMessage(QUESTION)])
    assert "Paris" in answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["input_tokens"] > 10
    more = [HumanMessage(QUESTION), answer, HumanMessage("And who built it?")]
    assert chat.invoke(more).content


def test_a_stream_is_the_answer_in_pieces(chat):
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 5
    assert whole.content == chat.invoke(QUESTION).content
    assert whole.usage_metadata["output_tokens"] > 5


async def test_answers_at_once(options):
    """What runs beside it changes the rounding of quantized weights: these are float32."""
    chat = ChatOpenAI(model="letters", temperature=0, max_tokens=24, **options)
    answers = await chat.abatch([QUESTION] * 4)
    assert len({answer.content for answer in answers}) == 1 and len(answers[0].content) > 8
    pieces = [chunk.content async for chunk in chat.astream(QUESTION)]
    assert "".join(pieces) == answers[0].content


def test_a_tool_is_called_and_its_result_answered(chat):
    for choice in ("any", "weather"):
        calling = chat.bind_tools([weather], tool_choice=choice)
        said = calling.invoke("What is the weather in Paris?")
        (call,) = said.tool_calls
        assert call["name"] == "weather" and set(call["args"]) == {"city"}
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage) and isinstance(said, AIMessage)
    assert chat.invoke([HumanMessage("What is the weather in Paris?"), said, result]).content
    pieces = None
    for chunk in calling.stream("What is the weather in Paris?"):
        pieces = chunk if pieces is None else pieces + chunk
    assert [each["args"] for each in pieces.tool_calls] == [call["args"]]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_has_a_type(chat, method):
    # It warns of the parsed answer that it puts into its own message.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Pydantic serializer warnings")
        found = chat.with_structured_output(City, method=method).invoke("Describe Paris.")
    assert isinstance(found, City)


def test_the_responses_api(options):
    chat = ChatOpenAI(model=SAMPLE, temperature=0, use_responses_api=True, **options)
    answer = chat.invoke(QUESTION)
    assert "Paris" in answer.text
    assert "".join(chunk.text for chunk in chat.stream(QUESTION)) == answer.text


def test_texts_are_completed(options):
    # whose weights are not quantized: who else is in a batch changes no rounding
    text = OpenAI(model="letters", temperature=0, max_tokens=6, **options)
    prompts = ["The capital of Italy is", "One, two, three,"]
    assert text.batch(prompts) == [text.invoke(prompt) for prompt in prompts]
    assert "".join(text.stream(prompts[0])) == text.invoke(prompts[0])


async def test_texts_are_embedded(options):
    # or it would send the tokens of a model of OpenAI, after asking the network for them
    embeddings = OpenAIEmbeddings(model="minilm", check_embedding_ctx_length=False, **options)
    vectors = embeddings.embed_documents(["A cat.", "A dog."])
    assert [len(vector) for vector in vectors] == [384, 384]
    assert embeddings.embed_query("A cat.") == pytest.approx(vectors[0], abs=1e-5)
    assert await embeddings.aembed_query("A dog.") == pytest.approx(vectors[1], abs=1e-5)


def test_tokens_instead_of_texts_are_refused_in_words(options):
    embeddings = OpenAIEmbeddings(model="minilm", **options)
    with pytest.raises(openai.BadRequestError, match="tokens are not supported; send texts"):
        embeddings.client.create(model="minilm", input=[[101, 102]])


def test_a_prompt_that_is_too_long_is_told_apart(chat):
    with pytest.raises(ContextOverflowError):
        chat.invoke("The cat sat on the mat. " * 1300)


def test_an_unknown_model_is_said_to_be_unknown(options):
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(model="nothing", **options).invoke("Hi")
