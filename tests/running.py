"""A real daemon in a process of its own, for tests that drive it from outside."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from daemon.addresses import PORTS
from daemon.catalog.seed import builtin

SAMPLE = "smollm2:135m-instruct-q4_1"
BUILT_IN = tuple(sorted(entry.unique for entry in builtin()))
ALIASES = ("gemini-2.0-flash-lite-001", "gpt-3.5-turbo", "gpt-4o")  # for Pieces clients alone
START_S = 20.0


def needs_engine(module: str) -> None:
    """Skip a test, by name, where an engine that is compiled for the machine is not there."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed (it needs a C++ compiler)")


def environment(home: Path, **extra: str) -> dict[str, str]:
    """The environment of a user whose home, runtime and data directories are under `home`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODELD_", "XDG_", "HF_"))}
    (home / "run").mkdir(parents=True, exist_ok=True)
    return kept | {
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "XDG_DATA_HOME": str(home / "data"),
        **extra,
    }


def another(gguf: bytes, number: int) -> bytes:
    """The same model under another name in its header: a file with other bytes."""
    at = gguf.index(b"general.name") + len(b"general.name") + 4 + 8
    return gguf[:at] + f"{number:02}".encode() + gguf[at + 2 :]


class RunningDaemon:
    """`modeld serve` on a free port. Start it, use `json` or `url`, and always `stop` it."""

    def __init__(self, home: Path, *arguments: str, **extra: str) -> None:
        self.home = home
        self.before: list[str] = []  # what the command is run by, such as a control group's entry
        self.data_dir = home / "modeld"
        self.environment = environment(home, **extra)
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.log_path = home / "daemon.log"

    def start(self) -> RunningDaemon:
        command = [
            *self.before,
            sys.executable,
            "-m",
            "daemon",
            "serve",
            "--data-dir",
            str(self.data_dir),
            "--listen",
            "127.0.0.1:0",
            *self._arguments,
        ]
        address = self.home / "run" / "modeld" / "address"
        address.unlink(missing_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + START_S
        while not (address.is_file() and address.read_text().endswith("\n")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the daemon did not start: {self.log}")
            time.sleep(0.02)
        self.url = address.read_text().split("\n")[0]
        if "--listen" not in self._arguments and self.host_port[1] in PORTS:
            self.stop()  # given by chance: clients of Pieces in other tests would find it
            return self.start()
        return self

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    @property
    def host_port(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port

    def stop(self) -> int:
        """SIGTERM, and the exit status; nothing of the daemon is left after that."""
        if self._process is None:
            return 0
        children = psutil.Process(self.pid).children(recursive=True) if self.alive else []
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(timeout=30)
        self._process = None
        assert not [child for child in children if child.is_running()], "children were left"
        return status

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=10)
        self._process = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], str]:
        """One request; returns status, headers (names in lower case) and text."""
        connection = http.client.HTTPConnection(*self.host_port, timeout=120)
        try:
            payload = json.dumps(body) if body is not None else None
            all_headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, payload, all_headers | (headers or {}))
            response = connection.getresponse()
            text = response.read().decode()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, text
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """One request that must succeed; returns its JSON."""
        status, _, text = self.request(method, path, body)
        assert status < 300, f"{method} {path}: {status} {text}"
        return json.loads(text) if text else None

    def model(self, name: str = SAMPLE) -> dict[str, Any]:
        return self.json("GET", f"/modeld/v1/models/{name}")

    def download(self, name: str = SAMPLE) -> None:
        """Download a model and wait until it is there."""
        self.json("POST", f"/modeld/v1/models/{name}/download")
        deadline = time.monotonic() + 60
        while not self.model(name)["downloaded"]:
            jobs = self.json("GET", "/modeld/v1/downloads")["downloads"]
            failed = [job for job in jobs if job["state"] in ("failed", "canceled")]
            assert not failed, failed
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def command(self, *arguments: str, input_text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a `modeld` command as the same user."""
        return run_command(*arguments, environment=self.environment, input_text=input_text)

    def children(self) -> list[psutil.Process]:
        return self.process.children(recursive=True)


def run_command(
    *arguments: str, environment: dict[str, str], input_text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `modeld arguments…` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "daemon", *arguments],
        env=environment,
        input=input_text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
