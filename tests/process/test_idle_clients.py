"""What clients that only wait cost the daemon."""

from __future__ import annotations

import asyncio
import contextlib
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


async def test_idle_sockets_and_queued_requests_cost_little(daemon):
    daemon.download()
    daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
    model_id = daemon.model()["id"]
    paths = (
        f"/model/{model_id}/download/progress",
        "/models/stream/identifiers",
        "/modeld/v1/events",
        "/.well-known/stream/health",
    )
    before = private_bytes(daemon.pid)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(daemon.url, connector=connector) as session,
        contextlib.AsyncExitStack() as stack,
    ):
        for number in range(SOCKETS):
            path = paths[number % len(paths)]
            await stack.enter_async_context(session.ws_connect(path, max_msg_size=0))
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
        async with session.get("/.well-known/health") as health:
            assert (await health.text()).startswith("ok:")
    async with asyncio.timeout(30):
        while json.loads(daemon.request("GET", "/modeld/v1/requests")[2])["requests"]:
            await asyncio.sleep(0.1)
