"""What xllamacpp does beyond the contract's least, on real files, through a running daemon."""

from __future__ import annotations

import base64
import json
import math
import struct
import subprocess
import sys
import zlib

import gguf
import gguf_models
import pytest
from contract_cases import artifact_of
from running import RunningDaemon
from templates import KNOWS_TOOLS

from backends.gguf import prefill_batch
from daemon.memory.measure import private_bytes

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
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


@pytest.fixture(scope="module")
def daemon(tmp_path_factory) -> RunningDaemon:
    """A daemon of which every model runs on xllamacpp."""
    daemon = RunningDaemon(tmp_path_factory.mktemp("xllamacpp"), MODELD_MODELS_BACKEND="xllamacpp")
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture(scope="module")
def add(daemon, tmp_path_factory):
    """`add(name, *writers, **options)` takes a folder that the writers fill into the catalog."""

    def add(name, *writers, chat_template="", **options) -> str:
        folder = tmp_path_factory.mktemp(name)
        for writer in writers:
            writer(folder)
        body = {"source": f"{folder}/", "unique": name, "options": options}
        body["chat_template"] = chat_template
        daemon.json("POST", "/modeld/v1/models", body)
        daemon.download(name)
        return name

    return add


def link_sample(folder):
    """The sample model, beside whatever else is in the folder."""
    (folder / "model.gguf").hardlink_to(gguf_models.smollm2())


@pytest.fixture(scope="module")
def sample(add) -> str:
    return add("sample", link_sample)


@pytest.fixture(scope="module")
def tiny(add) -> str:
    return add("tiny", gguf_models.tiny_llama)


def chat(daemon, model, **fields):
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 48} | fields
    answer = daemon.json("POST", "/v1/chat/completions", body)
    return answer["choices"][0], answer["usage"]


def text(daemon, model, **fields) -> str:
    return chat(daemon, model, **fields)[0]["message"]["content"]


# answers held to a form


def test_an_answer_fits_its_schema(daemon, sample):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    answer = json.loads(text(daemon, sample, response_format=form, max_tokens=100))
    assert set(answer) == {"city", "people"} and isinstance(answer["people"], int)


def test_json_mode_gives_an_object(daemon, sample):
    content = text(
        daemon,
        sample,
        messages=[{"role": "user", "content": "Say {} and nothing else, as JSON."}],
        response_format={"type": "json_object"},
        max_tokens=200,
    )
    assert content.lstrip().startswith("{")


def test_a_grammar_is_kept_and_a_broken_one_is_refused(daemon, sample):
    assert text(daemon, sample, grammar='root ::= "yes" | "no"') in ("yes", "no")
    body = {"model": sample, "messages": QUESTION, "grammar": "root ::= nothing"}
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400 and "grammar" in answer


def test_a_schema_that_is_none_is_refused(daemon, sample):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "poem"}}}
    body = {"model": sample, "messages": QUESTION, "response_format": form}
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400 and "poem" in answer


# tools


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "news"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_a_call_that_is_required_is_made(daemon, sample, choice, names, stream):
    fields = {"tools": [WEATHER, NEWS], "tool_choice": choice, "max_tokens": 200}
    if stream:
        body = {"model": sample, "messages": QUESTION, "temperature": 0, "stream": True} | fields
        _, _, answer = daemon.request("POST", "/v1/chat/completions", body)
        lines = [line[6:] for line in answer.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        calls = [call for c in choices for call in c["delta"].get("tool_calls", ())]
        reason = choices[-1]["finish_reason"]
    else:
        found, _ = chat(daemon, sample, **fields)
        calls, reason = found["message"]["tool_calls"], found["finish_reason"]
    assert reason == "tool_calls" and len(calls) == 1
    assert calls[0]["function"]["name"] in names and calls[0]["id"]
    arguments = json.loads(calls[0]["function"]["arguments"])
    if calls[0]["function"]["name"] == "weather":
        assert isinstance(arguments["city"], str)


def test_a_call_of_a_tool_with_definitions_is_made(daemon, sample):
    """As Pydantic writes nested models."""
    city = {"type": "object", "properties": {"name": {"enum": ["Paris"]}}, "required": ["name"]}
    parameters = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/City"}},
        "required": ["city"],
        "$defs": {"City": city},
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    found, _ = chat(daemon, sample, tools=[tool], tool_choice="required", max_tokens=100)
    (call,) = found["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] == {"name": "Paris"}


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": f'root ::= {"(" * 30_000}"a"{")" * 30_000}'},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"type": "string", "maxLength": 10**6}},
            }
        },
    ],
)
def test_what_would_take_the_engine_down_is_refused(daemon, sample, fields):
    text(daemon, sample, max_tokens=1)
    pid = daemon.model(sample)["worker_pid"]
    body = {"model": sample, "messages": QUESTION} | fields
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400, answer
    assert text(daemon, sample, max_tokens=1) and daemon.model(sample)["worker_pid"] == pid


