"""A conversation goes on over an unload without being read again, and is nobody else's business."""

from __future__ import annotations

import http.client
import json
import os
import stat
import time
from pathlib import Path

import pytest
from running import SAMPLE, RunningDaemon, another, needs_engine

ENGINES = ["xllamacpp", "llama_cpp"]


def long_text(items: int) -> str:
    return " ".join(f"Item {number}: the number {7 * number} is here." for number in range(items))


class Conversation:
    """Turns of one conversation; each answer becomes part of the next turn."""

    def __init__(self, daemon: RunningDaemon, beginning: str, model: str = SAMPLE) -> None:
        self.daemon, self.model = daemon, model
        self.messages = [{"role": "user", "content": beginning}]
        self.usage: dict = {}
        self.first_token_s = 0.0

    def turn(self, question: str = "", **fields) -> str:
        if question:
            self.messages.append({"role": "user", "content": question})
        body = {
            "model": self.model,
            "messages": self.messages,
            "max_tokens": 12,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        connection = http.client.HTTPConnection(*self.daemon.host_port, timeout=600)
        began = time.monotonic()
        self.first_token_s, text = 0.0, ""
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        with connection.getresponse() as response:
            assert response.status == 200, response.read()
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    if piece and not self.first_token_s:
                        self.first_token_s = time.monotonic() - began
                    text += piece
                self.usage = event.get("usage") or self.usage
        connection.close()
        self.messages.append({"role": "assistant", "content": text})
        return text

    @property
    def cached(self) -> int:
        return self.usage["prompt_tokens_details"]["cached_tokens"]


def unload(daemon: RunningDaemon, name: str = SAMPLE) -> None:
    daemon.json("POST", f"/modeld/v1/models/{name}/unload")


def kept(daemon: RunningDaemon) -> list[Path]:
    return sorted((daemon.data_dir / "store" / "conversations").rglob("*.kv"))


def ready(start_daemon, *arguments, **settings) -> RunningDaemon:
    daemon = start_daemon(*arguments, **settings)
    if not daemon.model()["downloaded"]:
        daemon.download()
    return daemon


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
def test_after_an_unload_a_long_conversation_goes_on_at_once(tmp_path, engine):
    """Side by side in one run: the same turn with and without warm resume, the load in both."""
    needs_engine(engine)
    daemons = {}
    for resume in ("session", "off"):
        daemons[resume] = RunningDaemon(
            tmp_path / resume, MODELD_MODELS_BACKEND=engine, MODELD_MODELS_RESUME=resume
        )
        daemons[resume].start()
    try:
        turns = {}
        for resume, daemon in daemons.items():
            daemon.download()
            turns[resume] = Conversation(daemon, long_text(241))
            turns[resume].turn()
            assert 3500 < turns[resume].usage["prompt_tokens"] < 3700
            unload(daemon)
        for resume in daemons:
            turns[resume].turn("Which number does item 3 have?")
        warm, cold = turns["session"], turns["off"]
        share = warm.first_token_s / cold.first_token_s
        print(
            f"{engine}: first token of the next turn after {warm.first_token_s:.2f} s, without "
            f"resume {cold.first_token_s:.2f} s ({100 * share:.1f} %)"
        )
        assert warm.messages == cold.messages, "a resumed conversation says something else"
        assert cold.cached == 0 and warm.usage["prompt_tokens"] - warm.cached < 60
        assert share < 0.15
    finally:
        for daemon in daemons.values():
            daemon.stop()


def until_unloaded(daemon: RunningDaemon) -> None:
    deadline = time.monotonic() + 20
    while daemon.model()["state"] != "unloaded":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_end_of_a_keep_alive_keeps_the_conversation(start_daemon):
    daemon = ready(start_daemon)
    talk = Conversation(daemon, long_text(30))
    talk.turn(keep_alive=0)
    until_unloaded(daemon)
    talk.turn("And now?")
    assert talk.usage["prompt_tokens"] - talk.cached < 60


def test_an_eviction_keeps_the_conversation(start_daemon, tmp_path):
    daemon = ready(
        start_daemon,
        MODELD_MEMORY_LIMIT="300MiB",  # one of them, not two
        MODELD_MODELS_CONTEXT_LENGTH="2048",
        MODELD_MODELS_SLOTS="1",
    )
    other = tmp_path / "other.gguf"
    other.write_bytes(another(Path(daemon.model()["files"][0]).read_bytes(), 1))
    daemon.json("POST", "/modeld/v1/models", {"source": str(other), "unique": "other"})
    daemon.download("other")
    talk = Conversation(daemon, long_text(30))
    talk.turn()
    Conversation(daemon, "Hello", "other").turn()
    assert daemon.model()["state"] == "unloaded", "it made room"
    assert daemon.model("other")["state"] == "ready"
    talk.turn("And now?")
    assert daemon.model("other")["state"] == "unloaded"
    assert talk.usage["prompt_tokens"] - talk.cached < 60


def test_a_conversation_that_outgrows_its_context_goes_on_in_a_longer_one(start_daemon):
    daemon = ready(start_daemon, MODELD_MODELS_CONTEXT_LENGTH="1024")
    talk = Conversation(daemon, long_text(50))
    talk.turn()
    assert daemon.model()["context_length"] == 1024
    before = talk.usage["prompt_tokens"]
    assert 700 < before < 1024
    talk.turn(long_text(30))
    assert talk.usage["prompt_tokens"] > 1024
    assert daemon.model()["context_length"] == 2048
    assert talk.cached >= before, "what was said before is not read again"


def test_a_prompt_that_no_context_here_can_hold_is_refused_with_both_numbers(start_daemon):
    daemon = ready(start_daemon, MODELD_MODELS_CONTEXT_LENGTH="512", MODELD_MEMORY_LIMIT="230MB")
    talk = Conversation(daemon, "Hello")
    talk.turn()
    body = {"model": SAMPLE, "messages": [{"role": "user", "content": long_text(300)}]}
    status, _, text = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400 and "context_length_exceeded" in text
    assert "512" in text and "tokens" in text and "of them take" in text
    assert daemon.model()["state"] == "ready", "what is loaded stays loaded"
    status, _, text = daemon.request(
        "POST",
        "/v1/chat/completions",
        {"model": SAMPLE, "messages": [{"role": "user", "content": long_text(700)}]},
    )
    assert status == 400 and "the model itself has 8192" in text


# what is on disk


def test_what_is_kept_is_the_user_s_alone_and_gone_when_modeld_stops(start_daemon):
    daemon = ready(start_daemon)
    Conversation(daemon, long_text(20)).turn()
    unload(daemon)
    files = kept(daemon)
    assert files
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert daemon.json("GET", "/modeld/v1/memory")["conversations_bytes"] > 0
    daemon.stop()
    assert kept(daemon) == []


def test_what_a_kill_leaves_is_gone_at_the_next_start(start_daemon):
    daemon = ready(start_daemon)
    Conversation(daemon, long_text(20)).turn()
    unload(daemon)
    daemon.kill()
    assert kept(daemon)
    daemon.start()
    assert kept(daemon) == []


def test_conversations_outlive_modeld_if_the_settings_say_so(start_daemon):
    daemon = ready(start_daemon, MODELD_MODELS_RESUME="keep")
    talk = Conversation(daemon, long_text(30))
    talk.turn()
    daemon.stop()
    assert kept(daemon)
    daemon.start()
    talk.turn("And now?")
    assert talk.usage["prompt_tokens"] - talk.cached < 60


def test_nothing_is_kept_if_the_settings_say_so(start_daemon):
    daemon = ready(start_daemon, MODELD_MODELS_RESUME="off")
    talk = Conversation(daemon, long_text(20))
    talk.turn()
    unload(daemon)
    assert kept(daemon) == []
    talk.turn("And now?")
    assert talk.cached == 0


def test_what_is_kept_is_bounded(start_daemon):
    daemon = ready(
        start_daemon,
        MODELD_MODELS_RESUME_LIMIT="20MB",
        MODELD_MODELS_SLOTS="1",
        MODELD_MODELS_BACKEND="xllamacpp",
    )
    for items in (20, 30, 40):
        Conversation(daemon, long_text(items)).turn()
        unload(daemon)
    assert 0 < sum(path.stat().st_size for path in kept(daemon)) <= 20_000_000


def test_a_file_that_was_changed_is_not_restored(start_daemon):
    daemon = ready(start_daemon)
    talk = Conversation(daemon, long_text(20))
    talk.turn()
    unload(daemon)
    for path in kept(daemon):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        os.utime(path)
    talk.turn("And now?")
    assert talk.cached == 0


def test_other_settings_do_not_share_what_they_computed(start_daemon):
    daemon = ready(start_daemon)
    talk = Conversation(daemon, long_text(20))
    talk.turn()
    unload(daemon)
    body = {
        "source": daemon.model()["source"],
        "unique": SAMPLE,
        "options": {"cache_type_k": "q8_0"},
    }
    daemon.json("POST", "/modeld/v1/models", body)
    talk.turn("And now?")
    assert talk.cached == 0
