"""Clients that leave, read nothing, or send too slowly or too much: each is dealt with in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time

import pytest
from aiohttp import ClientPayloadError, WSMsgType

from daemon.api import errors, streams
from daemon.api.openai.chat import _ChatView

WAIT_S = 20.0
CHAT = "/v1/chat/completions"
LONG = "!slow 100000"


def ask(content: str, **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


async def connect(client) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has room for very little that it does not read."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.setblocking(False)
    await asyncio.get_running_loop().sock_connect(opened, ("127.0.0.1", client.port))
    return await asyncio.open_connection(sock=opened, limit=4096)


def narrow(client) -> None:
    """Give what the daemon sends from now on little room in the kernel."""
    (listening,) = client.server.runner.sites.copy().pop()._server.sockets
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)  # so has what it accepts


def request_bytes(path: str, body: bytes, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body


async def gone(services) -> None:
    """Wait until no request is left."""
    async with asyncio.timeout(WAIT_S):
        while services.models.requests():
            await asyncio.sleep(0.02)


async def test_a_client_that_reads_nothing_is_left(client, add_model, services, monkeypatch):
    monkeypatch.setattr(streams, "STALLED_S", 0.5)
    await add_model()
    body = json.dumps(ask("!words 300000", stream=True)).encode()
    reader, writer = await connect(client)
    writer.write(request_bytes(CHAT, body))
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    async with asyncio.timeout(WAIT_S):
        while not services.models.requests():
            await asyncio.sleep(0.02)
    await gone(services)
    rest = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(65536):
            rest += part
    assert rest and b"[DONE]" not in rest
    writer.close()
    # The model is there for others.
    answer = await client.post(CHAT, json=ask("one two"))
    assert (await answer.json())["choices"][0]["message"]["content"] == "one two"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask("one two")),
        ("/v1/responses", {"model": "tiny", "input": "one two"}),
        ("/v1/embeddings", {"model": "tiny", "input": "one two"}),
        ("/modeld/v1/models/tiny/load", {"keep_alive": "10m", "context_length": 100}),
        ("/v1/messages", ask("one two", max_tokens=9)),
        ("/api/chat", ask("one two")),
        ("/api/generate", {"model": "tiny", "prompt": "one two"}),
        ("/qgpt/question", {"query": "one two", "relevant": {"iterable": []}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_body_that_trickles_in_is_refused(
    client, add_model, services, monkeypatch, path, body
):
    """A byte a second takes more than half a minute: the refusal comes long before the rest."""
    monkeypatch.setattr(errors, "_BODY_S", 1.0)
    await add_model("tiny", tokenizer_chat_template="x")
    reader, writer = await connect(client)
    sent = json.dumps(body).encode()
    writer.write(request_bytes(path, b"", len(sent)))

    async def trickle() -> None:
        for byte in sent:
            writer.write(bytes([byte]))
            await asyncio.sleep(1)

    trickling = asyncio.create_task(trickle())
    async with asyncio.timeout(WAIT_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"(?i)^content-length: (\d+)", head, re.MULTILINE)
        said = (await reader.readexactly(int(length.group(1)))).decode()
    assert not trickling.done()
    trickling.cancel()
    writer.close()
    why = "the body did not come within 1 s"
    if path.startswith("/qgpt/"):  # the API has no other status than that
        assert head.startswith("HTTP/1.1 500") and said == why
    else:
        assert head.startswith("HTTP/1.1 408") and json.loads(said) == refusal(path, why)
    assert services.models.requests() == []
    shown = await (await client.get("/modeld/v1/models/tiny")).json()
    assert shown["state"] == "unloaded", "nothing was asked of the model"


def refusal(path: str, why: str) -> dict:
    """A body that did not come, in the words of the API that the path is of."""
    if path.startswith("/api/"):
        return {"error": why}
    kind = "invalid_request_error"
    if path == "/v1/messages":
        return {"type": "error", "error": {"type": kind, "message": why}}
    return {"error": {"message": why, "type": kind, "code": "body_timeout", "param": None}}


@pytest.mark.parametrize(
    "path",
    [
        CHAT,
        "/v1/messages",
        "/api/chat",
        "/qgpt/question",
        "/models/create",
        "/modeld/v1/models",
    ],
)
@pytest.mark.parametrize("told", [True, False])
async def test_who_sends_100_megabytes_hears_why_not(client, path, told):
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    length = f"Content-Length: {10**8}" if told else "Transfer-Encoding: chunked"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}{length}\r\n\r\n".encode())
    answer = asyncio.create_task(reader.read(2048))
    part = b"x" * 10**6
    sent = 0
    async with asyncio.timeout(WAIT_S):
        while not answer.done() and sent < 100:
            writer.write(part if told else b"%x\r\n%b\r\n" % (len(part), part))
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            sent += 1
            await asyncio.sleep(0.01)
        said = await answer
    writer.close()
    assert said.startswith(b"HTTP/1.1 413") and b"20" in said and sent < 60
    assert (await client.get("/health")).status == 200


@pytest.mark.parametrize("path", ["/qgpt/stream", "/modeld/v1/events"])
async def test_100_megabytes_over_a_websocket_end_it(client, path):
    async with client.ws_connect(path, max_msg_size=0) as opened:
        with contextlib.suppress(ConnectionError):
            await opened.send_str("x" * 10**8)
        async with asyncio.timeout(WAIT_S):
            while (message := await opened.receive()).type is WSMsgType.TEXT:
                pass
        assert message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR)
    assert (await client.get("/health")).status == 200


LEAVING = {
    "chat": (CHAT, ask(LONG)),
    "choices": (CHAT, ask(LONG, n=2)),
    "text": ("/v1/completions", {"model": "tiny", "prompt": LONG}),
    "responses": ("/v1/responses", {"model": "tiny", "input": LONG}),
    "anthropic": ("/v1/messages", ask(LONG, max_tokens=100_000)),
    "ollama-chat": ("/api/chat", ask(LONG)),
    "ollama-generate": ("/api/generate", {"model": "tiny", "prompt": LONG}),
}
LEAVING_WHOLE = {
    "vectors": ("/v1/embeddings", {"model": "tiny", "input": ["one", LONG]}),
    "ollama-vectors": ("/api/embed", {"model": "tiny", "input": ["one", LONG]}),
    "pieces": ("/qgpt/question", {"query": LONG, "relevant": {"iterable": []}}),
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(
            path, body | {"stream": stream}, id=f"{name}-{'stream' if stream else 'whole'}"
        )
        for name, (path, body) in LEAVING.items()
        for stream in (True, False)
    ]
    + [pytest.param(path, body, id=name) for name, (path, body) in LEAVING_WHOLE.items()],
)
async def test_a_client_that_leaves_frees_the_engine(client, add_model, services, path, body):
    """The answer would take half an hour. Its worker ends it, and is not killed for that."""
    model_id = await add_model("tiny", tokenizer_chat_template="x")
    asked = body.get("n", 1)
    reader, writer = await connect(client)
    writer.write(request_bytes(path, json.dumps(body).encode()))
    async with asyncio.timeout(WAIT_S):
        if body.get("stream"):
            while b"word1" not in await reader.readline():
                pass
        while not under_way(services.models.requests(), asked):
            await asyncio.sleep(0.02)
    before = services.models.status(model_id)
    assert before.in_flight == asked
    writer.close()
    await gone(services)
    after = services.models.status(model_id)
    assert (after.in_flight, after.worker_pid) == (0, before.worker_pid)
    assert before.slots == 2
    answers = await asyncio.gather(*(client.post(CHAT, json=ask("one two")) for _ in range(2)))
    for answer in answers:
        assert (await answer.json())["choices"][0]["message"]["content"] == "one two"
    assert services.models.status(model_id).worker_pid == before.worker_pid


def under_way(requests: list, count: int) -> bool:
    """Whether so many requests are in the middle of their answers; vectors come all at once."""
    return len(requests) == count and all(
        each.pieces > 1 or (each.kind == "embed" and each.state == "running") for each in requests
    )


async def test_an_answer_that_breaks_off_is_seen_to_be_broken(
    client, add_model, monkeypatch, caplog
):
    """A failure of modeld's own must not look like the end of an answer, or be a part of it."""

    def broken(*_) -> None:
        raise ZeroDivisionError

    await add_model()
    monkeypatch.setattr(_ChatView, "end", broken)
    reader, writer = await connect(client)
    writer.write(request_bytes(CHAT, json.dumps(ask("one two", stream=True)).encode()))
    said = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(WAIT_S):
            while part := await reader.read(65536):
                said += part
    assert said.count(b"HTTP/1.1") == 1 and b" two" in said
    assert not said.endswith(b"0\r\n\r\n") and b"error" not in said
    writer.close()
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(ClientPayloadError):
        async with client.post(CHAT, json=ask("one two", stream=True)) as response:
            await response.read()
    whole = await client.post(CHAT, json=ask("one two"))
    assert whole.status == 200, "the next request is not touched by it"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask("!words 60000")),
        ("/v1/messages", ask("!words 60000", max_tokens=100_000)),
        ("/api/chat", ask("!words 60000", stream=False)),
        ("/api/chat", ask("!words 60000")),
        ("/api/embed", {"model": "tiny", "input": ["word"] * 2048}),
        ("/qgpt/question", {"query": "!words 60000", "relevant": {"iterable": []}}),
    ],
    ids=["openai", "anthropic", "ollama", "ollama-stream", "vectors", "pieces"],
)
async def test_an_answer_that_nobody_reads_is_dropped(
    client, add_model, services, monkeypatch, path, body
):
    monkeypatch.setattr(streams, "STALLED_S", 0.5)
    await add_model("tiny", tokenizer_chat_template="x")
    narrow(client)
    open_before = len(client.server.handler.connections)
    reader, writer = await connect(client)
    writer.write(request_bytes(path, json.dumps(body).encode()))
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    async with asyncio.timeout(8):  # before an idle connection is closed
        while len(client.server.handler.connections) > open_before:
            await asyncio.sleep(0.05)
    await gone(services)
    writer.close()
    answer = await client.post(CHAT, json=ask("one two"))
    assert (await answer.json())["choices"][0]["message"]["content"] == "one two"


async def test_a_whole_answer_that_is_read_slowly_arrives(client, add_model, monkeypatch):
    monkeypatch.setattr(streams, "STALLED_S", 1.0)
    await add_model()
    narrow(client)
    reader, writer = await connect(client)
    writer.write(request_bytes(CHAT, json.dumps(ask("!words 60000")).encode()))
    said = await reader.read(1024)
    began = time.monotonic()
    async with asyncio.timeout(2 * WAIT_S):
        while b"word59999" not in said:
            said += await reader.read(32 * 1024)
            await asyncio.sleep(0.05)
    writer.close()
    assert len(said) > 500_000 and time.monotonic() - began > 2 * streams.STALLED_S
