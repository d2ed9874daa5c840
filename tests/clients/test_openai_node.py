"""The real npm library of OpenAI against a running daemon.

`node/openai.mjs` does the talking, once; the tests look at what it saw.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from running import SAMPLE, RunningDaemon

NODE = Path(__file__).parent / "node"
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def daemon(furnished_daemon: RunningDaemon) -> RunningDaemon:
    return furnished_daemon


@pytest.fixture(scope="module")
def seen(daemon: RunningDaemon) -> Seen:
    """What the library saw."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (NODE / "node_modules" / "openai").is_dir():
        pytest.skip("run make node-modules")
    driven = subprocess.run(
        [node, NODE / "openai.mjs", daemon.url],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert driven.returncode == 0, driven.stderr
    return json.loads(driven.stdout)


def text_of(answer: Seen) -> str:
    return answer["choices"][0]["message"]["content"]


def test_models(seen: Seen) -> None:
    assert SAMPLE in seen["models"] and "minilm" in seen["models"]
    assert seen["model"]["id"] == SAMPLE


def test_a_stream_says_what_the_whole_answer_says(seen: Seen) -> None:
    whole = text_of(seen["whole"])
    assert "Paris" in whole
    assert seen["streamed"]["text"] == seen["counted"]["text"] == seen["helper"] == whole
    assert seen["counted"]["last"]["usage"].items() >= {"prompt_tokens": 37}.items()


def test_tools(seen: Seen) -> None:
    (call,) = seen["call"]["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    (asked,) = seen["toolRun"]["asked"]
    assert set(asked) == {"city"}
    assert seen["toolRun"]["roles"][:3] == ["user", "assistant", "tool"]


def test_an_answer_fits_its_schema(seen: Seen) -> None:
    assert set(json.loads(seen["parsed"])) == {"city"}


def test_a_text_is_completed(seen: Seen) -> None:
    assert seen["completed"]["object"] == "text_completion"
    assert seen["completed"]["choices"][0]["text"]


def test_the_responses_api(seen: Seen) -> None:
    found = seen["responses"]
    assert "Paris" in found["text"] and found["pieces"] == found["text"]
    assert found["status"] in ("completed", "incomplete")
    assert found["kinds"][0] == "response.created"
    assert found["kinds"][-1] == f"response.{found['status']}"


def test_vectors(seen: Seen) -> None:
    for packed, numbers in zip(seen["packed"], seen["numbers"], strict=True):
        assert len(packed["embedding"]) == 384
        assert packed["embedding"] == pytest.approx(numbers["embedding"], abs=1e-6)


def test_errors_are_the_library_s_own(seen: Seen) -> None:
    unknown, refused = seen["unknown"], seen["refused"]
    assert (unknown["kind"], unknown["status"]) == ("NotFoundError", 404)
    assert unknown["code"] == "model_not_found"
    assert (refused["kind"], refused["param"]) == ("BadRequestError", "audio")
    assert "'audio' is not supported" in refused["message"]


def test_a_stream_that_is_broken_off_ends_its_request(seen: Seen, daemon: RunningDaemon) -> None:
    assert seen["brokenOff"] is True
    assert daemon.model()["in_flight"] == 0
