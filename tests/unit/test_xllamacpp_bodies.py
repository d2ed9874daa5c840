"""The JSON of xllamacpp's engine."""

from __future__ import annotations

import pytest

from backends.contract import (
    BackendError,
    ChatRequest,
    CompleteRequest,
    Delta,
    Sampling,
    TokenLogprob,
    ToolCall,
)
from backends.xllamacpp import bodies

MESSAGES = ({"role": "user", "content": "Hi"},)


def test_only_what_was_asked_for_is_sent():
    body = bodies.chat_body(ChatRequest(messages=MESSAGES))
    assert body == {
        "messages": list(MESSAGES),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
    }


def test_zeros_are_sent():
    body = bodies.chat_body(
        ChatRequest(messages=MESSAGES, sampling=Sampling(temperature=0, seed=0, top_k=0))
    )
    assert (body["temperature"], body["seed"], body["top_k"]) == (0, 0, 0)


def test_any_json_object_is_a_schema_too():
    request = ChatRequest(messages=MESSAGES, sampling=Sampling(json_schema={}))
    assert bodies.chat_body(request)["json_schema"] == {"type": "object"}


def test_the_engine_is_to_tell_which_stop_sequence_it_was():
    body = bodies.chat_body(ChatRequest(messages=MESSAGES, sampling=Sampling(stop=("a", "b"))))
    assert (body["stop"], body["verbose"]) == (["a", "b"], True)
    assert bodies.stopping_word({"choices": [], "__verbose": {"stopping_word": "b"}}) == "b"
    assert bodies.stopping_word({"choices": []}) == ""


def test_biases_go_by_token():
    request = ChatRequest(messages=MESSAGES, sampling=Sampling(logit_bias={7: -100.0}))
    assert bodies.chat_body(request)["logit_bias"] == [[7, -100.0]]


def test_logprobs_without_alternatives_still_ask_for_one():
    chat = ChatRequest(messages=MESSAGES, sampling=Sampling(logprobs=0))
    assert bodies.chat_body(chat)["top_logprobs"] == 1
    text = CompleteRequest(prompt="a", sampling=Sampling(logprobs=0))
    assert bodies.complete_body(text, None)["n_probs"] == 1


def test_a_middle_comes_after_what_is_around_it():
    body = bodies.complete_body(CompleteRequest(prompt="a", suffix="b"), (1, 2, 3))
    assert body["prompt"] == [1, "a", 2, "b", 3]
    empty = bodies.complete_body(CompleteRequest(prompt="", suffix=""), (1, 2, 3))
    assert empty["prompt"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (CompleteRequest(prompt=""), "prompt is empty"),
        (CompleteRequest(prompt="a", suffix=""), "can't fill in: leave out `suffix`"),
    ],
)
def test_what_the_model_cannot_do_is_refused(request_, words):
    with pytest.raises(BackendError, match=words):
        bodies.complete_body(request_, None)


def test_a_delta_takes_what_is_there():
    sampling = Sampling(logprobs=1)
    entry = {"token": "a", "logprob": -0.1, "bytes": [97]}
    choice = {
        "delta": {
            "content": "a",
            "reasoning_content": "b",
            "tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}],
        },
        "logprobs": {"content": [entry | {"top_logprobs": [entry, entry]}]},
    }
    plain = TokenLogprob(token="a", logprob=-0.1, bytes=(97,))
    assert bodies.delta(choice, sampling) == Delta(
        content="a",
        reasoning="b",
        tool_calls=(ToolCall(index=0, id="c", name="f", arguments="{"),),
        logprobs=(TokenLogprob(token="a", logprob=-0.1, bytes=(97,), top=(plain,)),),
    )


@pytest.mark.parametrize("choice", [{"delta": {}}, {"text": ""}, {"delta": {"content": None}}])
def test_a_chunk_that_says_nothing_is_no_delta(choice):
    assert bodies.delta(choice, Sampling()) is None


def test_text_of_a_completion_is_content():
    assert bodies.delta({"text": "abc", "index": 0}, Sampling()) == Delta(content="abc")


def test_an_overflow_tells_both_numbers():
    said = {"type": "exceed_context_size_error", "code": 400, "n_prompt_tokens": 99, "n_ctx": 64}
    error = bodies.error(said)
    assert error.code == "context_length_exceeded"
    assert "99 tokens" in error.message and "64" in error.message


@pytest.mark.parametrize(("code", "ours"), [(400, "invalid_request"), (500, "engine_error")])
def test_the_engine_s_own_errors_keep_their_words(code, ours):
    error = bodies.error({"code": code, "message": "no such thing"})
    assert (error.code, error.message) == (ours, "no such thing")
