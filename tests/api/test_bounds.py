"""Clients that leave, read nothing, or send too slowly or too much: each is dealt with in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time

import pytest
from aiohttp import ClientPayloadError, WSMsgType

from daemon.api import errors, streams
from daemon.api.openai.chat import _ChatView

WAIT_S = 20.0
CHAT = "/v1/chat/completions"


def ask(content: str, **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


async def connect(client) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has room for very little that it does not read."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.setblocking(False)
    await asyncio.get_running_loop().sock_connect(opened, ("127.0.0.1", client.port))
    return await asyncio.open_connection(sock=opened, limit=4096)


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


async def test_a_body_that_trickles_in_is_refused(client, add_model, monkeypatch):
    monkeypatch.setattr(errors, "_BODY_S", 1.0)
    await add_model()
    reader, writer = await connect(client)
    body = json.dumps(ask("one two")).encode()
    began = time.monotonic()
    writer.write(request_bytes(CHAT, b"", len(body)))

    async def trickle() -> None:
        for byte in body:
            writer.write(bytes([byte]))
            await asyncio.sleep(1)

    trickling = asyncio.create_task(trickle())
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - began < 5
    error = json.loads(await reader.readuntil(b"}}"))["error"]
    assert error["code"] == "body_timeout" and "within 1 s" in error["message"]
    trickling.cancel()
    writer.close()


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


@pytest.mark.alone
async def test_a_client_that_leaves_ends_its_work_at_once(client, add_model, services):
    await add_model()
    for stream in (True, False):
        reader, writer = await connect(client)
        body = json.dumps(ask("!slow 100000", stream=stream)).encode()
        writer.write(request_bytes(CHAT, body))
        async with asyncio.timeout(WAIT_S):
            while not any(each.pieces for each in services.models.requests()):
                await asyncio.sleep(0.02)
        writer.close()
        began = time.monotonic()
        await gone(services)
        assert time.monotonic() - began < 2
        del reader


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
    (listening,) = client.server.runner.sites.copy().pop()._server.sockets
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)  # so has what it accepts
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
    monkeypatch.setattr(streams, "STALLED_S", 0.2)
    await add_model()
    reader, writer = await connect(client)
    writer.write(request_bytes(CHAT, json.dumps(ask("!words 60000")).encode()))
    said = b""
    async with asyncio.timeout(WAIT_S):
        while b"word59999" not in said:
            said += await reader.read(32 * 1024)
            await asyncio.sleep(0.05)
    writer.close()
    assert len(said) > 500_000
