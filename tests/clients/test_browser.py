"""What web pages in a real browser can and can't do to the daemon.

Any page can send requests to loopback addresses. One that was not allowed must neither learn nor
change anything, and neither must one whose own host name leads to the daemon (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from running import ALIASES, BUILT_IN, SAMPLE, RunningDaemon

REPORT_S = 60.0
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers and CI machines rarely allow it one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-breakpad",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-features=HttpsUpgrades,HttpsFirstBalancedModeAutoEnable",
)

# What the page tries; `told` is filled in by the test. Each attempt ends, and says how.
SCRIPT = """
const told = TOLD;
const url = (path) => told.daemon + path;
const model = `/model/${told.model}`;
const results = {};

function within(promise) {
  const late = new Promise((resolve) => setTimeout(() => resolve("no answer"), 20000));
  return Promise.race([promise, late]);
}

async function ask(method, path, options = {}) {
  try {
    const answer = await fetch(url(path), { method, ...options });
    return { type: answer.type, status: answer.status, text: await answer.text() };
  } catch (error) {
    return error.name;
  }
}

function listen(path) {
  return new Promise((resolve) => {
    const socket = new WebSocket(url(path).replace("http", "ws"));
    socket.onmessage = ({ data }) => { resolve({ message: data }); socket.close(); };
    socket.onclose = ({ code }) => resolve({ closed: code });
  });
}

const seeded = (unique) => JSON.stringify({
  name: unique, unique, version: "1", created: { value: new Date() }, cloud: false,
  type: "SPEED", usage: "CODE_CONVERSATION",
});

/** A page without an origin of its own: its requests say `Origin: null`. */
function fromSandbox(path, body) {
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts";
  frame.srcdoc = `<script>
    fetch(${JSON.stringify(url(path))}, { method: "POST", mode: "no-cors", body: ${JSON.stringify(body)} })
      .then(({ type }) => type, ({ name }) => name)
      .then((result) => parent.postMessage({ result, origin: self.origin }, "*"));
  <\\/script>`;
  const answered = new Promise((resolve) =>
    addEventListener("message", ({ data }) => resolve(data), { once: true }));
  document.body.append(frame);
  return answered;
}

/** The oldest way: a form, whose body can be made to be JSON. */
function fromForm(path) {
  const frame = document.createElement("iframe");
  frame.name = "target";
  const form = document.createElement("form");
  Object.assign(form, { method: "POST", action: url(path), target: "target", enctype: "text/plain" });
  const field = document.createElement("input");
  field.name = '{"unique": "by-form", "name": "by-form", "description": "';
  field.value = '"}';
  form.append(field);
  document.body.append(frame, form);
  const sent = new Promise((resolve) => { frame.onload = () => resolve("sent"); });
  form.submit();
  return sent;
}

const plain = { mode: "no-cors", headers: { "Content-Type": "text/plain" } };
const json = { headers: { "Content-Type": "application/json" } };
const attempts = {
  read: () => ask("GET", "/models"),
  read_blindly: () => ask("GET", "/models", { mode: "no-cors" }),
  read_with_a_header: () => ask("GET", "/models", { headers: { application: "a" } }),
  read_what_is_gone: () => ask("GET", "/model/nothing"),
  create: () => ask("POST", "/models/create", { ...json, body: seeded("by-json") }),
  create_blindly: () => ask("POST", "/models/create", { ...plain, body: seeded("by-plain") }),
  create_in_sandbox: () => fromSandbox("/models/create", seeded("by-null")),
  create_by_form: () => fromForm("/models/create"),
  progress: () => listen(`${model}/download/progress`),
  identifiers: () => listen("/models/stream/identifiers"),
  health: () => listen("/.well-known/stream/health"),
  unload: () => ask("POST", `${model}/unload`),
  unload_all_blindly: () => ask("POST", "/models/unload", plain),
  delete_files: () => ask("POST", `/models/${told.model}/delete/cache`, { ...json, body: "{}" }),
  delete_files_blindly: () => ask("POST", `/models/${told.model}/delete/cache`, plain),
  delete_model: () => ask("DELETE", `/modeld/v1/models/${told.model}`),
};

