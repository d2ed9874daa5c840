"""What clients that only wait cost the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import resource

import aiohttp
import pytest
from running import SAMPLE, RunningDaemon

from daemon.memory.measure import private_bytes

SOCKETS, QUEUED = 500, 200
MOST_BYTES = 60_000_000
LONG = {
    "model": SAMPLE,
    "messages": [{"role": "user", "content": "Tell a story."}],
    "max_tokens": 4000,
    "ignore_eos": True,
}


@pytest.fixture
def daemon(tmp_path):
    config = tmp_path / "modeld.toml"
    config.write_text(f"[models]\nqueue_limit = {QUEUED + 8}\nslots = 1\n")
    daemon = RunningDaemon(tmp_path, "--config", str(config))
    try:
        yield daemon.start()
    finally:
        daemon.stop()


@pytest.fixture(autouse=True)
def many_files():
    """Enough descriptors for this end of the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def socket_paths(daemon: RunningDaemon) -> list[str]:
    """All that a WebSocket may be opened at, as the daemon itself describes it."""
    model_id = daemon.model()["id"]
    described = daemon.json("GET", "/openapi.json")["paths"]
    paths = [
        path.replace("{model}", model_id)
        for path, methods in described.items()
        if "101" in methods.get("get", {}).get("responses", {})
    ]
    assert {
        f"/model/{model_id}/download/progress",
        "/models/stream/identifiers",
        "/conversations/stream/identifiers",
        "/user/stream",
        "/qgpt/stream",
        "/modeld/v1/events",
        "/.well-known/stream/health",
    } <= set(paths)
    return paths


async def read(socket: aiohttp.ClientWebSocketResponse) -> None:
    """Take what comes, and answer pings, until the socket ends."""
    async for _ in socket:
        pass


async def test_idle_sockets_and_queued_requests_cost_little(daemon):
    daemon.download()
    daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
    paths = socket_paths(daemon)
    before = private_bytes(daemon.pid)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(daemon.url, connector=connector) as session,
        contextlib.AsyncExitStack() as stack,
    ):
        reading: list[asyncio.Task[None]] = []
        for path in itertools.islice(itertools.cycle(paths), SOCKETS):
            socket = await stack.enter_async_context(session.ws_connect(path, max_msg_size=0))
            reading.append(asyncio.create_task(read(socket)))
        requests = [
            asyncio.create_task(session.post("/v1/chat/completions", json=LONG))
            for _ in range(QUEUED + 1)
        ]
        stack.callback(lambda: [request.cancel() for request in requests])
        async with asyncio.timeout(30):
            while daemon.model()["waiting"] < QUEUED:
                await asyncio.sleep(0.1)
        cost = private_bytes(daemon.pid) - before
        print(f"{SOCKETS} sockets and {QUEUED} requests: {cost / 1e6:.1f} MB")
        assert 0 < cost < MOST_BYTES
        ended = {paths[number % len(paths)] for number, each in enumerate(reading) if each.done()}
        assert not ended, "their sockets are not there any more"
        async with session.get("/.well-known/health") as health:
            assert (await health.text()).startswith("ok:")
    await asyncio.gather(*reading)
    async with asyncio.timeout(30):
        while json.loads(daemon.request("GET", "/modeld/v1/requests")[2])["requests"]:
            await asyncio.sleep(0.1)
