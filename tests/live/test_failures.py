"""kill -9, clients that leave, health under load: real signals on the real engine."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Self

import psutil
import pytest
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub
from running import SAMPLE, needs_engine

LONG = {
    "model": SAMPLE,
    "messages": [{"role": "user", "content": "Write a long story about a dog."}],
    "max_tokens": 3000,
    "ignore_eos": True,
    "stream": True,
}
SHORT = {
    "model": SAMPLE,
    "messages": [{"role": "user", "content": "Where is the Eiffel Tower?"}],
    "temperature": 0,
    "max_tokens": 24,
}


class Stream:
    """A streaming request that is read line by line."""

    def __init__(self, daemon, body) -> None:
        self.connection = http.client.HTTPConnection(*daemon.host_port, timeout=60)
        payload = json.dumps(body)
        self.connection.request(
            "POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"}
        )

    def lines(self):
        with self.connection.getresponse() as response:
            assert response.status == 200, response.read()
            while line := response.readline():
                if line.startswith(b"data: "):
                    yield line[6:].strip()

    def leave(self) -> None:
        """Go away for good, in the middle of whatever it is."""
        if self.connection.sock is not None:
            with contextlib.suppress(OSError):
                self.connection.sock.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


def wait_for(condition, seconds: float, what: str) -> float:
    """Wait until `condition()`; return the seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, what
        time.sleep(0.005)
    return time.monotonic() - start


@pytest.fixture
def loaded(sample_daemon):
    sample_daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
    return sample_daemon


@pytest.mark.alone
def test_kill_9_of_a_worker_mid_stream(loaded, tmp_path):
    with Stream(loaded, LONG) as stream:
        lines = stream.lines()
        for _ in range(10):
            next(lines)
        pid = loaded.model()["worker_pid"]
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        last = list(lines)[-1]
        assert time.monotonic() - killed < 1
    error = json.loads(last)["error"]
    assert error["code"] == "worker_crashed" and "SIGKILL" in error["message"]
    # the API and `modeld ps` tell a crash from an unload
    shown = loaded.model()
    assert shown["state"] == "failed" and "SIGKILL" in shown["last_error"]
    assert shown["reserved_bytes"] == 0 and shown["worker_pid"] is None
    listed = loaded.command("ps")
    assert "failed" in listed.stdout and "crashed" in listed.stdout
    # other surfaces live on, and the next request loads the model again
    assert loaded.request("GET", "/health")[0] == 200
    assert (
        "Paris"
        in loaded.json("POST", "/v1/chat/completions", SHORT)["choices"][0]["message"]["content"]
    )
    again = loaded.model()
    assert again["state"] == "ready" and again["worker_pid"] != pid and not again["last_error"]
    loaded.json("POST", f"/modeld/v1/models/{SAMPLE}/unload")
    assert loaded.model()["state"] == "unloaded"
    assert "failed" not in loaded.command("ps").stdout


def test_kill_9_of_a_worker_leaves_another_model_s_requests_alone(start_daemon, sample_daemon):
    daemon = sample_daemon
    path = daemon.model()["files"][0]
    daemon.json("POST", "/modeld/v1/models", {"source": path, "unique": "twin"})
    daemon.download("twin")
    try:
        with Stream(daemon, LONG | {"model": "twin"}) as ours, Stream(daemon, LONG) as theirs:
            reading, crashing = ours.lines(), theirs.lines()
            for _ in range(3):
                next(reading)
                next(crashing)
            os.kill(daemon.model()["worker_pid"], signal.SIGKILL)
            assert "worker_crashed" in list(crashing)[-1].decode()
            for _ in range(20):
                assert "error" not in json.loads(next(reading))
            reading.close()
    finally:
        daemon.json("POST", "/modeld/v1/models/twin/unload")
        daemon.json("DELETE", "/modeld/v1/models/twin")
    assert daemon.model()["downloaded"], "the twin shared its file with the sample model"
    assert os.path.exists(path)


