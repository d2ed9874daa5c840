"""`modeld serve`: starting, being found, refusing to start, stopping."""

from __future__ import annotations

import configparser
import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from running import SAMPLE, environment, run_command

ROOT = Path(__file__).resolve().parents[2]


def serve(home: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a daemon that is expected not to start."""
    return run_command(
        "serve",
        "--data-dir",
        str(home / "modeld"),
        *arguments,
        environment=environment(home, **extra),
    )


def test_a_second_daemon_on_the_same_data_is_refused(daemon, tmp_path):
    second = serve(tmp_path, "--listen", "127.0.0.1:0")
    assert second.returncode == 2
    assert f"another modeld (pid {daemon.pid}) uses the data directory" in second.stderr
    assert "Traceback" not in second.stderr
    assert daemon.request("GET", "/health")[0] == 200
    # the address file is still that of the one that runs
    assert daemon.command("list").returncode == 0


def test_a_port_in_use_is_refused_by_name(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = serve(tmp_path, "--listen", f"127.0.0.1:{port}")
    assert refused.returncode == 2
    assert f"http://127.0.0.1:{port} is in use" in refused.stderr
    assert "--listen" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("address", ["0.0.0.0:39555", "[::]:39555", "192.0.2.1:39555"])
def test_a_listener_that_others_can_reach_is_refused(tmp_path, address):
    refused = serve(tmp_path, "--listen", address)
    assert refused.returncode == 2 and "other machines" in refused.stderr


def test_wrong_settings_are_refused_by_name(tmp_path):
    file = tmp_path / "modeld.toml"
    file.write_text("[server]\nlisten_on = []\n")
    refused = serve(tmp_path, "--config", str(file))
    assert refused.returncode == 2
    assert "listen_on" in refused.stderr and str(file) in refused.stderr
    refused = serve(tmp_path, MODELD_MEMORY_LIMIT="lots")
    assert refused.returncode == 2 and "memory.limit" in refused.stderr


def test_a_broken_catalog_is_refused_and_not_touched(tmp_path):
    path = tmp_path / "modeld" / "catalog.db"
    path.parent.mkdir()
    path.write_bytes(b"not a database " * 1000)
    refused = serve(tmp_path, "--listen", "127.0.0.1:0")
    assert refused.returncode == 2 and "catalog.db cannot be used" in refused.stderr
    assert path.read_bytes() == b"not a database " * 1000


@pytest.mark.alone
def test_without_listen_it_takes_a_port_where_pieces_clients_look(tmp_path, start_daemon):
    home = tmp_path / "other"
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "serve", "--data-dir", str(home / "modeld")],
        env=environment(home),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if "listens on" in line:
                break
        port = int(line.rstrip().rpartition(":")[2])
        assert 39300 <= port <= 39333
        found = run_command("list", environment=environment(home))
        assert found.returncode == 0 and SAMPLE in found.stdout
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        process.stderr.close()


def test_it_serves_on_a_unix_socket_for_this_user_only(tmp_path, start_daemon):
    path = tmp_path / "m.sock"
    daemon = start_daemon("--listen", f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listed = run_command("list", environment=daemon.environment | {"MODELD_HOST": f"unix:{path}"})
    assert listed.returncode == 0 and SAMPLE in listed.stdout
    daemon.stop()
    assert not path.exists()


def test_the_data_is_private(daemon):
    for path in (daemon.data_dir, daemon.data_dir / "store" / "blobs"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_ready_is_sent_to_systemd_when_it_can_serve(tmp_path):
    """A real notify socket, as systemd makes one for Type=notify."""
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(address))
        notify.settimeout(20)
        home = tmp_path / "home"
        process = subprocess.Popen(
            [sys.executable, "-m", "daemon", "serve", "--listen", "127.0.0.1:0"],
            env=environment(
                home,
                NOTIFY_SOCKET=str(address),
                STATE_DIRECTORY=str(home / "state"),
                RUNTIME_DIRECTORY=str(home / "runtime"),
            ),
            stderr=subprocess.DEVNULL,
        )
        try:
            assert notify.recv(100) == b"READY=1"
            url = (home / "runtime" / "address").read_text().strip()
            answer = run_command("list", environment=environment(home, MODELD_HOST=url))
            assert answer.returncode == 0, answer.stderr
            assert (home / "state" / "catalog.db").is_file()
        finally:
            process.terminate()
        assert notify.recv(100) == b"STOPPING=1"
        assert process.wait(timeout=20) == 0
    assert not (home / "runtime" / "address").exists()


def test_the_unit_is_of_type_notify_and_starts_modeld():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(ROOT / "systemd" / "modeld.service")
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["ExecStart"].endswith("modeld serve")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    """`systemd-analyze verify` checks that the program exists, so it gets this one."""
    program = shutil.which("modeld") or str(Path(sys.executable).parent / "modeld")
    text = (ROOT / "systemd" / "modeld.service").read_text()
    unit = tmp_path / "modeld.service"
    unit.write_text(text.replace("/opt/modeld/bin/modeld", program))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in checked.stderr.splitlines() if "modeld.service" in line]
    assert complaints == []


def test_sigterm_ends_it_with_everything_it_started(daemon):
    daemon.download()
    daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
    worker = psutil.Process(daemon.model()["worker_pid"])
    assert daemon.stop() == 0
    assert not worker.is_running()
    assert "Traceback" not in daemon.log


WATCHED = """
import asyncio, json, os, signal, sys, threading, http.client
from pathlib import Path
from daemon import config, service

def drive():
    address = Path(os.environ["XDG_RUNTIME_DIR"]) / "modeld" / "address"
    while not (address.is_file() and address.read_text().endswith("\\n")):
        pass
    host, _, port = address.read_text().strip().removeprefix("http://").rpartition(":")
    def call(method, path, body=None):
        connection = http.client.HTTPConnection(host, int(port))
        connection.request(method, path, body)
        text = connection.getresponse().read().decode()
        connection.close()
        return json.loads(text) if text.startswith("{") else text
    model = "/modeld/v1/models/" + sys.argv[2]
    idle = sorted(sys.modules)
    call("GET", "/modeld/v1/backends")
    call("POST", model + "/download")
    while not call("GET", model)["downloaded"]:
        pass
    call("POST", model + "/load")
    state = call("GET", model)["state"]
    call("POST", model + "/unload")
    print(json.dumps({"idle": idle, "used": sorted(sys.modules), "state": state}))
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=drive, daemon=True).start()
settings = config.load(None, os.environ, {"server": {"listen": ["127.0.0.1:0"]}})
asyncio.run(service.serve(settings, Path(sys.argv[1]), os.environ))
"""


def test_the_daemon_never_imports_an_engine_numpy_or_the_hub(tmp_path):
    """Neither idle nor after it probed every backend, downloaded, loaded and unloaded."""
    watched = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path / "modeld"), SAMPLE],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert watched.returncode == 0, watched.stderr
    seen = json.loads(watched.stdout)
    assert seen["state"] == "ready"
    heavy = {
        "xllamacpp",
        "llama_cpp",
        "onnxruntime",
        "ctransformers",
        "numpy",
        "huggingface_hub",
        "tokenizers",
        "jinja2",
    }
    for moment in ("idle", "used"):
        tops = {name.partition(".")[0] for name in seen[moment]}
        assert "daemon" in tops and not tops & heavy, tops & heavy
