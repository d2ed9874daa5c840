"""Downloads at the wrong moment: paused, cancelled, killed or cleaned up while something ends."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from downloading import MIB, NAMES, add, jobs, post, until
from hub import Faults

from daemon.downloads import orphans
from daemon.store import Store


class Gate:
    """Holds up the step that comes between the end of a fetcher and that of its job."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        drop_work = store.drop_work

        def slow(model_id: str) -> None:
            self.reached.set()
            self.open.wait(20)
            drop_work(model_id)

        monkeypatch.setattr(store, "drop_work", slow)

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 20)


@pytest.fixture
def gate(services, monkeypatch) -> Iterator[Gate]:
    made = Gate(services.store, monkeypatch)
    yield made
    made.open.set()


async def until_heard(services) -> None:
    """Wait until a cancel or a pause has reached the job."""
    job = services.downloads.get(services.catalog.get("a").id)
    async with asyncio.timeout(20):
        while job.why is None:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("what", ["cancel", "pause"])
async def test_what_comes_too_late_for_a_download_leaves_it_whole(client, services, gate, what):
    await add(client, *NAMES)
    await post(client, "models/a/download")
    await gate.until_reached()
    late = asyncio.create_task(post(client, f"models/a/download/{what}"))
    await until_heard(services)
    gate.open.set()
    await late
    assert (await jobs(client))["a"]["state"] == "completed"
    for name in "bcd":  # and no place in the queue is lost
        await post(client, f"models/{name}/download")
    await until(client, lambda now: all(now[name]["state"] == "completed" for name in NAMES))


@pytest.mark.parametrize(("what", "state"), [("cancel", "canceled"), ("pause", "queued")])
async def test_what_comes_while_a_failure_is_being_cleaned_up_counts(
    client, hub, services, gate, what, state
):
    hub.faults = Faults(status=404)
    await add(client, "a", "b")
    await post(client, "models/a/download")
    await gate.until_reached()
    late = asyncio.create_task(post(client, f"models/a/download/{what}"))
    await until_heard(services)
    gate.open.set()
    await late
    assert (await jobs(client))["a"]["state"] == state
    hub.faults = Faults()
    await post(client, "models/a/download")
    await post(client, "models/b/download")
    await until(client, lambda now: all(now[name]["state"] == "completed" for name in "ab"))


@pytest.mark.parametrize("again", ["models/a/download/resume", "models/a/download"])
async def test_who_resumes_while_a_pause_still_ends_the_fetcher_is_heeded(client, hub, gate, again):
    hub.faults = Faults(stall_at=2 * MIB)
    await add(client, "a")
    await post(client, "models/a/download")
    await until(client, lambda now: now["a"]["done_bytes"] > 0)
    pausing = asyncio.create_task(post(client, "models/a/download/pause"))
    await gate.until_reached()
    hub.faults = Faults()
    await post(client, again)
    gate.open.set()
    await pausing
    await until(client, lambda now: now["a"]["state"] == "completed")


async def test_who_cancels_while_a_pause_still_ends_the_fetcher_is_heeded(client, hub, gate):
    hub.faults = Faults(stall_at=2 * MIB)
    await add(client, "a")
    await post(client, "models/a/download")
    await until(client, lambda now: now["a"]["done_bytes"] > 0)
    asked = [asyncio.create_task(post(client, "models/a/download/pause"))]
    await gate.until_reached()
    await post(client, "models/a/download/resume")
    asked.append(asyncio.create_task(post(client, "models/a/download/cancel")))
    await asyncio.sleep(0.1)
    gate.open.set()
    await asyncio.gather(*asked)
    seen = len(hub.requests)
    await asyncio.sleep(0.5)
    assert (await jobs(client))["a"]["state"] == "canceled" and len(hub.requests) == seen


# a fetcher that somebody kills


def kill_fetcher(services, name: str) -> None:
    job = services.downloads.get(services.catalog.get(name).id)
    if job.child is not None:
        os.kill(job.child.pid, signal.SIGKILL)


async def test_a_fetcher_that_is_killed_is_started_again_and_goes_on(client, hub, services):
    hub.faults = Faults(rate_bytes_s=4 * MIB)
    await add(client, "a")
    await post(client, "models/a/download")
    for mib in (2, 3, 4, 5, 6):
        await until(client, lambda now, mib=mib: now["a"]["done_bytes"] >= mib * MIB)
        kill_fetcher(services, "a")
    found = await until(client, lambda now: now["a"]["state"] == "completed")
    assert "killed by SIGKILL (9)" in found["a"]["note"]
    assert hub.sent_bytes <= 8 * MIB + 5 * MIB, "not from the beginning"


async def test_one_that_is_killed_again_and_again_is_given_up(client, hub, services):
    hub.faults = Faults(stall_at=0)
    await add(client, "a")
    await post(client, "models/a/download")
    for seen in range(1, 5):
        await until(client, lambda _, seen=seen: len(hub.seen("/cdn/")) >= seen)
        kill_fetcher(services, "a")
    found = await until(client, lambda now: now["a"]["state"] == "failed")
    assert "killed by SIGKILL (9)" in found["a"]["error"]["message"]


# what is left, and who wants it


async def test_a_list_of_unfinished_files_outlives_their_end(services, monkeypatch):
    store = services.store
    kept = store.partials / ("a" * 64)
    kept.mkdir()
    (store.partials / ".DS_Store").touch()
    gone = store.partials / ("b" * 64)
    unfinished = store.unfinished
    monkeypatch.setattr(store, "unfinished", lambda: [gone, *unfinished()])
    found = orphans.find(store, services.downloads.wanted())
    assert [left.key for left in found] == [kept.name]
    assert orphans.remove(store, services.downloads.wanted()) >= 0
    assert not kept.exists()


async def test_so_little_bandwidth_that_it_can_t_be_shared_is_no_freedom(client, hub):
    await add(client, "a", "b")
    await client.patch("/modeld/v1/downloads", json={"bandwidth_limit": 1})
    for name in "ab":
        await post(client, f"models/{name}/download")
    await until(client, lambda now: all(now[name]["done_bytes"] for name in "ab"))
    await asyncio.sleep(1)
    assert {job["state"] for job in (await jobs(client)).values()} == {"running"}
    await client.patch("/modeld/v1/downloads", json={"bandwidth_limit": 0})
    await until(client, lambda now: all(now[name]["state"] == "completed" for name in "ab"))