@pytest.mark.alone
def test_kill_9_of_the_daemon_leaves_no_child_and_loses_no_download(start_daemon):
    daemon = start_daemon()
    daemon.download()
    with Stream(daemon, LONG) as stream:
        lines = stream.lines()
        next(lines)
        identity = daemon.request("GET", "/.well-known/health")[2]
        worker = psutil.Process(daemon.model()["worker_pid"])
        daemon.kill()
        wait_for(lambda: not running(worker), 1, "the worker outlived the daemon by a second")
        lines.close()
    daemon.start()
    assert daemon.request("GET", "/.well-known/health")[2] == identity
    assert daemon.model()["downloaded"] and daemon.model()["state"] == "unloaded"
    answer = daemon.json("POST", "/v1/chat/completions", SHORT)
    assert "Paris" in answer["choices"][0]["message"]["content"]


@pytest.mark.alone
def test_kill_9_of_the_daemon_mid_download_leaves_nothing_that_looks_like_a_model(
    start_daemon, tmp_path
):
    facts = {"general.architecture": "llama", "llama.context_length": 512}
    content = write_gguf(tmp_path / "x.gguf", facts, [Tensor(dimensions=(1024, 1024))]).read_bytes()
    with LocalHub() as hub:
        hub.add("owner/repo", {"model.gguf": content})
        hub.faults = Faults(rate_bytes_s=500_000)
        daemon = start_daemon(HF_ENDPOINT=hub.url)
        body = {"source": "hf:owner/repo/model.gguf", "unique": "mine"}
        daemon.json("POST", "/modeld/v1/models", body)
        daemon.json("POST", "/modeld/v1/models/mine/download")
        jobs = "/modeld/v1/downloads"
        wait_for(
            lambda: daemon.json("GET", jobs)["downloads"][0]["done_bytes"] > 0, 30, "no byte came"
        )
        (fetcher,) = daemon.children()
        daemon.kill()
        wait_for(lambda: not running(fetcher), 1, "the fetcher outlived the daemon by a second")
        daemon.start()
        shown = daemon.model("mine")
        assert shown["downloading"] and not shown["downloaded"], "it goes on by itself"
        store = daemon.data_dir / "store"
        for folder in ("blobs", "models"):
            assert [path for path in (store / folder).rglob("*") if path.is_file()] == []
        hub.faults = Faults()
        daemon.download("mine")
        assert Path(daemon.model("mine")["files"][0]).read_bytes() == content


def test_sigterm_tells_every_client_how_its_work_ended(start_daemon):
    daemon = start_daemon()
    daemon.download()
    with Stream(daemon, LONG) as stream:
        lines = stream.lines()
        next(lines)
        stopping = threading.Thread(target=daemon.stop)
        stopping.start()
        last = json.loads(list(lines)[-1])
        stopping.join(timeout=20)
    assert "modeld is stopping" in last["error"]["message"]


