"""The real Ollama clients of Python, LangChain's included, drive a running daemon."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gguf_models
import ollama
import pytest
from hub import Faults, LocalHub
from json_answers import check_object
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings
from pictures import png
from pydantic import BaseModel
from running import SAMPLE, RunningDaemon
from templates import PONDERING

QUESTION = "Where is the Eiffel Tower?"
MESSAGES = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0, "num_predict": 24}
EMBEDDER = "minilm"
TOOLED = "tooled"
# A template of the kind that models have which call tools.
TOOLS_TEMPLATE = """{%- if tools %}
{{- '<|im_start|>system\\nTools:\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>\\nTo call one, answer <tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture
def daemon(furnished_daemon: RunningDaemon) -> RunningDaemon:
    return furnished_daemon


@pytest.fixture
def tooled(daemon: RunningDaemon, tmp_path: Path) -> Iterator[str]:
    """The sample model with a template that knows tools."""
    path = tmp_path / "model.gguf"
    path.hardlink_to(gguf_models.smollm2())
    body = {"source": str(path), "unique": TOOLED, "chat_template": TOOLS_TEMPLATE}
    daemon.json("POST", "/modeld/v1/models", body | {"backend": "xllamacpp"})
    daemon.download(TOOLED)
    yield TOOLED
    daemon.json("DELETE", f"/modeld/v1/models/{TOOLED}")


@pytest.fixture
def client(daemon: RunningDaemon) -> Iterator[ollama.Client]:
    with contextlib.closing(ollama.Client(host=daemon.url)) as client:
        yield client


def openai_text(daemon: RunningDaemon, model: str = SAMPLE) -> str:
    body = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    answer = daemon.json("POST", "/v1/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"])


def test_chat_whole_and_streamed_says_what_the_openai_api_says(
    daemon: RunningDaemon, client: ollama.Client
) -> None:
    whole = client.chat(SAMPLE, MESSAGES, options=GREEDY)
    assert "Paris" in (whole.message.content or "") and whole.message.content == openai_text(daemon)
    assert whole.done and whole.done_reason in ("stop", "length")
    assert whole.eval_count and whole.prompt_eval_count and whole.total_duration
    pieces = list(client.chat(SAMPLE, MESSAGES, options=GREEDY, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert [piece.done for piece in pieces][-2:] == [False, True]
    assert pieces[-1].eval_count == whole.eval_count


def test_generate_says_the_same_and_goes_on_from_raw_text(client: ollama.Client) -> None:
    chat = client.chat(SAMPLE, MESSAGES, options=GREEDY)
    generated = client.generate(SAMPLE, QUESTION, options=GREEDY)
    assert generated.response == chat.message.content
    pieces = client.generate(SAMPLE, QUESTION, options=GREEDY, stream=True)
    assert "".join(piece.response or "" for piece in pieces) == generated.response
    raw = client.generate(SAMPLE, "1, 2, 3, 4,", raw=True, options=GREEDY)
    assert " 5, 6" in (raw.response or "")


def test_an_answer_that_fits_a_schema_and_logprobs(client: ollama.Client) -> None:
    class Place(BaseModel):
        city: str
        country: str

    answer = client.chat(
        SAMPLE, MESSAGES, format=Place.model_json_schema(), options={"temperature": 0}
    )
    assert Place.model_validate_json(answer.message.content or "").city
    answer = client.chat(SAMPLE, MESSAGES, format="json", options={"num_predict": 200, "seed": 1})
    assert isinstance(json.loads(answer.message.content or ""), dict)
    told = client.chat(SAMPLE, MESSAGES, options=GREEDY, logprobs=True, top_logprobs=2)
    # The token that ends the answer is counted, and not told.
    assert told.logprobs and told.eval_count and told.eval_count - len(told.logprobs) in (0, 1)
    assert all(each.logprob <= 0 and len(each.top_logprobs or ()) == 2 for each in told.logprobs)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
def test_a_generated_text_is_held_to_its_format(
    client: ollama.Client, raw: bool, stream: bool
) -> None:
    """The question says nothing of JSON, and nothing of what the schema has."""
    schema = {
        "type": "object",
        "properties": {"verdict": {"enum": ["granted", "denied"]}, "days": {"const": 17}},
        "required": ["verdict", "days"],
        "additionalProperties": False,
    }

    def generated(format_: Any) -> tuple[str, str | None]:
        options = {"temperature": 0, "num_predict": 100}
        fields = {"raw": raw, "format": format_, "options": options, "stream": stream}
        answer = client.generate(SAMPLE, QUESTION, **fields)
        pieces = list(answer if stream else [answer])
        return "".join(piece.response or "" for piece in pieces), pieces[-1].done_reason

    assert "{" not in generated(None)[0]
    text, reason = generated("json")
    check_object(text, cut=reason == "length")
    text, reason = generated(schema)
    assert reason == "stop"
    assert json.loads(text) in [{"verdict": each, "days": 17} for each in ("granted", "denied")]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_suffix_has_what_goes_in_between_generated(
    daemon: RunningDaemon, client: ollama.Client, stream: bool
) -> None:
    def between(suffix: str | None) -> str:
        fields = {"suffix": suffix, "raw": True, "options": GREEDY, "stream": stream}
        answer = client.generate("letters", "abc", **fields)
        return "".join(piece.response or "" for piece in (answer if stream else [answer]))

    def completed(suffix: str) -> str:
        body = {"model": "letters", "prompt": "abc", "temperature": 0, "max_tokens": 24}
        answer = daemon.json("POST", "/v1/completions", body | {"suffix": suffix})
        return str(answer["choices"][0]["text"])

    texts = {suffix: between(suffix) for suffix in ("def", "xyz")}
    assert texts == {suffix: completed(suffix) for suffix in texts}
    assert len({*texts.values(), between(None)}) == 3
    with pytest.raises(ollama.ResponseError, match="can't do infill"):
        client.generate(SAMPLE, "abc", suffix="def")


def test_the_same_seed_gives_the_same_text(client: ollama.Client) -> None:
    def text(seed: int) -> str:
        options = {"temperature": 1.5, "seed": seed, "num_predict": 24}
        return client.chat(SAMPLE, MESSAGES, options=options).message.content or ""

    assert text(7) == text(7) != text(8)


def test_a_function_is_a_tool(client: ollama.Client, tooled: str) -> None:
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
          city: where
        """
        return city

    asked = [{"role": "user", "content": "What is the weather in Paris? Call the function."}]
    answer = client.chat(tooled, asked, tools=[weather], options=GREEDY)
    assert answer.message.tool_calls or answer.message.content  # it is small: it may or may not
    without = client.chat(tooled, asked, options=GREEDY)
    assert (answer.prompt_eval_count or 0) > (without.prompt_eval_count or 0) + 30
    called = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    history = [
        *asked,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_name": "weather", "content": "It is sunny."},
    ]
    told = client.chat(tooled, history, tools=[weather], options=GREEDY)
    assert (told.prompt_eval_count or 0) > (answer.prompt_eval_count or 0) + 20
    with pytest.raises(ollama.ResponseError, match="knows no tools"):
        client.chat(SAMPLE, asked, tools=[weather])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_thoughts_are_apart_and_can_be_turned_off(
    daemon: RunningDaemon, client: ollama.Client, tmp_path: Path, stream: bool
) -> None:
    path = tmp_path / "model.gguf"
    path.hardlink_to(gguf_models.smollm2())
    body = {"source": str(path), "unique": "pondering", "chat_template": PONDERING}
    daemon.json("POST", "/modeld/v1/models", body | {"backend": "xllamacpp"})
    daemon.download("pondering")
    try:
        for think in (None, True, False):
            fields = {"options": GREEDY, "think": think, "stream": stream}
            chat = client.chat("pondering", MESSAGES, **fields)
            said = [piece.message for piece in (chat if stream else [chat])]
            generated = client.generate("pondering", QUESTION, **fields)
            pieces = list(generated if stream else [generated])
            thoughts = "".join(each.thinking or "" for each in said)
            text = "".join(each.content or "" for each in said)
            assert (thoughts == "", text != "") == (think is False, think is False)
            assert thoughts == "".join(each.thinking or "" for each in pieces)
            assert text == "".join(each.response or "" for each in pieces)
            assert "think>" not in thoughts + text
        with pytest.raises(ollama.ResponseError, match="does not think"):
            client.chat(SAMPLE, MESSAGES, think=True)
    finally:
        daemon.json("DELETE", "/modeld/v1/models/pondering")


def test_an_image_is_seen(client: ollama.Client) -> None:
    plain = client.generate("seeing", "Look", options={"temperature": 0, "num_predict": 1})

    def look(shade: int) -> tuple[float, int]:
        fields = {"options": {"temperature": 0, "num_predict": 1}, "logprobs": True}
        image = ollama.Image(value=base64.b64encode(png(shade)).decode())
        message = {"role": "user", "content": "Look", "images": [image]}
        chat = client.chat("seeing", [message], **fields)
        generated = client.generate("seeing", "Look", images=[image], **fields)
        assert chat.logprobs and generated.logprobs
        assert abs(chat.logprobs[0].logprob - generated.logprobs[0].logprob) < 0.05
        return chat.logprobs[0].logprob, chat.prompt_eval_count or 0

    (dark, tokens), (bright, _) = look(10), look(250)
    assert abs(dark - bright) > 1e-3
    assert tokens > (plain.prompt_eval_count or 0) + 8
    with pytest.raises(ollama.ResponseError, match="vision"):
        image = ollama.Image(value=base64.b64encode(png(10)).decode())
        client.generate(SAMPLE, "Look", images=[image])


def test_a_stop_sequence_and_a_template(client: ollama.Client) -> None:
    whole = client.chat(SAMPLE, MESSAGES, options=GREEDY).message.content or ""
    cut = client.chat(SAMPLE, MESSAGES, options={**GREEDY, "stop": ["Paris"]})
    assert cut.message.content == whole[: whole.index("Paris")] and cut.done_reason == "stop"
    template = "{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }}{{ .Response }}, and no more"
    fields = {"template": template, "system": "1, 2,", "options": GREEDY}
    counted = client.generate(SAMPLE, "3, 4,", **fields)
    assert " 5, 6" in (counted.response or "")


def test_how_long_a_model_stays_is_told(client: ollama.Client) -> None:
    for keep_alive, seconds in (("10m", 600), (600, 600), ("1h30m", 5400)):
        client.generate(SAMPLE, QUESTION, options={"num_predict": 1}, keep_alive=keep_alive)
        (running,) = [each for each in client.ps().models if each.model == SAMPLE]
        assert running.expires_at is not None
        stays_s = (running.expires_at - datetime.now(UTC)).total_seconds()
        assert abs(stays_s - seconds) < 10


def test_models_are_listed_shown_loaded_copied_and_removed(client: ollama.Client) -> None:
    names = {model.model for model in client.list().models}
    assert {SAMPLE, f"{EMBEDDER}:latest"} <= names
    known = client.show(SAMPLE)
    assert known.capabilities and "completion" in known.capabilities
    assert known.modelinfo and known.modelinfo["general.architecture"] == "llama"
    assert known.details and known.details.parameter_size == "134.52M"
    client.generate(SAMPLE, keep_alive="10m")
    (running,) = [model for model in client.ps().models if model.name == SAMPLE]
    assert running.size and running.context_length and running.expires_at
    client.generate(SAMPLE, keep_alive=0)
    assert SAMPLE not in {model.name for model in client.ps().models}
    client.copy(SAMPLE, "twin")
    assert client.chat("twin", MESSAGES, options=GREEDY).message.content
    client.delete("twin")
    assert {model.model for model in client.list().models} == names
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        client.chat("twin", MESSAGES)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="Modelfiles") as caught:
        client.create("mine", from_=SAMPLE)
    assert caught.value.status_code == 501


def test_a_pull_of_what_is_here_succeeds_and_of_nothing_says_so(client: ollama.Client) -> None:
    assert client.pull(SAMPLE).status == "success"
    assert [each.status for each in client.pull(SAMPLE, stream=True)][-1] == "success"
    with pytest.raises(ollama.ResponseError, match="file does not exist"):
        client.pull("nobody")


def test_a_pull_tells_its_progress_and_what_it_pulled_answers_by_that_name(
    tmp_path: Path,
) -> None:
    name = "hf.co/owner/repo:Q4_1"
    with LocalHub() as hub:
        hub.add("owner/repo", {"model-Q4_1.gguf": gguf_models.smollm2()})
        hub.faults = Faults(rate_bytes_s=16 * 2**20)
        daemon = RunningDaemon(tmp_path, HF_ENDPOINT=hub.url)
        try:
            daemon.start()
            with contextlib.closing(ollama.Client(host=daemon.url)) as client:
                told = list(client.pull(name, stream=True))
                sizes = [each.completed for each in told if each.completed is not None]
                assert len(set(sizes)) > 3 and sizes == sorted(sizes)
                totals = {each.total for each in told if each.total}
                assert told[-1].status == "success" and totals == {sizes[-1]}
                assert all(each.digest for each in told if each.completed)
                assert client.list().models
                answer = client.chat(name, MESSAGES, options=GREEDY)
                assert "Paris" in (answer.message.content or "")
        finally:
            daemon.stop()


def test_vectors(daemon: RunningDaemon, client: ollama.Client) -> None:
    texts = ["A cat sits on the mat.", "Ein Kätzchen sitzt da."]
    found = client.embed(EMBEDDER, texts)
    body = {"model": EMBEDDER, "input": texts}
    expected = [e["embedding"] for e in daemon.json("POST", "/v1/embeddings", body)["data"]]
    assert [list(vector) for vector in found.embeddings] == expected
    assert list(client.embeddings(EMBEDDER, texts[0]).embedding) == pytest.approx(
        expected[0], abs=1e-6
    )
    assert len(client.embed(EMBEDDER, texts[0], dimensions=8).embeddings[0]) == 8


async def test_many_at_once_with_the_asynchronous_client(daemon: RunningDaemon) -> None:
    """What runs beside it changes the rounding of quantized weights: these are float32."""
    async with ollama.AsyncClient(host=daemon.url) as client:

        async def one() -> str:
            stream = await client.chat("letters", MESSAGES, options=GREEDY, stream=True)
            return "".join([piece.message.content or "" async for piece in stream])

        texts = set(await asyncio.gather(*(one() for _ in range(8))))
    assert texts == {openai_text(daemon, "letters")}


def test_langchain_chats_streams_calls_and_embeds(daemon: RunningDaemon, tooled: str) -> None:
    def asking(model: str) -> ChatOllama:
        return ChatOllama(model=model, base_url=daemon.url, temperature=0, num_predict=24)

    chat, caller = asking(SAMPLE), asking(tooled)
    answer = chat.invoke(QUESTION)
    assert "Paris" in str(answer.content) and answer.usage_metadata
    assert "".join(str(piece.content) for piece in chat.stream(QUESTION)) == answer.content
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    call = {"name": "weather", "args": {"city": "Paris"}, "id": "1", "type": "tool_call"}
    history = [
        HumanMessage("What is the weather in Paris?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("It is sunny.", tool_call_id="1"),
    ]
    assert isinstance(caller.bind_tools([tool]).invoke(history), AIMessage)
    vectors = OllamaEmbeddings(model=EMBEDDER, base_url=daemon.url)
    cat, other = vectors.embed_query("a cat"), vectors.embed_documents(["a cat", "a report"])
    assert cat == pytest.approx(other[0], abs=1e-5) and cat != pytest.approx(other[1], abs=1e-2)
    for each in (chat, caller, vectors):  # they have no word of their own for that
        each._client.close()


def test_curl(daemon: RunningDaemon, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": SAMPLE, "messages": MESSAGES, "options": GREEDY}))
    curl = ["curl", "--silent", "--show-error", "--no-buffer", "--data", f"@{body}"]
    done = subprocess.run(
        [*curl, f"{daemon.url}/api/chat"], capture_output=True, text=True, check=True, timeout=60
    )
    pieces = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(piece["message"]["content"] for piece in pieces) == openai_text(daemon)
