"""Every field of every API that says how to sample reaches the engine under its name there."""

from __future__ import annotations

import msgspec
import pytest

from backends.contract import Sampling
from daemon.api.anthropic.types import MessagesBody
from daemon.api.ollama.types import ChatBody as OllamaChat
from daemon.api.ollama.types import GenerateBody
from daemon.api.openai.responses.types import ResponseBody
from daemon.api.openai.types import ChatBody, CompletionBody

SHARED = {"temperature": 0.5, "top_p": 0.4, "top_k": 3}
MORE = {
    **SHARED,
    "min_p": 0.1,
    "seed": 7,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "repeat_penalty": 1.2,
    "stop": ["a", "b"],
}
TOLD = {**MORE, "stop": ("a", "b"), "max_tokens": 5}
MESSAGES = [{"role": "user", "content": "x"}]
CHAT = {"model": "m", "messages": MESSAGES}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPENAI_ONLY = {"ignore_eos": True, "logit_bias": {"17": -3.5}, "grammar": 'root ::= "a"'}
OPENAI_TOLD = OPENAI_ONLY | {"logit_bias": {17: -3.5}}
OPTIONS = {"options": MORE | {"num_predict": 5}}

CASES = [
    (
        ChatBody,
        CHAT | MORE | OPENAI_ONLY | {"max_completion_tokens": 5, "logprobs": True},
        TOLD | OPENAI_TOLD | {"logprobs": 0},
    ),
    (
        ChatBody,
        CHAT
        | {
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "logprobs": True,
            "top_logprobs": 4,
        },
        {"json_schema": SCHEMA, "logprobs": 4},
    ),
    (ChatBody, CHAT | {"response_format": {"type": "json_object"}}, {"json_schema": {}}),
    (ChatBody, CHAT | {"seed": -1, "stop": "a", "max_tokens": -1}, {"stop": ("a",)}),
    (
        CompletionBody,
        {"model": "m", "prompt": "x", "max_tokens": 5, "logprobs": 2} | MORE | OPENAI_ONLY,
        TOLD | OPENAI_TOLD | {"logprobs": 2},
    ),
    (
        ResponseBody,
        {
            "model": "m",
            "input": "x",
            "max_output_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.4,
            "top_logprobs": 2,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        },
        {
            "max_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.4,
            "logprobs": 2,
            "json_schema": SCHEMA,
        },
    ),
    (
        MessagesBody,
        CHAT
        | SHARED
        | {
            "max_tokens": 5,
            "stop_sequences": ["a", "b"],
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        },
        SHARED | {"max_tokens": 5, "stop": ("a", "b"), "json_schema": SCHEMA},
    ),
    (OllamaChat, CHAT | OPTIONS | {"logprobs": True, "top_logprobs": 2}, TOLD | {"logprobs": 2}),
    (OllamaChat, CHAT | {"format": SCHEMA}, {"json_schema": SCHEMA}),
    (
        GenerateBody,
        {"model": "m", "prompt": "x", "format": "json"} | OPTIONS,
        TOLD | {"json_schema": {}},
    ),
    (
        OllamaChat,
        CHAT | {"options": {"seed": -1, "top_k": -1, "num_predict": -2, "stop": [""]}},
        {"top_k": 0},
    ),
]


@pytest.mark.parametrize(("kind", "body", "told"), CASES)
def test_all_of_it_is_told_and_nothing_else(kind, body, told):
    asked = msgspec.convert(body, kind).to_backend()
    asked = asked[0] if isinstance(asked, list) else asked
    assert asked.sampling == Sampling(**told)