def test_a_call_that_does_not_fit_max_tokens_ends_with_length(daemon, sample):
    found, _ = chat(daemon, sample, tools=[WEATHER], tool_choice="required", max_tokens=3)
    assert found["finish_reason"] == "length" and "tool_calls" not in found["message"]


def test_a_conversation_goes_on_after_a_call(daemon, sample):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "It rains."},
    ]
    assert text(daemon, sample, messages=messages)


def test_a_template_without_tools_says_so_when_the_choice_is_open(daemon, sample):
    body = {"model": sample, "messages": QUESTION, "tools": [WEATHER]}
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400 and "tool_choice" in answer


@pytest.fixture(scope="module")
def knowing(add) -> str:
    """The sample model with a chat template that knows tools."""
    return add("knowing", link_sample, chat_template=KNOWS_TOOLS)


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_may_choose_to_call(daemon, knowing, stream):
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    messages = [{"role": "user", "content": f"Repeat this text: {text}"}]
    fields = {"messages": messages, "tools": [WEATHER], "max_tokens": 60}
    if stream:
        body = {"model": knowing, "temperature": 0, "stream": True} | fields
        _, _, answer = daemon.request("POST", "/v1/chat/completions", body)
        lines = [line[6:] for line in answer.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        pieces = [call for c in choices for call in c["delta"].get("tool_calls", ())]
        name = pieces[0]["function"]["name"]
        arguments = "".join(piece["function"]["arguments"] for piece in pieces)
        reason = choices[-1]["finish_reason"]
    else:
        found, _ = chat(daemon, knowing, **fields)
        (call,) = found["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        reason = found["finish_reason"]
    assert (name, json.loads(arguments), reason) == ("weather", {"city": "Paris"}, "tool_calls")


def test_a_model_may_choose_not_to_call(daemon, knowing):
    found, _ = chat(daemon, knowing, tools=[WEATHER])
    assert found["message"]["content"] and "tool_calls" not in found["message"]
    assert found["finish_reason"] in ("stop", "length")


# tokens


def test_logprobs_are_those_of_the_tokens_of_the_answer(daemon, sample):
    found, _ = chat(daemon, sample, logprobs=True, top_logprobs=3, max_tokens=8)
    entries = found["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == found["message"]["content"]
    for entry in entries:
        top = entry["top_logprobs"]
        assert len(top) == 3 and entry["logprob"] <= 0
        assert entry["logprob"] == max(other["logprob"] for other in top)  # it is greedy
        assert sum(math.exp(other["logprob"]) for other in top) <= 1.0001


def token_id(piece: str) -> int:
    """The id of a token of the sample model, from its file."""
    fields = gguf.GGUFReader(gguf_models.smollm2()).fields
    tokens = fields["tokenizer.ggml.tokens"]
    return [bytes(tokens.parts[part]).decode() for part in tokens.data].index(piece)


def test_a_bias_keeps_a_token_out(daemon, sample):
    first = text(daemon, sample, max_tokens=1)
    kept_out = text(daemon, sample, max_tokens=1, logit_bias={str(token_id(first)): -100})
    assert kept_out and kept_out != first


def test_a_text_goes_on_and_an_empty_one_is_refused(daemon, sample):
    body = {"model": sample, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 8}
    assert " 5, 6" in daemon.json("POST", "/v1/completions", body)["choices"][0]["text"]
    status, _, answer = daemon.request("POST", "/v1/completions", body | {"prompt": ""})
    assert status == 400 and "empty" in answer


def test_what_goes_in_between_depends_on_what_comes_after(daemon, tiny):
    def filled(suffix):
        body = {"model": tiny, "prompt": "abc", "temperature": 0, "max_tokens": 12}
        answer = daemon.json("POST", "/v1/completions", body | {"suffix": suffix})
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]

    short, short_tokens = filled("x")
    _, long_tokens = filled("xyz")
    assert short and long_tokens == short_tokens + 2
    assert filled("x")[0] == short


def test_a_model_without_infill_says_so(daemon, sample):
    body = {"model": sample, "prompt": "a", "suffix": "b"}
    status, _, answer = daemon.request("POST", "/v1/completions", body)
    assert status == 400 and "infill" in answer


# adapters and engine options


def test_an_adapter_changes_the_text_and_at_scale_0_it_does_not(daemon, sample, add):
    strong = add("adapted", link_sample, gguf_models.adapter)
    off = add("adapted-off", link_sample, gguf_models.adapter, adapter_scale=0)
    plain = text(daemon, sample)
    assert text(daemon, off) == plain
    assert text(daemon, strong) != plain
    daemon.json("POST", f"/modeld/v1/models/{strong}/unload")
    daemon.json("POST", f"/modeld/v1/models/{off}/unload")


def test_a_quantized_kv_cache_takes_less_memory_and_still_answers(daemon, add):
    big = add("big-cache", link_sample)
    small = add("small-cache", link_sample, cache_type_k="q8_0", cache_type_v="q8_0")
    shown = [daemon.json("POST", f"/modeld/v1/models/{model}/load") for model in (big, small)]
    # The cache is each worker's own; of the weights, the kernel may give pages up at any time.
    own = [private_bytes(model["worker_pid"]) for model in shown]
    saved = own[0] - own[1]
    # Only this part: what earlier loads of these files were seen to use is in the whole as well.
    cache = [
        daemon.json("GET", f"/modeld/v1/models/{model}/estimate")["parts"]["kv_cache"]
        for model in (big, small)
    ]
    expected = cache[0] - cache[1]
    assert expected > 100e6 and saved == pytest.approx(expected, rel=0.1)
    assert text(daemon, small)
    for model in (big, small):
        daemon.json("POST", f"/modeld/v1/models/{model}/unload")


def test_flash_attention_can_be_turned_off(daemon, sample, add):
    off = add("no-flash", link_sample, flash_attention="off")
    assert "Paris" in text(daemon, off)
    daemon.json("POST", f"/modeld/v1/models/{off}/unload")


# vectors and scores


def vector(daemon, model, given: str) -> list[float]:
    body = {"model": model, "input": given}
    return daemon.json("POST", "/v1/embeddings", body)["data"][0]["embedding"]


def cosine(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_texts_that_mean_alike_have_vectors_alike(daemon, add):
    model = add("embedder", gguf_models.embedder)
    cat, kitten = vector(daemon, model, "a cat"), vector(daemon, model, "a kitten")
    assert cosine(cat, kitten) > 0.7 > 0.5 > cosine(cat, vector(daemon, model, "annual tax report"))
    body = {"model": model, "messages": QUESTION}
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400 and "can't do chat, only embed" in answer


def test_documents_are_ranked(daemon, add):
    model = add("reranker", gguf_models.reranker)
    body = {"model": model, "query": "cats", "documents": ["a cat", "tax report", "dogs"]}
    results = daemon.json("POST", "/v1/rerank", body)["results"]
    scores = [entry["relevance_score"] for entry in results]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3


# images


def png(shade: int) -> str:
    """A grey image of 56 × 56 pixels as a data URL."""
    size = gguf_models.IMAGE_SIZE

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + bytes([shade, y * 4 % 256, shade]) * size for y in range(size))
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def look(daemon, model, url) -> tuple[float, int]:
    """The log-probability of the first token, and the tokens of the prompt."""
    content = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    messages = [{"role": "user", "content": content}]
    found, usage = chat(daemon, model, messages=messages, logprobs=True, max_tokens=1)
    return found["logprobs"]["content"][0]["logprob"], usage["prompt_tokens"]


def test_a_model_with_an_image_encoder_sees(daemon, add, sample):
    model = add("seeing", link_sample, gguf_models.image_encoder)
    dark, tokens = look(daemon, model, png(10))
    assert look(daemon, model, png(10))[0] == pytest.approx(dark, abs=1e-4)
    assert abs(look(daemon, model, png(250))[0] - dark) > 1e-3
    without = chat(daemon, model, messages=[{"role": "user", "content": "What is it?"}])[1]
    assert tokens - without["prompt_tokens"] >= gguf_models.IMAGE_TOKENS
    broken = png(10)[:60]
    content = [{"type": "image_url", "image_url": {"url": broken}}]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400, answer
    body["model"] = sample
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400 and "can't do vision" in answer
    daemon.json("POST", f"/modeld/v1/models/{model}/unload")


# the engine itself

DIRECT = """
import json, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path = sys.argv[1]
p.n_ctx, p.n_parallel, p.n_gpu_layers, p.fit_params = 4096, 1, 0, False
p.n_batch = p.n_ubatch = int(sys.argv[2])
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 2
p.cache_ram_mib, p.warmup, p.verbosity, p.hostnames = 0, False, 1, ["direct.sock"]
server = xllamacpp.Server(p)
out = []
server.handle_chat_completions(json.loads(sys.argv[3]), lambda chunk: out.append(chunk) and False)
print(json.dumps(out[-1]), flush=True)
import os
os._exit(0)
"""


def test_greedy_text_is_the_engine_s_own(daemon, sample, tmp_path):

    fields = {
        "messages": [{"role": "user", "content": "Tell me about the Eiffel Tower."}],
        "temperature": 0,
        "max_tokens": 64,
    }
    batch = prefill_batch(artifact_of(gguf_models.smollm2()), 2)
    done = subprocess.run(
        [sys.executable, "-c", DIRECT, str(gguf_models.smollm2()), str(batch), json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        check=True,
    )
    direct = json.loads(done.stdout.splitlines()[-1])["choices"][0]["message"]["content"]
    found, usage = chat(daemon, sample, **fields)
    assert usage["completion_tokens"] == 64
    assert found["message"]["content"] == direct
