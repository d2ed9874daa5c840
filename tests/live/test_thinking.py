"""Whether models think before they answer: what requests say of it reaches their templates."""

from __future__ import annotations

import gguf_models
import pytest
from engines import ENGINES, add, add_to_each
from running import RunningDaemon, needs_engine
from templates import PONDERING

# The prompt's length tells what the template was told.
TELLING = """{%- for message in messages %}{{ message.content }}{% endfor %}
{%- if enable_thinking is defined %}
{{- ' a b c d' if enable_thinking else ' a b' }}
{{- ' a b c d' if thinking else ' a b' }}
{{- {'low': ' a', 'medium': ' a b', 'high': ' a b c'}[reasoning_effort] }}
{%- endif %}"""
EFFORTS = {"none": 5, "minimal": 5, "low": 9, "medium": 10, "high": 11, "xhigh": 11, "max": 11}
SAY = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon with the same telling model on each engine, and one that always thinks."""
    home = tmp_path_factory.mktemp("thinking")
    daemon = RunningDaemon(home)
    daemon.start()
    try:
        add_to_each(daemon, home, TELLING)
        for name in ("xllamacpp", "llama_cpp"):
            source = str(gguf_models.smollm2())
            add(daemon, f"pondering-{name}", source, backend=name, chat_template=PONDERING)
        yield daemon
    finally:
        daemon.stop()


def chat(daemon, model, **more):
    body = {"model": model, "messages": SAY, "temperature": 0, "max_tokens": 24, **more}
    return daemon.json("POST", "/v1/chat/completions", body)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_effort_reaches_the_template(daemon, engine):
    needs_engine(ENGINES[engine])
    tokens = {
        effort: chat(daemon, engine, reasoning_effort=effort, max_tokens=1)["usage"]
        for effort in EFFORTS
    }
    least = tokens["none"]["prompt_tokens"]
    each = 2 if engine in ("onnx", "ctransformers") else 1  # tokens of a letter and its space
    more = {effort: (used["prompt_tokens"] - least) / each for effort, used in tokens.items()}
    assert more == {effort: told - EFFORTS["none"] for effort, told in EFFORTS.items()}
    unsaid = chat(daemon, engine, max_tokens=1)["usage"]["prompt_tokens"]
    if engine != "xllamacpp":  # which has a switch of its own, that is on
        assert (least - unsaid) / each == EFFORTS["none"]


def test_what_always_thinks_does_not_if_it_is_told_so(daemon):
    thought = chat(daemon, "pondering-xllamacpp")["choices"][0]["message"]
    assert thought["reasoning_content"] and not thought["content"]
    said = chat(daemon, "pondering-xllamacpp", reasoning_effort="none")["choices"][0]["message"]
    assert said["content"] and "reasoning_content" not in said
    # llama_cpp does not tell thoughts from text: what is said shows how the prompt ended.
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for effort, end in ((None, ""), ("none", "</think>\n\n")):
        answer = chat(daemon, "pondering-llama_cpp", reasoning_effort=effort)
        body = {"model": "pondering-llama_cpp", "prompt": prompt + end, "max_tokens": 24}
        raw = daemon.json("POST", "/v1/completions", body | {"temperature": 0})
        assert answer["choices"][0]["message"]["content"] == raw["choices"][0]["text"]
        assert answer["usage"]["prompt_tokens"] == raw["usage"]["prompt_tokens"]
