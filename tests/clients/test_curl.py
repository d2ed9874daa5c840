"""Plain curl: what a person types, and shell scripts do."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from running import SAMPLE, RunningDaemon

CHAT = {
    "model": SAMPLE,
    "messages": [{"role": "user", "content": "Where is the Eiffel Tower?"}],
    "temperature": 0,
    "max_tokens": 32,
}


@pytest.fixture(scope="module")
def daemon(furnished_daemon: RunningDaemon) -> RunningDaemon:
    return furnished_daemon


@pytest.fixture
def curl(daemon: RunningDaemon):
    """Return `curl(path, *arguments, body=…)`: what it prints."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def run(path, *arguments, body=None, given=""):
        data = [] if body is None else ["--data", json.dumps(body)]
        done = subprocess.run(
            ["curl", "--silent", "--show-error", *arguments, *data, f"{daemon.url}{path}"],
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    return run


def text_of(answer: str) -> str:
    return json.loads(answer)["choices"][0]["message"]["content"]


def test_a_chat_needs_no_header(curl):
    """Curl says that a body is a form's, unless told otherwise."""
    assert "Paris" in text_of(curl("/v1/chat/completions", body=CHAT))
    as_json = curl("/v1/chat/completions", "-H", "Content-Type: application/json", body=CHAT)
    assert text_of(as_json) == text_of(curl("/v1/chat/completions", body=CHAT))


def test_a_stream(curl):
    shown = curl("/v1/chat/completions", "-N", "-i", body=CHAT | {"stream": True})
    head, _, body = shown.replace("\r\n", "\n").partition("\n\n")
    assert "200 OK" in head and "Content-Type: text/event-stream" in head
    events = [line for line in body.split("\n\n") if line and line[0] != ":"]  # but comments
    assert all(event.startswith("data: ") for event in events)
    assert events.pop() == "data: [DONE]"
    deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events]
    said = "".join(delta.get("content", "") for delta in deltas)
    assert said == text_of(curl("/v1/chat/completions", body=CHAT))


def test_a_body_in_chunks(curl):
    """From a pipe, whose length curl does not know."""
    arguments = ["-X", "POST", "-H", "Transfer-Encoding: chunked", "-T", "-"]
    answer = curl("/v1/chat/completions", *arguments, given=json.dumps(CHAT))
    assert "Paris" in text_of(answer)
    large = CHAT | {"user": "x" * 21 * 1024 * 1024}
    status = ["-o", "/dev/null", "-w", "%{http_code}"]
    assert curl("/v1/chat/completions", *arguments, *status, given=json.dumps(large)) == "413"


def test_vectors(curl):
    answer = json.loads(curl("/v1/embeddings", body={"model": "minilm", "input": "A cat."}))
    assert len(answer["data"][0]["embedding"]) == 384


def test_errors(curl):
    shown = curl("/v1/chat/completions", "-i", body=CHAT | {"model": "nothing"})
    head, _, body = shown.replace("\r\n", "\n").partition("\n\n")
    assert "404 Not Found" in head and "application/json" in head
    assert json.loads(body)["error"]["code"] == "model_not_found"
    broken = json.loads(curl("/v1/chat/completions", "--data", "{"))
    assert "not JSON" in broken["error"]["message"]
    wrong = json.loads(curl("/v1/chat/completions", "-X", "GET"))
    assert "does not take GET" in wrong["error"]["message"]
