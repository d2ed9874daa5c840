"""RAM is tracked while a model is loaded and comes back when it is unloaded."""

from __future__ import annotations

import os
import re
import time

import psutil
import pytest
from running import SAMPLE, needs_engine

MB = 1_000_000


def ask(daemon) -> None:
    body = {"model": SAMPLE, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    daemon.json("POST", "/v1/chat/completions", body)


def unload(daemon) -> None:
    daemon.json("POST", f"/model/{daemon.model()['id']}/unload")


def test_a_loaded_model_s_memory_is_measured_and_booked(sample_daemon):
    sample_daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
    shown = sample_daemon.model()
    measured = shown["measured_bytes"]
    assert shown["reserved_bytes"] == max(shown["estimate_bytes"], measured)
    # the resident set also counts the libraries that all processes share
    rss = psutil.Process(shown["worker_pid"]).memory_info().rss
    assert 0.7 * rss < measured <= rss
    assert 0.7 < shown["estimate_bytes"] / measured < 1.3
    memory = sample_daemon.json("GET", "/modeld/v1/memory")
    assert memory["reserved_bytes"] == shown["reserved_bytes"]
    assert memory["available_bytes"] <= memory["budget_bytes"] - memory["reserved_bytes"]
    assert [entry["id"] for entry in memory["models"]] == [shown["id"]]
    pieces = sample_daemon.json("GET", f"/model/{shown['id']}")
    assert pieces["loaded"] is True and pieces["ram"]["value"] == measured
    unload(sample_daemon)
    assert sample_daemon.json("GET", "/modeld/v1/memory")["reserved_bytes"] == 0


@pytest.mark.alone
def test_twenty_loads_and_unloads_leave_nothing(daemon):
    start = daemon.process.memory_info().rss
    daemon.download()
    for _ in range(20):
        ask(daemon)
        assert len(daemon.children()) == 1
        worker = psutil.Process(daemon.model()["worker_pid"])
        unload(daemon)
        ended = time.monotonic()
        while daemon.children():
            assert time.monotonic() - ended < 1, "a child is left a second after the unload"
            time.sleep(0.01)
        assert not worker.is_running()
    growth = daemon.process.memory_info().rss - start
    print(f"the daemon: {start / MB:.1f} MB at its start, {growth / MB:+.1f} MB at the end")
    assert growth < 5 * MB
    scratch = daemon.data_dir / "store" / "scratch"
    assert list(scratch.iterdir()) == []


def test_a_model_over_the_limit_is_refused_with_the_numbers(start_daemon):
    daemon = start_daemon(MODELD_MEMORY_LIMIT="100MiB")
    daemon.download()
    body = {"model": SAMPLE, "messages": [{"role": "user", "content": "x"}]}
    status, headers, text = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 503 and headers["x-should-retry"] == "false"
    needed = re.search(r"needs (1\d\d MiB), but all models together may take 100 MiB", text)
    assert needed is not None and "insufficient_memory" in text and "[memory] limit" in text
    # a refusal is no failure of the model, but what it said can be read again
    shown = daemon.model()
    assert shown["state"] == "unloaded" and needed.group() in shown["last_error"]
    assert daemon.children() == []
    assert daemon.json("GET", "/modeld/v1/memory")["reserved_bytes"] == 0


@pytest.mark.parametrize("engine", ["xllamacpp", "llama_cpp"])
def test_no_worker_opens_a_port(start_daemon, engine):
    """A child's port, picked and then opened, is a race, and others could reach its API."""
    needs_engine(engine)
    daemon = start_daemon(MODELD_MODELS_BACKEND=engine)
    daemon.download()
    ask(daemon)
    (worker,) = daemon.children()
    assert worker.pid == daemon.model()["worker_pid"] and not worker.children()
    assert worker.net_connections("inet") == []
    assert daemon.process.net_connections("tcp"), "its own listener shows that this sees them"


@pytest.mark.parametrize("engine", ["xllamacpp", "llama_cpp"])
def test_memory_is_what_the_kernel_says(start_daemon, engine):
    """Not an engine's log lines: none is read, and the figure is that of the process."""
    needs_engine(engine)
    daemon = start_daemon(MODELD_MODELS_BACKEND=engine, MODELD_SERVER_LOG_LEVEL="error")
    daemon.download()
    ask(daemon)
    shown = daemon.model()
    maps = psutil.Process(shown["worker_pid"]).memory_maps(grouped=False)
    weights = {os.path.realpath(path) for path in shown["files"]}
    outside = sum(
        each.anonymous + each.swap + (each.rss - each.anonymous if each.path in weights else 0)
        for each in maps
    )
    assert any(each.path in weights and each.rss for each in maps)
    (entry,) = daemon.json("GET", "/modeld/v1/memory")["models"]
    assert abs(entry["in_use_bytes"] / outside - 1) < 0.03, (entry, outside)
    assert entry["measured_bytes"] >= entry["in_use_bytes"]


def test_the_daemon_idles_under_60_mb(daemon):
    assert daemon.process.memory_info().rss < 60 * MB