@pytest.mark.alone
def test_kill_9_of_the_daemon_ends_its_probers(start_daemon, tmp_path):
    """An engine that hangs while it is imported, as the worst case."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "llama_cpp.py").write_text("import time; time.sleep(3600)")
    daemon = start_daemon(PYTHONPATH=str(tmp_path / "shadow"))
    asking = http.client.HTTPConnection(*daemon.host_port, timeout=30)
    asking.request("GET", "/modeld/v1/backends")

    def hanging() -> list[psutil.Process]:
        command = {"backends.prober", "--backend=backends.llama_cpp:LlamaCpp"}
        return [child for child in daemon.children() if command <= set(command_line(child))]

    wait_for(lambda: len(hanging()) == 1, 30, "no prober hangs")
    (prober,) = hanging()
    daemon.kill()
    asking.close()
    wait_for(lambda: not running(prober), 1, "a prober outlived the daemon by a second")


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.alone
@pytest.mark.parametrize("engine", ["xllamacpp", "llama_cpp"])
def test_a_client_that_leaves_a_long_prompt_frees_the_engine(start_daemon, engine):
    """1 s into a prompt of 3,000 tokens; with one slot, the next request has to wait for it."""
    needs_engine(engine)
    loaded = start_daemon(MODELD_MODELS_BACKEND=engine, MODELD_MODELS_SLOTS="1")
    loaded.download()
    loaded.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
    body = LONG | {"messages": [{"role": "user", "content": "The cat sat on the mat. " * 425}]}
    with Stream(loaded, body):
        time.sleep(1)
    left = time.monotonic()
    with Stream(loaded, SHORT | {"stream": True}) as following:
        lines = following.lines()
        next(lines)
        took_s = time.monotonic() - left
        assert list(lines)[-1] == b"[DONE]"
    wait_for(lambda: loaded.model()["in_flight"] == 0, 20, "a request is left")
    if took_s >= 1.5:  # this machine may be slow: then how long is the prompt as a whole?
        whole = [{"role": "user", "content": "A dog lay on the rug. " * 425}]
        began = time.monotonic()
        loaded.json("POST", "/v1/chat/completions", SHORT | {"messages": whole, "max_tokens": 1})
        assert took_s < (time.monotonic() - began) / 4


def test_fifty_requests_for_an_unloaded_model(sample_daemon):
    sample_daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/unload")
    pids, texts, done = set(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            pids.update(child.pid for child in sample_daemon.children() if is_worker(child))
            time.sleep(0.02)

    def ask() -> None:
        answer = sample_daemon.json("POST", "/v1/chat/completions", SHORT)
        texts.append(answer["choices"][0]["message"]["content"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=110)
    done.set()
    watcher.join()
    assert len(texts) == 50 and len(set(texts)) == 1
    assert len(pids) == 1


def is_worker(process: psutil.Process) -> bool:
    try:
        return "backends.worker" in process.cmdline()
    except psutil.Error:
        return False


def heads(daemon, count: int) -> list[float]:
    """The seconds of `count` HEAD requests, each on a connection of its own."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        connection = http.client.HTTPConnection(*daemon.host_port, timeout=10)
        connection.request("HEAD", "/.well-known/health")
        assert connection.getresponse().status == 200
        connection.close()
        seconds.append(time.perf_counter() - start)
    return seconds


@pytest.mark.alone
def test_health_answers_within_100_ms_while_a_generation_uses_every_core(loaded):
    streams = [Stream(loaded, LONG) for _ in range(4)]
    readers = [threading.Thread(target=lambda s=s: drain(s), daemon=True) for s in streams]
    for reader in readers:
        reader.start()
    wait_for(lambda: loaded.model()["in_flight"] == 4, 30, "the streams did not start")
    slowest: list[float] = []
    slow: list[float] = []  # a halt comes once; what the daemon itself does comes again
    while not slowest or (min(slowest) >= 0.1 and len(slowest) < 3):  # another program may halt it
        seconds = heads(loaded, 1000)
        slow += [each for each in seconds if each >= 0.1]
        slowest.append(max(seconds))
        assert loaded.model()["in_flight"] > 0, "the generation ended before the measurement"
    for stream in streams:
        stream.leave()
    assert min(slowest) < 0.1 and len(slow) <= 3, f"slowest {slowest} s"
    wait_for(lambda: loaded.model()["in_flight"] == 0, 20, "requests are left")


def drain(stream: Stream) -> None:
    try:
        for _ in stream.lines():
            pass
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        pass  # the test left


@pytest.mark.alone
def test_health_answers_within_100_ms_while_a_model_loads(sample_daemon):
    stop, states = threading.Event(), set()

    def load_again_and_again() -> None:
        while not stop.is_set():
            sample_daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
            sample_daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/unload")

    loader = threading.Thread(target=load_again_and_again)
    loader.start()
    slowest: list[float] = []
    slow: list[float] = []  # a halt comes once; what the daemon itself does comes again
    while not slowest or (min(slowest) >= 0.1 and len(slowest) < 3):  # another program may halt it
        seconds = []
        for _ in range(100):
            seconds += heads(sample_daemon, 10)
            states.add(sample_daemon.model()["state"])
        slow += [each for each in seconds if each >= 0.1]
        slowest.append(max(seconds))
    stop.set()
    loader.join(timeout=60)
    assert "loading" in states
    assert min(slowest) < 0.1 and len(slow) <= 3, f"slowest {slowest} s"
