"""Where memory is scarce, models take turns: nothing is killed, and nothing comes out wrong.

The daemon runs in a control group of its own with a memory limit; where a test can't make one, it
has a configured budget instead.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroups import Group, limited
from running import SAMPLE, RunningDaemon, another

from daemon.memory.measure import private_bytes, worker_use

MIB = 1024**2
QUESTIONS = (
    "Where is the Eiffel Tower?",
    "What is the color of the sky?",
    "Name a fruit.",
    "How many legs does a dog have?",
)
SECONDS = float(os.environ.get("SCARCE_SECONDS", "180"))


@contextlib.contextmanager
def daemon_of(home: Path, size_bytes: int, **settings: str) -> Iterator[tuple]:
    """A daemon that has `size_bytes` for all it does, and its group if it has one."""
    with limited(size_bytes) as group:
        if group is None:
            settings["MODELD_MEMORY_LIMIT"] = str(size_bytes * 3 // 4)
        daemon = RunningDaemon(home, **settings)
        daemon.before = group.command() if group is not None else []
        daemon.start()
        try:
            yield daemon, group
        finally:
            daemon.stop()


def copies(daemon: RunningDaemon, folder: Path, count: int) -> list[str]:
    """Import models that have the sample's weights, each in a file of its own with other bytes."""
    (original,) = daemon.model()["files"]
    content = Path(original).read_bytes()
    names = []
    for number in range(count):
        path = folder / f"copy{number}.gguf"
        path.write_bytes(another(content, number))
        name = f"copy:{number}"
        daemon.json("POST", "/modeld/v1/models", {"source": str(path), "unique": name})
        daemon.download(name)
        names.append(name)
    return names


def ask(daemon: RunningDaemon, model: str, question: str) -> tuple[int, dict, str]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 12,
        "temperature": 0,
    }
    return daemon.request("POST", "/v1/chat/completions", body)


def answer(daemon: RunningDaemon, model: str, question: str) -> str:
    status, _, text = ask(daemon, model, question)
    assert status == 200, text
    said = text.split('"content": "')[1].split('"')[0]
    assert said.strip()
    return said


def in_use(daemon: RunningDaemon) -> int:
    """What all children, loading ones too, use of RAM, from outside: no file counts twice."""
    models = daemon.json("GET", "/modeld/v1/models")["models"]
    weights = [os.path.realpath(path) for model in models for path in model["files"]]
    files: dict[str, int] = {}
    private = 0
    for child in daemon.children():
        # Of its own memory one number that is true: a list of mappings that change while it is read
        # may tell of some twice.
        private += private_bytes(child.pid)
        files |= worker_use(child.pid, weights).files
    return private + sum(files.values())


@pytest.mark.timeout(SECONDS + 240)
def test_twelve_models_take_turns_in_600_mb(tmp_path):
    with daemon_of(tmp_path, 600 * 10**6) as (daemon, group):
        daemon.download()
        names = copies(daemon, tmp_path, 12)
        right = {question: answer(daemon, SAMPLE, question) for question in QUESTIONS}
        daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/unload")
        budget = daemon.json("GET", "/modeld/v1/memory")["budget_bytes"]
        until = time.monotonic() + SECONDS
        answered: list[str] = []
        refused: list[dict] = []
        wrong: list[object] = []
        peaks: list[int] = []

        def client(number: int) -> None:
            turns = itertools.islice(itertools.cycle(names), number, None)
            questions = itertools.islice(itertools.cycle(QUESTIONS), number, None)
            for model, question in zip(turns, questions, strict=False):
                if time.monotonic() > until:
                    return
                status, headers, text = ask(daemon, model, question)
                if status == 200 and right[question] in text:
                    answered.append(model)
                elif status in (429, 503) and "retry-after" in headers:
                    refused.append(headers)
                    time.sleep(0.5)
                else:
                    wrong.append((model, question, status, text))

        def watch() -> None:
            while time.monotonic() < until:
                peaks.append(in_use(daemon))
                time.sleep(0.2)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        threads.append(threading.Thread(target=watch))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(
            f"{len(answered)} answers, {len(refused)} refusals; at most {max(peaks) / 1e6:.0f} MB "
            f"in use of a budget of {budget / 1e6:.0f} MB; {min_count(answered, names)} answers "
            f"at least of each model"
        )
        assert wrong == []
        assert len(answered) > SECONDS / 3 and min_count(answered, names) > 0
        assert max(peaks) <= budget
        if group is not None:
            assert group.oom_kills == 0
        assert daemon.alive and "failed" not in {
            model["state"] for model in daemon.json("GET", "/modeld/v1/models")["models"]
        }


def min_count(answered: list[str], names: list[str]) -> int:
    return min(answered.count(name) for name in names)


EATER = """
import mmap, sys, time
eaten = []
for line in sys.stdin:
    block = mmap.mmap(-1, int(line), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(block), mmap.PAGESIZE):
        block[at] = 1
    eaten.append(block)
    print("eaten", flush=True)
"""


class Eater:
    """A program that takes memory when told to."""

    def __init__(self, group: Group) -> None:
        self._process = subprocess.Popen(
            [*group.command(), sys.executable, "-c", EATER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def eat(self, size_bytes: int) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{size_bytes}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "eaten\n"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=10)


@pytest.mark.alone
def test_idle_models_leave_within_2_s_when_another_program_eats_the_memory(tmp_path):
    settings = {"MODELD_MEMORY_WATERMARK": "200MB", "MODELD_MODELS_CONTEXT_LENGTH": "1024"}
    with daemon_of(tmp_path, 1200 * 10**6, MODELD_MODELS_SLOTS="1", **settings) as (daemon, group):
        if group is None:
            pytest.skip("no control group can be made here")
        daemon.download()
        names = copies(daemon, tmp_path, 2)
        for name in (SAMPLE, *names):
            answer(daemon, name, QUESTIONS[0])
        busy: list[str] = []
        body = {
            "model": SAMPLE,
            "messages": [{"role": "user", "content": "Write a long story."}],
            "max_tokens": 600,
            "ignore_eos": True,
        }
        long = threading.Thread(
            target=lambda: busy.append(daemon.request("POST", "/v1/chat/completions", body)[2])
        )
        long.start()
        while daemon.model()["in_flight"] == 0:
            time.sleep(0.02)
        eater = Eater(group)
        try:
            spare = daemon.json("GET", "/modeld/v1/memory")["spare_bytes"]
            eater.eat(spare - 20 * 10**6)  # without both idle models there is enough again
            began = time.monotonic()
            while any(daemon.model(name)["worker_pid"] for name in names):
                assert time.monotonic() - began < 2, "idle models are still there after 2 s"
                time.sleep(0.02)
            print(f"idle models left within {time.monotonic() - began:.2f} s")
            long.join()
            assert '"completion_tokens": 600' in busy[0], busy
            assert group.oom_kills == 0 and daemon.alive
        finally:
            eater.end()
        # and come back when there is room again
        assert answer(daemon, names[0], QUESTIONS[0])
