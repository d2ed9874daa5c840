"""Chat templates that know a user and an assistant in turns alone, and what else is said."""

from __future__ import annotations

import json

import gguf_models
import pytest
from engines import ENGINES, add, add_to_each
from running import RunningDaemon, needs_engine
from templates import ALTERNATES

CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
# What is said, and the same in turns of the user and the assistant.
CONVERSATIONS = [
    (
        [("system", "Be brief."), ("user", "Hello")],
        [("user", "Be brief.\nHello")],
    ),
    (
        [("user", "One."), ("user", "Two."), ("assistant", "Three."), ("user", "Four.")],
        [("user", "One.\nTwo."), ("assistant", "Three."), ("user", "Four.")],
    ),
    (
        [("assistant", "How can I help?"), ("user", "Hello")],
        [("user", ""), ("assistant", "How can I help?"), ("user", "Hello")],
    ),
    (
        [("user", "When?"), ("assistant", CALL), ("tool", "At noon."), ("user", "Thanks.")],
        [
            ("user", "When?"),
            ("assistant", '{"name": "now", "arguments": {}}'),
            ("user", "At noon.\nThanks."),
        ],
    ),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon with a model on each engine whose template insists on turns, and one that fails."""
    home = tmp_path_factory.mktemp("turns")
    daemon = RunningDaemon(home)
    daemon.start()
    try:
        add_to_each(daemon, home, ALTERNATES)
        refusing = (
            "{%- if 'Hello' in messages[-1].content %}"
            "{{- raise_exception('no conversation\\nis any good') }}"
            "{%- endif %}{{- messages[-1].content }}"
        )
        for name in ("xllamacpp", "llama_cpp"):
            source = str(gguf_models.smollm2())
            add(daemon, f"refusing-{name}", source, backend=name, chat_template=refusing)
        yield daemon
    finally:
        daemon.stop()


def message(role, said):
    if said is CALL:
        return {"role": role, "content": None, "tool_calls": [CALL]}
    return {"role": role, "content": said} | ({"tool_call_id": "call_1"} if role == "tool" else {})


def chat(daemon, model, conversation):
    messages = [message(role, said) for role, said in conversation]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16, "seed": 1}
    answer = daemon.json("POST", "/v1/chat/completions", body)
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(("said", "in_turns"), CONVERSATIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_conversation_is_told_in_the_turns_that_the_template_knows(
    daemon, engine, said, in_turns
):
    needs_engine(ENGINES[engine])
    assert chat(daemon, engine, said) == chat(daemon, engine, in_turns)


@pytest.mark.parametrize("engine", ["xllamacpp", "llama_cpp"])
def test_the_tokens_that_are_counted_are_those_of_the_turns(daemon, engine):
    needs_engine(ENGINES[engine])
    said, _ = CONVERSATIONS[-1]
    items = [
        {"role": "user", "content": "When?"},
        {"type": "function_call", "call_id": "call_1", **CALL["function"]},
        {"type": "function_call_output", "call_id": "call_1", "output": "At noon."},
        {"role": "user", "content": "Thanks."},
    ]
    body = {"model": engine, "input": items}
    counted = daemon.json("POST", "/v1/responses/input_tokens", body)["input_tokens"]
    assert counted == chat(daemon, engine, said)[1]


@pytest.mark.parametrize("engine", ["xllamacpp", "llama_cpp"])
def test_a_refusal_of_all_is_told_in_the_template_s_own_words(daemon, engine):
    needs_engine(ENGINES[engine])
    body = {"model": f"refusing-{engine}", "messages": [message("user", "Hello")]}
    status, _, text = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400
    words = json.loads(text)["error"]["message"]
    assert words == "the chat template refused: no conversation\nis any good"