(async () => {
  for (const name of told.attempts ?? Object.keys(attempts)) {
    results[name] = await within(attempts[name]());
  }
  const body = JSON.stringify({ origin: self.origin, results });
  await fetch(told.report, { method: "POST", mode: "no-cors", body });
})();
"""


def page(**told: Any) -> str:
    """Return the page that tries what `told` says and reports what came of it."""
    script = SCRIPT.replace("TOLD", json.dumps(told), 1)
    return f"<!doctype html><meta charset=utf-8><body><script>{script}</script>"


class Site:
    """A web site on this machine: serves `page` at `url` and takes what the page reports."""

    def __init__(self) -> None:
        self.page = ""
        self.reports: queue.Queue[dict[str, Any]] = queue.Queue()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path == "/"
                body = site.page.encode() if found else b""
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                report = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(204)
                self.end_headers()
                site.reports.put(json.loads(report))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.port = self._server.server_address[1]
        self.origin = f"http://localhost:{self.port}"
        self.report_url = f"{self.origin}/report"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


class Rebound:
    """A host whose name leads to its own server at first, and to the daemon ever after.

    That is what DNS rebinding looks like to the browser and to the daemon; here the first bytes of
    a connection are answered or relayed, instead of the name being resolved anew.
    """

    def __init__(self, page: str, daemon: tuple[str, int]) -> None:
        self._page = page
        self._daemon = daemon
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._serve)]
        self._open: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        self.relayed = 0

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _serve(self) -> None:
        served = False
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(client)
            if not served:
                served = self._serve_page(client)
                continue
            daemon = socket.create_connection(self._daemon)
            self._open.append(daemon)
            self.relayed += 1
            for source, target in ((client, daemon), (daemon, client)):
                thread = threading.Thread(target=_relay, args=(source, target))
                self._threads.append(thread)
                thread.start()

    def _serve_page(self, client: socket.socket) -> bool:
        if not client.recv(65536).startswith(b"GET / "):
            client.close()  # opened on suspicion
            return False
        body = self._page.encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        client.close()
        return True


def _relay(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            target.sendall(chunk)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start browsers, each with a profile of its own: `chromium(url, *flags)`."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    started: list[subprocess.Popen[str]] = []

    def start(url: str, *flags: str) -> subprocess.Popen[str]:
        profile = tmp_path / f"profile-{len(started)}"
        browser = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", *flags, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        started.append(browser)
        return browser

    yield start
    for browser in started:
        end(browser)


def end(browser: subprocess.Popen[str]) -> None:
    """End a browser and the processes that it made."""
    family = []
    if browser.poll() is None:
        family = psutil.Process(browser.pid).children(recursive=True)
        browser.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        browser.communicate(timeout=10)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    browser.kill()
    browser.communicate(timeout=10)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture
def loaded(start_daemon: Callable[..., RunningDaemon]) -> Callable[..., RunningDaemon]:
    """Start a daemon that holds the sample model in memory: there is something to break."""

    def start(**environment: str) -> RunningDaemon:
        daemon = start_daemon(**environment)
        daemon.download()
        daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
        return daemon

    return start


def state(daemon: RunningDaemon) -> dict[str, Any]:
    """Return all that a page could have changed."""
    changing = {"measured_bytes", "reserved_bytes"}
    models = daemon.json("GET", "/modeld/v1/models")["models"]
    return {
        "models": [{k: v for k, v in model.items() if k not in changing} for model in models],
        "downloads": daemon.json("GET", "/modeld/v1/downloads"),
        "files": sorted(str(path) for path in (daemon.data_dir / "store").rglob("*")),
    }


def report_of(site: Site, browser: subprocess.Popen[str]) -> Mapping[str, Any]:
    """Wait for what the page reports, then end the browser."""
    deadline = time.monotonic() + REPORT_S
    while True:
        try:
            report = site.reports.get(timeout=0.5)
        except queue.Empty:
            assert browser.poll() is None, "the browser ended by itself"
            assert time.monotonic() < deadline, "the page did not report"
        else:
            end(browser)
            return report


def test_a_foreign_page_neither_reads_nor_changes_anything(
    loaded: Callable[..., RunningDaemon],
    chromium: Callable[..., subprocess.Popen[str]],
    site: Site,
) -> None:
    daemon = loaded()
    before = state(daemon)
    site.page = page(daemon=daemon.url, model=before["models"][0]["id"], report=site.report_url)

    report = report_of(site, chromium(site.origin))

    assert report["origin"] == site.origin
    assert state(daemon) == before
    results = report["results"]
    opaque = {"type": "opaque", "status": 0, "text": ""}
    for name in ("read_blindly", "create_blindly", "unload_all_blindly", "delete_files_blindly"):
        assert results.pop(name) == opaque, name
    assert results.pop("create_in_sandbox") == {"result": "opaque", "origin": "null"}
    assert results.pop("create_by_form") == "sent"
    for name in ("progress", "identifiers", "health"):
        assert results.pop(name) == {"closed": 1006}, name
    assert len(results) == 7
    assert set(results.values()) == {"TypeError"}, results


def test_a_page_that_was_allowed_can_do_everything(
    loaded: Callable[..., RunningDaemon],
    chromium: Callable[..., subprocess.Popen[str]],
    site: Site,
) -> None:
    daemon = loaded(MODELD_SERVER_ALLOWED_ORIGINS=f"https://app.example,{site.origin}")
    model = daemon.model()
    site.page = page(daemon=daemon.url, model=model["id"], report=site.report_url)

    results = report_of(site, chromium(site.origin))["results"]

    statuses = {name: one["status"] for name, one in results.items() if "status" in one}
    assert statuses == {
        "read": 200,
        "read_blindly": 0,
        "read_with_a_header": 200,
        "read_what_is_gone": 410,
        "create": 200,
        "create_blindly": 0,
        "unload": 200,
        "unload_all_blindly": 0,
        "delete_files": 200,
        "delete_files_blindly": 0,
        "delete_model": 204,
    }
    listed = [one["unique"] for one in json.loads(results["read"]["text"])["iterable"]]
    assert sorted(listed) == sorted([*BUILT_IN, *ALIASES])
    assert results["read_what_is_gone"]["text"] == "model was not found."
    created = json.loads(results["create"]["text"])
    assert (created["unique"], created["custom"]) == ("by-json", True)
    assert results["health"] == {"message": "ok"}
    assert model["id"] in results["identifiers"]["message"]
    assert json.loads(results["progress"]["message"])["status"] == "COMPLETED"
    after = daemon.json("GET", "/modeld/v1/models")["models"]
    # All but what came from the sandbox, which has no origin that could have been allowed.
    assert {one["unique"] for one in after} == {*BUILT_IN, "by-json", "by-plain", "by-form"}
    assert daemon.model()["downloaded"] is False


def test_a_page_that_was_not_allowed_gains_nothing_from_one_that_was(
    start_daemon: Callable[..., RunningDaemon],
    chromium: Callable[..., subprocess.Popen[str]],
    site: Site,
) -> None:
    """The same host at another port, and under its other name, is another origin."""
    daemon = start_daemon(
        MODELD_SERVER_ALLOWED_ORIGINS=f"http://localhost:{site.port + 1},http://localhost"
    )
    told = {"daemon": daemon.url, "model": SAMPLE, "report": site.report_url}
    site.page = page(**told, attempts=["read", "create", "create_blindly", "health"])
    results = report_of(site, chromium(f"http://127.0.0.1:{site.port}"))["results"]
    assert results["read"] == results["create"] == "TypeError"
    assert results["health"] == {"closed": 1006}
    assert [one["unique"] for one in state(daemon)["models"]] == [*BUILT_IN]


def test_a_name_that_was_rebound_to_the_daemon_is_refused(
    loaded: Callable[..., RunningDaemon],
    chromium: Callable[..., subprocess.Popen[str]],
    site: Site,
) -> None:
    """To the browser this page and the daemon are one origin: only the Host header tells."""
    daemon = loaded()
    before = state(daemon)
    model = before["models"][0]["id"]
    script = page(daemon="", model=model, report=site.report_url).replace(
        "told.daemon + path", "location.origin + path"
    )
    with Rebound(script, daemon.host_port) as rebound:
        evil = f"http://evil.test:{rebound.port}"
        rules = "--host-resolver-rules=MAP evil.test 127.0.0.1"
        report = report_of(site, chromium(f"{evil}/", rules))
        assert rebound.relayed > 0

    assert report["origin"] == evil
    assert state(daemon) == before
    results = report["results"]
    assert results.pop("create_in_sandbox")["result"] == "opaque"
    for name in ("progress", "identifiers", "health"):
        assert results.pop(name) == {"closed": 1006}, name
    assert results.pop("create_by_form") == "sent"
    for name, answer in results.items():
        assert answer["status"] == 403, name
        assert SAMPLE not in answer["text"], name
        assert "host name" in answer["text"], name


def test_the_daemons_own_port_under_a_foreign_name_is_refused(
    daemon: RunningDaemon, chromium: Callable[..., subprocess.Popen[str]]
) -> None:
    url = f"http://evil.test:{daemon.host_port[1]}/models"
    browser = chromium(url, "--host-resolver-rules=MAP evil.test 127.0.0.1", "--dump-dom")
    shown, _ = browser.communicate(timeout=REPORT_S)
    assert "does not answer to the host name" in shown
    assert SAMPLE not in shown

    shown, _ = chromium(f"{daemon.url}/models", "--dump-dom").communicate(timeout=REPORT_S)
    assert SAMPLE in shown  # so the browser does show what it gets
