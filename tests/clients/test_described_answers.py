"""Every operation of `/openapi.json`, asked rightly: what it answers is what it is said to answer.

Schemathesis' random requests seldom are right ones; these are, one for each operation at least.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import websocket
from described import check
from engines import add_encoders
from gguf_models import tiny_llama
from hub import LocalHub
from running import SAMPLE, RunningDaemon

from daemon.api import app, openapi

DESCRIBED = openapi.document(app.routes())["paths"]
OPERATIONS = [(method, path) for path, methods in DESCRIBED.items() for method in methods]
REPO = "owner/tiny"
SAY = [{"role": "user", "content": "Hello"}]
CHAT = {"model": SAMPLE, "messages": SAY, "max_tokens": 4}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
CALL = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
MESSAGES = {"model": SAMPLE, "messages": SAY}
FEW = {"num_predict": 4}
BASE = "/modeld/v1"


@dataclass(slots=True, kw_only=True)
class There:
    """What requests are about: a daemon with models of each kind, and a hub."""

    daemon: RunningDaemon
    hub: LocalHub

    def custom(self) -> str:
        """Add a model that nothing else is about, and return its name."""
        unique = f"custom-{uuid.uuid4().hex}"
        body = {"source": f"hf:{REPO}/tiny.gguf", "unique": unique}
        self.daemon.json("POST", f"{BASE}/models", body)
        return unique

    def key(self) -> str:
        return str(self.daemon.model(self.custom())["id"])

    def downloading(self) -> str:
        """Return the name of a model whose download takes long."""
        self.hub.faults.rate_bytes_s = 1000
        unique = self.custom()
        self.daemon.json("POST", f"{BASE}/models/{unique}/download")
        return unique

    def paused(self) -> str:
        unique = self.downloading()
        self.daemon.json("POST", f"{BASE}/models/{unique}/download/pause")
        return unique

    def said(self) -> dict[str, Any]:
        """Return the question of a new conversation."""
        socket = websocket.create_connection(
            self.daemon.url.replace("http", "ws") + "/qgpt/stream", timeout=60
        )
        with contextlib.closing(socket):
            socket.send(json.dumps(turn(self)))
            frame = json.loads(socket.recv())
        messages = self.daemon.json("GET", f"/conversation/{frame['conversation']}/messages")
        return dict(messages["iterable"][0])

    def conversation(self) -> str:
        return str(self.said()["conversation"]["id"])

    @property
    def sample(self) -> str:
        return str(self.daemon.model()["id"])

    def request(self) -> str:
        """Return the id of a request that runs until it is ended."""
        body = {"model": SAMPLE, "prompt": "Hello", "ignore_eos": True, "context_length": 8192}
        threading.Thread(
            target=self.daemon.request, args=("POST", "/v1/completions", body), daemon=True
        ).start()
        deadline = time.monotonic() + 60
        while not (found := self.daemon.json("GET", f"{BASE}/requests")["requests"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return str(found[0]["id"])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add(REPO, {"tiny.gguf": tiny_llama(tmp_path_factory.mktemp("hub")).read_bytes()})
        yield hub


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, hub: LocalHub) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("there")
    daemon = RunningDaemon(home, HF_ENDPOINT=hub.url)
    try:
        daemon.start().download()
        add_encoders(daemon, home)
        yield daemon
    finally:
        hub.faults.rate_bytes_s = 0
        daemon.stop()


@pytest.fixture
def there(daemon: RunningDaemon, hub: LocalHub) -> There:
    hub.faults.rate_bytes_s = 0
    return There(daemon=daemon, hub=hub)


def with_id(there: There) -> dict[str, Any]:
    key = there.key()
    return {"id": key, "name": "Another name", "description": "Another description"}


def reworded(there: There) -> dict[str, Any]:
    said = there.said()
    said["fragment"]["string"]["raw"] = "Good morning"
    return said


# What goes into a path, for the operations that change what they are about.
Made = Callable[[There], Any]
IN_PATHS: dict[tuple[str, str], Made] = {
    ("post", "/models/{model}/delete"): There.key,
    ("post", "/models/{model}/delete/cache"): There.key,
    ("post", "/model/{model}/download"): There.key,
    # Who comes to one that ended long ago is told nothing.
    ("get", "/model/{model}/download/progress"): There.downloading,
    ("delete", f"{BASE}/models/{{model}}"): There.custom,
    ("post", f"{BASE}/models/{{model}}/classify"): lambda _: "classifier",
    ("post", f"{BASE}/models/{{model}}/download"): There.custom,
    ("post", f"{BASE}/models/{{model}}/download/cancel"): There.downloading,
    ("post", f"{BASE}/models/{{model}}/download/pause"): There.downloading,
    ("post", f"{BASE}/models/{{model}}/download/resume"): There.paused,
    ("patch", f"{BASE}/downloads/{{model}}"): There.paused,
}
USUAL: dict[str, Made] = {
    "{model}": lambda _: SAMPLE,
    "{conversation}": There.conversation,
    "{message}": lambda there: there.said()["id"],
    "{request}": There.request,
    "{digest}": lambda _: "sha256:" + "0" * 64,
}
# The bodies: one, or several, or what makes one.
BODIES: dict[tuple[str, str], Any] = {
    ("post", "/models/create"): {"name": "Made", "unique": "made", "type": "SPEED"},
    ("post", "/model/update"): with_id,
    ("post", "/connect"): {"application": {"name": "VS_CODE", "version": "1", "platform": "LINUX"}},
    ("post", "/qgpt/question"): lambda there: {"query": "Hello", "model": there.sample},
    ("post", "/conversations/create"): {"name": "Greetings", "type": "COPILOT"},
    ("post", "/conversation/update"): lambda t: {"id": t.conversation(), "name": "Greetings"},
    ("post", "/message/update/value"): reworded,
    ("post", "/v1/chat/completions"): [
        CHAT,
        CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2},
        CHAT | CALL | {"max_tokens": 256},
    ],
    ("post", "/v1/responses"): [
        {"model": SAMPLE, "input": "Hello", "max_output_tokens": 4, "top_logprobs": 2},
        {"model": SAMPLE, "input": SAY, "tools": [{"type": "function", **TOOL}]}
        | {"tool_choice": "required"},
    ],
    ("post", "/v1/responses/input_tokens"): {"model": SAMPLE, "input": "Hello"},
    ("post", "/v1/completions"): {"model": SAMPLE, "prompt": ["a", "b"], "max_tokens": 4}
    | {"logprobs": 2},
    ("post", "/v1/embeddings"): [
        {"model": "embedder", "input": ["one", "two"]},
        {"model": "embedder", "input": "one", "encoding_format": "base64"},
    ],
    ("post", "/v1/rerank"): {"model": "reranker", "query": "a", "documents": ["a", "b"]}
    | {"return_documents": True},
    ("post", "/v1/messages"): [
        MESSAGES | {"max_tokens": 4},
        MESSAGES
        | {"max_tokens": 256, "tool_choice": {"type": "any"}}
        | {"tools": [{"name": "weather", "input_schema": TOOL["parameters"]}]},
    ],
    ("post", "/v1/messages/count_tokens"): MESSAGES,
    ("post", "/api/show"): [{"model": SAMPLE}, {"model": "embedder", "verbose": True}],
    ("delete", "/api/delete"): lambda there: {"model": there.custom()},
    ("post", "/api/copy"): {"source": SAMPLE, "destination": "copied"},
    ("post", "/api/pull"): {"model": SAMPLE, "stream": False},
    ("post", "/api/chat"): [
        MESSAGES | {"stream": False, "options": FEW, "logprobs": True, "top_logprobs": 2},
        {"model": SAMPLE, "stream": False},
    ],
    ("post", "/api/generate"): [
        {"model": SAMPLE, "prompt": "Hello", "stream": False, "options": FEW},
        {"model": SAMPLE, "stream": False},
    ],
    ("post", "/api/embed"): {"model": "embedder", "input": ["one", "two"]},
    ("post", "/api/embeddings"): {"model": "embedder", "prompt": "one"},
    ("post", f"{BASE}/models"): [
        {"source": f"hf:{REPO}/tiny.gguf", "unique": "added"},
        {"source": f"hf:{REPO}/tiny.gguf", "unique": "added"},
    ],
    ("patch", f"{BASE}/models/{{model}}"): {"pinned": True, "keep_alive": "5m"},
    ("post", f"{BASE}/models/{{model}}/classify"): {"input": ["good", "bad"]},
    ("post", f"{BASE}/models/{{model}}/load"): [None, {"keep_alive": "5m"}],
    ("post", f"{BASE}/estimate"): {"source": f"hf:{REPO}/tiny.gguf", "context_length": 64},
    ("post", f"{BASE}/models/{{model}}/download"): [None, {"priority": "high"}],
    ("post", f"{BASE}/models/{{model}}/download/cancel"): {"drop": True},
    ("patch", f"{BASE}/downloads"): {"bandwidth_limit": "1GB"},
    ("post", f"{BASE}/downloads/clean"): [None, {"keys": []}],
    ("patch", f"{BASE}/downloads/{{model}}"): {"priority": "high"},
}
# A stream that goes on until its client leaves, and what modeld does not do, and says so.
ENDLESS = f"{BASE}/events"
SILENT = "/workstream_pattern_engine/processors/vision/status/stream"
REFUSED = ("/api/create", "/api/push", "/api/blobs/{digest}")


def rightly() -> Iterator[Any]:
    """Yield the method, the path and the body of each right request, by a name."""
    for method, path in OPERATIONS:
        statuses = DESCRIBED[path][method]["responses"]
        if path not in (ENDLESS, *REFUSED) and any(status.startswith("2") for status in statuses):
            body = BODIES.get((method, path))
            for number, each in enumerate(body if isinstance(body, list) else [body], 1):
                yield pytest.param(method, path, each, id=f"{method} {path} {number}")


def asked(there: There, method: str, path: str) -> str:
    """Return the path with what a right request names in it."""
    for name, usual in USUAL.items():
        if name in path:
            made = IN_PATHS.get((method, path), usual)
            path = path.replace(name, str(made(there)))
    return path


@pytest.mark.parametrize(("method", "path", "body"), list(rightly()))
def test_a_right_request_is_answered_as_described(
    there: There, method: str, path: str, body: Any
) -> None:
    given = body(there) if callable(body) else body
    status, headers, text = there.daemon.request(method.upper(), asked(there, method, path), given)
    assert status in (200, 201, 204), text
    document = there.daemon.json("GET", "/openapi.json")
    content = document["paths"][path][method]["responses"][str(status)].get("content")
    if content is None:
        assert not text
        return
    content_type = headers["content-type"].partition(";")[0]
    told = text if content_type == "text/plain" else json.loads(text)
    check(told, content[content_type]["schema"], document)


@pytest.mark.parametrize("path", REFUSED)
def test_what_modeld_does_not_do_is_described_so(there: There, path: str) -> None:
    for method in DESCRIBED[path]:
        status, _, text = there.daemon.request(method.upper(), asked(there, method, path))
        described = there.daemon.json("GET", "/openapi.json")["paths"][path][method]["responses"]
        assert status == 501 and {s for s in described if s[0] != "5"} == {"403"}
        assert method == "head" or "modeld" in json.loads(text)["error"]


@pytest.mark.parametrize(
    "path",
    [p for m, p in OPERATIONS if "101" in DESCRIBED[p][m]["responses"]],
)
def test_what_comes_over_a_socket_is_as_described(there: There, path: str) -> None:
    document = there.daemon.json("GET", "/openapi.json")
    opened = document["paths"][path]["get"]["responses"]["101"]
    if "x-sentSchema" in opened:
        check(turn(there), opened["x-sentSchema"], document)
    address = there.daemon.url.replace("http", "ws") + asked(there, "get", path)
    with (
        contextlib.closing(websocket.create_connection(address, timeout=60)) as socket,
        contextlib.closing(frames(there, path, socket)) as told,
    ):
        for frame in told:
            check(frame, opened["x-itemSchema"], document)


def turn(there: There) -> dict[str, Any]:
    return {"question": {"query": "Hello", "model": there.sample}}


def frames(there: There, path: str, socket: websocket.WebSocket) -> Generator[Any]:
    """Yield what comes over a socket after something that it tells of."""
    if path == "/qgpt/stream":
        socket.send(json.dumps(turn(there)))
        while (frame := json.loads(socket.recv()))["status"] != "COMPLETED":
            yield frame
        yield frame
    elif path == ENDLESS:
        # Only another sum is told: what leaves and comes back at once changes nothing.
        change = "unload" if there.daemon.model()["state"] == "ready" else "load"
        there.daemon.json("POST", f"{BASE}/models/{SAMPLE}/{change}")
        yield from until(socket, {"snapshot", "model", "memory"})
        there.downloading()
        running = there.request()
        try:
            yield from until(socket, {"download", "request"})
        finally:
            there.daemon.json("DELETE", f"{BASE}/requests/{running}")
    elif path != SILENT:
        frame = socket.recv()
        yield frame if frame == "ok" else json.loads(frame)


def until(socket: websocket.WebSocket, untold: set[str]) -> Iterator[Any]:
    """Yield events until one of each of these types has come."""
    while untold:
        yield (event := json.loads(socket.recv()))
        untold.discard(event["type"])


def test_a_right_request_is_known_for_every_operation() -> None:
    assert {*BODIES, *IN_PATHS} <= {*OPERATIONS}
    assert {
        (method, path)
        for path, methods in DESCRIBED.items()
        for method in methods
        if "requestBody" in methods[method]
    } == {*BODIES}
