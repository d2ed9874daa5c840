"""Downloads from the command line: through a pipe, on a narrow terminal, and what comes after them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub
from running import RunningDaemon

MIB = 1024**2
REPO = "owner/tiny"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    path = write_gguf(tmp_path / "tiny.gguf", tensors=[Tensor(dimensions=(256, 4 * 1024))])
    with LocalHub() as running:
        running.add(REPO, {"tiny.gguf": path.read_bytes()}, about={"tags": ["license:apache-2.0"]})
        yield running


@pytest.fixture
def far(hub: LocalHub, start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A daemon whose hub is the local one."""
    return start_daemon(HF_ENDPOINT=hub.url)


def on_a_terminal(daemon: RunningDaemon, columns: int, *arguments: str) -> tuple[int, str]:
    """Run a command at a terminal of so many columns; return its status and all that it showed."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(main, 65536)
            except OSError:  # the other side has gone
                return
            shown.append(data)

    reading = threading.Thread(target=read)
    reading.start()
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", *arguments],
        env=daemon.environment | {"TERM": "xterm"},
        stdin=side,
        stdout=side,
        stderr=side,
    )
    os.close(side)
    try:
        status = process.wait(60)
    finally:
        process.kill()
        reading.join(5)
        os.close(main)
    return status, b"".join(shown).decode(errors="replace")


def test_through_a_pipe_there_are_plain_lines(far, hub):
    hub.faults = Faults(status=503, retry_after="3", times=1)
    done = far.command("pull", f"hf:{REPO}", "--name", "tiny")
    assert done.returncode == 0 and done.stdout == "tiny is downloaded\n"
    assert "HTTP 503" in done.stderr and "trying again in 3 s" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("tiny: 100% completed")
    assert "\x1b" not in done.stderr and "\r" not in done.stderr


@pytest.mark.parametrize("columns", [20, 120])
def test_a_terminal_gets_a_bar_however_narrow_it_is(far, hub, columns):
    hub.faults = Faults(rate_bytes_s=4 * MIB)
    status, shown = on_a_terminal(far, columns, "pull", f"hf:{REPO}", "--name", "tiny")
    assert status == 0, shown
    assert "\x1b[" in shown and "100%" in shown and "tiny is downloaded" in shown
    assert "Traceback" not in shown


def test_what_a_download_would_bring_is_told_before_it(far, hub):
    shown = far.command("pull", f"hf:{REPO}", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    for words in ("tiny.gguf", "4.0 MiB", "licence: apache-2.0", "free, enough", "it fits now"):
        assert words in shown.stdout, (words, shown.stdout)
    answer = json.loads(far.command("pull", f"hf:{REPO}", "--dry-run", "--json").stdout)
    assert answer["download"]["license"] == "apache-2.0" and answer["download"]["fits_disk"]
    assert [file["name"] for file in answer["download"]["files"]] == ["tiny.gguf"]
    models = {model["unique"] for model in far.json("GET", "/modeld/v1/models")["models"]}
    assert "tiny" not in models, "nothing was added"
    assert hub.sent_bytes < 2 * MIB


def test_pause_resume_cancel_and_clean(far, hub):
    size = far.json("POST", "/modeld/v1/estimate", {"source": f"hf:{REPO}"})["download"][
        "size_bytes"
    ]
    hub.faults = Faults(stall_at=size - 3000)  # 99.9 %
    far.json("POST", "/modeld/v1/models", {"source": f"hf:{REPO}", "unique": "tiny"})
    far.json("POST", "/modeld/v1/models/tiny/download")
    while far.json("GET", "/modeld/v1/downloads/tiny")["percentage"] < 99.5:
        time.sleep(0.05)
    assert " 99 %" in far.command("downloads").stdout, "not all of it is here"
    assert far.command("pause", "tiny").returncode == 0
    assert "paused (user)" in far.command("downloads").stdout
    limited = far.command("downloads", "--limit", "5MB").stdout
    assert "all together may use 4.8 MiB/s" in limited
    assert far.command("resume", "tiny").returncode == 0
    assert far.json("GET", "/modeld/v1/downloads/tiny")["paused"] is None
    assert "there is nothing to remove" in far.command("gc").stdout
    assert far.command("cancel", "tiny").returncode == 0
    listed = far.command("downloads").stdout
    assert "canceled" in listed and "1 unfinished files" in listed and "modeld gc" in listed
    assert "tiny.gguf" in far.command("gc", "--dry-run").stdout
    assert "are free again" in far.command("gc").stdout
    assert list((far.data_dir / "store" / "partial").iterdir()) == []
    refused = far.command("resume", "tiny")
    assert refused.returncode == 1 and "not being downloaded" in refused.stderr


def test_a_file_that_the_hub_s_own_library_has_is_not_fetched(hub, start_daemon, tmp_path):
    (held,) = hub._repos[REPO].files.values()
    blobs = tmp_path / "hf" / "hub" / "models--owner--tiny" / "blobs"
    blobs.mkdir(parents=True)
    cached = blobs / held.digest("sha256")
    cached.write_bytes(held.content)
    daemon = start_daemon(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert daemon.command("pull", f"hf:{REPO}", "--name", "tiny").returncode == 0
    assert hub.sent_bytes == 0
    (file,) = daemon.model("tiny")["files"]
    assert Path(file).samefile(cached) and cached.read_bytes() == held.content


def test_one_in_that_cache_that_is_damaged_is_let_be(hub, start_daemon, tmp_path):
    (held,) = hub._repos[REPO].files.values()
    blobs = tmp_path / "hf" / "hub" / "models--owner--tiny" / "blobs"
    blobs.mkdir(parents=True)
    cached = blobs / held.digest("sha256")
    cached.write_bytes(b"damaged")
    daemon = start_daemon(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert daemon.command("pull", f"hf:{REPO}", "--name", "tiny").returncode == 0
    assert cached.read_bytes() == b"damaged"
    (file,) = daemon.model("tiny")["files"]
    assert Path(file).read_bytes() == held.content
