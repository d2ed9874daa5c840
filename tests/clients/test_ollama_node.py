"""The real npm library of Ollama against a running daemon.

`node/ollama.mjs` does the talking, once; the tests look at what it saw.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
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
    if not (NODE / "node_modules" / "ollama").is_dir():
        pytest.skip("run make node-modules")
    driven = subprocess.run(
        [node, NODE / "ollama.mjs", daemon.url],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert driven.returncode == 0, driven.stderr
    deadline = time.monotonic() + 10
    while daemon.json("GET", "/modeld/v1/requests")["requests"]:
        assert time.monotonic() < deadline, "the answer that was aborted goes on"
        time.sleep(0.05)
    return json.loads(driven.stdout)


def test_an_answer_is_the_same_whole_in_pieces_and_generated(
    daemon: RunningDaemon, seen: Seen
) -> None:
    text = seen["whole"]["message"]["content"]
    body = {
        "model": SAMPLE,
        "messages": [{"role": "user", "content": "Where is the Eiffel Tower?"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    answer = daemon.json("POST", "/v1/chat/completions", body)
    assert "Paris" in text and text == answer["choices"][0]["message"]["content"]
    assert "".join(piece["message"]["content"] for piece in seen["pieces"]) == text
    assert [piece["done"] for piece in seen["pieces"]][-2:] == [False, True]
    assert seen["generated"]["response"] == text


def test_an_answer_fits_a_schema(seen: Seen) -> None:
    assert set(json.loads(seen["schema"]["message"]["content"])) == {"city"}


def test_models(seen: Seen) -> None:
    assert {SAMPLE, "minilm:latest"} <= {model["name"] for model in seen["list"]["models"]}
    assert SAMPLE in {model["name"] for model in seen["running"]["models"]}
    assert seen["shown"]["model_info"]["general.architecture"] == "llama"
    assert seen["pull"][-1] == {"status": "success"}
    assert seen["copied"] == seen["removed"] == {"status": "success"}
    assert seen["version"]["version"]


def test_vectors(seen: Seen) -> None:
    cat, report = seen["embed"]["embeddings"]
    assert len(cat) == 384 and cat != report
    assert seen["embeddings"]["embedding"] == pytest.approx(cat, abs=1e-5)


def test_refusals_say_what_is_wrong(seen: Seen) -> None:
    assert seen["missing"]["status"] == 404 and "not found" in seen["missing"]["message"]
    assert seen["wrong"]["status"] == 400 and "options.temperature" in seen["wrong"]["message"]
    assert seen["create"]["status"] == 501 and "Modelfiles" in seen["create"]["message"]


def test_an_answer_that_is_aborted_ends(seen: Seen) -> None:
    """`seen` waits for its end at the daemon."""
    assert seen["aborted"]["name"] == "AbortError"
    assert 3 <= seen["aborted"]["parts"] < 500
