"""The native stream of all that changes, as a WebSocket and as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from event_streams import PATH, of_lines, of_socket

WAIT_S = 20.0


@contextlib.asynccontextmanager
async def opened(client, kind: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    if kind == "socket":
        async with client.ws_connect(PATH) as socket:
            yield of_socket(socket)
    else:
        async with client.get(PATH) as response:
            assert response.content_type == "text/event-stream"
            yield of_lines(response)


async def until(events: AsyncIterator[dict[str, Any]], wanted: Any) -> list[dict[str, Any]]:
    """The events up to and with the first that is wanted."""
    seen = []
    async with asyncio.timeout(WAIT_S):
        async for event in events:
            seen.append(event)
            if wanted(event):
                return seen
    raise AssertionError("the stream ended")


async def test_both_forms_tell_all_that_changes(client, add_model):
    model_id = await add_model("tiny")
    for kind in ("socket", "lines"):
        async with opened(client, kind) as events:
            (first,) = await until(events, lambda event: True)
            assert first["type"] == "snapshot"
            assert [model["unique"] for model in first["models"] if model["custom"]] == ["tiny"]
            assert [job["unique"] for job in first["downloads"]] == ["tiny"]
            assert first["requests"] == [] and first["memory"]["reserved_bytes"] == 0
            body = {"model": "tiny", "messages": [{"role": "user", "content": "!slow 150"}]}
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            seen = await until(events, lambda event: event["type"] == "request_ended")
            assert (await asked).status == 200
            states = [e["model"]["state"] for e in seen if e["type"] == "model"]
            assert states[0] == "loading" and states[-1] == "ready"
            requests = [e["request"]["state"] for e in seen if e["type"] == "request"]
            assert requests[0] == "waiting" and requests[-1] == "running"
            memory = [e["memory"]["reserved_bytes"] for e in seen if e["type"] == "memory"]
            assert memory and memory[-1] > 0
            await client.post(f"/model/{model_id}/unload")
            last = await until(
                events,
                lambda event: event["type"] == "model" and event["model"]["state"] == "unloaded",
            )
            assert last[-1]["model"]["id"] == model_id


async def test_a_download_and_a_removal_are_told(client, add_model, services):
    async with opened(client, "socket") as events:
        await until(events, lambda event: True)
        model_id = await add_model("tiny")
        seen = await until(
            events,
            lambda event: event["type"] == "download" and event["download"]["state"] == "completed",
        )
        shares = [e["download"]["percentage"] for e in seen if e["type"] == "download"]
        assert shares == sorted(shares) and shares[-1] == 100
        await client.delete(f"/modeld/v1/models/{model_id}")
        seen = await until(events, lambda event: event["type"] == "model_deleted")
        assert seen[-1]["id"] == model_id
    assert services.models.requests() == []


async def test_a_load_tells_how_far_it_is(client, add_model):
    await add_model("tiny", test_load="slow 3")
    async with opened(client, "lines") as events:
        await until(events, lambda event: True)
        asked = asyncio.create_task(client.post("/modeld/v1/models/tiny/load"))
        seen = await until(
            events, lambda event: event["type"] == "model" and event["model"]["state"] == "ready"
        )
        assert (await asked).status == 200
        progress = [event["model"]["load_progress"] for event in seen if event["type"] == "model"]
        assert progress == sorted(progress) and len(set(progress)) > 3 and progress[-1] == 1


async def test_a_client_that_reads_late_gets_the_last_state(client, add_model):
    await add_model("tiny")
    async with opened(client, "socket") as events:
        await until(events, lambda event: True)
        for pinned in (True, False) * 20:
            await client.patch("/modeld/v1/models/tiny", json={"pinned": pinned})
        await client.patch("/modeld/v1/models/tiny", json={"keep_alive": "7m"})
        seen = await until(
            events, lambda event: event["type"] == "model" and event["model"]["keep_alive"] == "7m"
        )
        assert len(seen) < 30 and seen[-1]["model"]["pinned"] is False


async def test_the_stream_ends_with_the_daemon(client, services):
    for kind in ("socket", "lines"):
        services.stopping.clear()
        async with opened(client, kind) as events:
            await until(events, lambda event: True)
            services.stopping.set()
            async with asyncio.timeout(WAIT_S):
                assert [event async for event in events] == []
