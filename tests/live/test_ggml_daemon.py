"""GGML models through a whole daemon: the catalog says what their headers cannot."""

from __future__ import annotations

import json

import pytest
from ggml_files import write_ggml
from running import RunningDaemon

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon with one file under two names, with a chat template and without."""
    home = tmp_path_factory.mktemp("ggml")
    model = write_ggml(home / "old.bin", "gpt2", context_length=512)
    daemon = RunningDaemon(home)
    daemon.start()
    try:
        for name, template in (("chats", TEMPLATE), ("plain", "")):
            body = {"source": str(model), "unique": name, "chat_template": template}
            daemon.json("POST", "/modeld/v1/models", body)
            daemon.download(name)
        yield daemon
    finally:
        daemon.stop()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "chats", "messages": QUESTION}),
        ("/v1/completions", {"model": "plain", "prompt": "Hi"}),
    ],
)
def test_a_stream_is_the_whole_answer_for_the_same_seed(daemon, path, body):
    body |= {"max_tokens": 16, "seed": 3, "temperature": 1, "ignore_eos": True}
    choice = daemon.json("POST", path, body)["choices"][0]
    whole = choice["message"]["content"] if "message" in choice else choice["text"]
    _, _, text = daemon.request("POST", path, body | {"stream": True})
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    pieces = [c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices]
    assert whole and "".join(pieces) == whole
    assert choices[-1]["finish_reason"] == choice["finish_reason"] == "length"


def test_without_a_chat_template_it_says_what_would_help(daemon):
    body = {"model": "plain", "messages": QUESTION}
    status, _, text = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400 and "chat_template" in text


def test_the_model_shows_what_its_header_says(daemon):
    shown = daemon.model("plain")
    assert shown["format"] == "ggml" and shown["parameters"] > 0 and shown["quantization"]
    explained = daemon.json("GET", "/modeld/v1/models/plain/explain")
    assert explained["chosen"] == "ctransformers"


def test_an_architecture_that_the_file_is_not_of_is_refused(daemon, tmp_path):
    model = write_ggml(tmp_path / "other.bin", "gpt2", context_length=64)
    body = {"source": str(model), "unique": "wrong", "architecture": "mpt"}
    daemon.json("POST", "/modeld/v1/models", body)
    with pytest.raises(AssertionError, match="mpt"):
        daemon.download("wrong")
