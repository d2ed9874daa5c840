"""Both GGUF engines on the real model, through a running daemon."""

from __future__ import annotations

import json
import threading

import pytest
from running import SAMPLE, RunningDaemon, needs_engine

EIFFEL = [{"role": "user", "content": "Where is the Eiffel Tower?"}]


@pytest.fixture(scope="module", params=["xllamacpp", "llama_cpp"])
def engine(request, tmp_path_factory):
    """A daemon that uses one engine only, with the sample model downloaded."""
    needs_engine(request.param)
    daemon = RunningDaemon(
        tmp_path_factory.mktemp(request.param), MODELD_MODELS_BACKEND=request.param
    )
    daemon.start()
    try:
        daemon.download()
        daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
        yield daemon
    finally:
        daemon.stop()


def chat(daemon, **fields):
    body = {"model": SAMPLE, "messages": EIFFEL, "temperature": 0, "max_tokens": 32}
    return daemon.json("POST", "/v1/chat/completions", body | fields)


def text_of(answer) -> str:
    return answer["choices"][0]["message"]["content"]


def stream(daemon, **fields) -> list:
    body = {"model": SAMPLE, "messages": EIFFEL, "temperature": 0, "max_tokens": 32, "stream": True}
    status, _, text = daemon.request("POST", "/v1/chat/completions", body | fields)
    assert status == 200, text
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def streamed_text(chunks) -> str:
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


def test_the_chosen_engine_runs_the_model(engine):
    shown = engine.model()
    assert shown["state"] == "ready"
    assert shown["backend"] == engine.environment["MODELD_MODELS_BACKEND"]


def test_it_knows_where_the_eiffel_tower_is(engine):
    answer = chat(engine)
    assert "Paris" in text_of(answer)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 37
    assert answer["timings"]["predicted_ms"] > 0


def test_a_stream_has_the_same_text(engine):
    assert streamed_text(stream(engine)) == text_of(chat(engine))


def test_the_second_time_the_prompt_is_cached(engine):
    chat(engine)
    details = chat(engine)["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= 30


def test_a_stop_sequence_ends_the_text_before_it(engine):
    whole = text_of(chat(engine))
    answer = chat(engine, stop=["Paris"])
    assert text_of(answer) == whole[: whole.index("Paris")]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert streamed_text(stream(engine, stop=["Paris"])) == text_of(answer)


def test_max_tokens_ends_with_length(engine):
    answer = chat(engine, max_tokens=3)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


def test_ignore_eos_runs_to_max_tokens(engine):
    answer = chat(engine, max_tokens=80, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 80


def test_the_same_seed_gives_the_same_text(engine):
    first = text_of(chat(engine, temperature=1.5, seed=7))
    assert text_of(chat(engine, temperature=1.5, seed=7)) == first
    assert streamed_text(stream(engine, temperature=1.5, seed=7)) == first
    others = {text_of(chat(engine, temperature=1.5, seed=seed)) for seed in (1, 2, 3)}
    assert others != {first}


def test_an_emoji_is_never_broken(engine):
    asked = [{"role": "user", "content": "Repeat exactly: 🦙🇫🇷 café 日本語"}]
    chunks = stream(engine, messages=asked, max_tokens=48)
    assert "\ufffd" not in streamed_text(chunks)
    assert streamed_text(chunks) == text_of(chat(engine, messages=asked, max_tokens=48))


def test_a_prompt_beyond_the_context_says_both_numbers(engine):
    asked = [{"role": "user", "content": "The cat sat on the mat. " * 1300}]
    body = {"model": SAMPLE, "messages": asked}
    for streaming in (False, True):
        status, _, text = engine.request(
            "POST", "/v1/chat/completions", body | {"stream": streaming}
        )
        error = json.loads(text)["error"]
        assert status == 400 and error["code"] == "context_length_exceeded"
        for number in ("9131", "4096", "8192"):  # its own, what is loaded, what the model has
            assert number in error["message"]


def test_sixteen_at_once_answer_as_one_alone_does(engine):
    alone = text_of(chat(engine))
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(text_of(chat(engine)))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert texts == [alone] * 16


def test_both_engines_give_the_same_greedy_text(engine, sample_daemon):
    """The session's daemon chose its engine by itself."""
    assert text_of(chat(engine)) == text_of(chat(sample_daemon))
    sample_daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/unload")
