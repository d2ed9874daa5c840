"""Both forms of the native stream of events, side by side at one daemon, while a model is used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import gguf_models
import pytest
from event_streams import PATH, of_lines, of_socket
from hub import Faults, LocalHub
from running import RunningDaemon, needs_engine

NAME = "watched"
MIB = 2**20
WAIT_S = 30.0
Change = tuple[str, str, str]  # of what kind, of which, to which state
# What may be over before a stream comes to tell of it.
PASSING = {
    ("download", "queued"),
    ("download", "verifying"),
    ("model", "unloading"),
    ("request", "waiting"),
}


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add("owner/watched", {"model-Q4_1.gguf": gguf_models.smollm2()})
        yield hub


@pytest.fixture
def daemon(hub, start_daemon) -> RunningDaemon:
    needs_engine("xllamacpp")
    return start_daemon(HF_ENDPOINT=hub.url, MODELD_MODELS_SLOTS="1")


class Told:
    """The changes of state that one stream has told of, in its order."""

    def __init__(self) -> None:
        self.last: dict[tuple[str, str], str] = {}
        self.changes: list[Change] = []

    async def read(self, events: AsyncIterator[dict[str, Any]]) -> None:
        """Take note of a stream until it ends."""
        async for event in events:
            if event["type"] == "snapshot":
                assert not self.last, "a stream begins with it"
                for model in event["models"]:
                    self.last["model", model["unique"]] = model["state"]
            elif event["type"] == "request_ended":
                self._note("request", event["id"], "ended")
            elif event["type"] == "request":
                self._note("request", event["request"]["id"], event["request"]["state"])
            elif event["type"] in ("model", "download"):
                shown = event[event["type"]]
                self._note(event["type"], shown["unique"], shown["state"])
        raise AssertionError("the stream ended")

    def _note(self, kind: str, key: str, state: str) -> None:
        """Take note of what is shown, unless only something else about it has changed."""
        if self.last.get((kind, key)) != state:
            self.last[kind, key] = state
            self.changes.append((kind, key, state))


class Story:
    """What happens, step by step; both streams have told of each step before the next.

    So a step lasts for longer than a stream takes to tell of it. A state that passes in between one
    stream may tell of, and the other one miss.
    """

    def __init__(self, *streams: Told) -> None:
        self._streams = streams
        self._steps: list[Change] = []

    def _told(self, changes: list[Change]) -> list[Change]:
        """Return what is told of the story: its steps in their order, and what does not belong."""
        known = {(kind, key) for kind, key, _ in self._steps}
        told: list[Change] = []
        for change in changes:
            kind, key, state = change
            due = self._steps[len(told)] if len(told) < len(self._steps) else None
            if change == due or ((kind, key) in known and (kind, state) not in PASSING):
                told.append(change)
        return told

    async def goes_on(self, *step: str) -> None:
        """Wait until the streams have told of a step, after those before it and nothing else."""
        kind, key, state = step
        self._steps.append((kind, key, state))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                while any(
                    len(self._told(each.changes)) < len(self._steps) for each in self._streams
                ):
                    await asyncio.sleep(0.02)
        for each in self._streams:
            # What came since belongs to the steps to come.
            assert self._told(each.changes)[: len(self._steps)] == self._steps, each.changes

    def ends(self) -> None:
        """Fail unless the streams have told the whole story, and no more than that."""
        for each in self._streams:
            assert self._told(each.changes) == self._steps, each.changes


async def test_both_tell_the_same_in_the_same_order(daemon, hub):
    async with (
        aiohttp.ClientSession(daemon.url) as session,
        session.ws_connect(PATH, max_msg_size=0) as socket,
        session.get(PATH, timeout=aiohttp.ClientTimeout(total=None)) as lines,
        asyncio.TaskGroup() as group,
    ):

        async def post(path: str, body: Any = None) -> None:
            async with session.post(path, json=body) as answer:
                assert answer.status < 300, await answer.text()

        async def ask() -> int:
            asked = {"model": NAME, "messages": [{"role": "user", "content": "Tell a story."}]}
            asked |= {"max_tokens": 4000, "ignore_eos": True, "temperature": 0}
            async with session.post("/v1/chat/completions", json=asked) as answer:
                return answer.status

        async def asked(count: int) -> str:
            """Return the id of the newest of so many requests."""
            async with asyncio.timeout(WAIT_S):
                while True:
                    async with session.get("/modeld/v1/requests") as answer:
                        requests = (await answer.json())["requests"]
                    if len(requests) == count:
                        return str(requests[-1]["id"])
                    await asyncio.sleep(0.02)

        told = [Told(), Told()]
        readers = [
            group.create_task(told[0].read(of_socket(socket))),
            group.create_task(told[1].read(of_lines(lines))),
        ]
        story = Story(*told)
        await post("/modeld/v1/models", {"source": "hf:owner/watched", "unique": NAME})
        await story.goes_on("model", NAME, "unloaded")

        hub.faults = Faults(stall_at=2 * MIB)
        await post(f"/modeld/v1/models/{NAME}/download")
        await story.goes_on("download", NAME, "running")
        await post(f"/modeld/v1/models/{NAME}/download/pause")
        await story.goes_on("download", NAME, "queued")
        hub.faults = Faults()
        await post(f"/modeld/v1/models/{NAME}/download/resume")
        await story.goes_on("download", NAME, "running")
        await story.goes_on("download", NAME, "completed")

        await post(f"/modeld/v1/models/{NAME}/load")
        await story.goes_on("model", NAME, "loading")
        await story.goes_on("model", NAME, "ready")

        answers = [group.create_task(ask())]
        first = await asked(1)
        await story.goes_on("request", first, "running")
        answers.append(group.create_task(ask()))
        second = await asked(2)
        await story.goes_on("request", second, "waiting")
        for key in (second, first):
            async with session.delete(f"/modeld/v1/requests/{key}") as killed:
                assert killed.status < 300, await killed.text()
            await story.goes_on("request", key, "ended")
        assert await asyncio.gather(*answers) == [409, 409]

        await post(f"/modeld/v1/models/{NAME}/unload")
        await story.goes_on("model", NAME, "unloaded")
        assert told[0].last == told[1].last
        story.ends()
        for reader in readers:
            reader.cancel()
