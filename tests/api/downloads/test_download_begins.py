"""Downloads that are paused, cancelled or closed in the moments when they begin and end."""

from __future__ import annotations

import asyncio

import pytest
from downloading import add, jobs, post, until
from hub import Faults

from daemon.api.context import SERVICES
from daemon.downloads.job import JobState, Paused
from daemon.errors import Stopping

MIB = 1024**2


def begin(client):
    """Start the download of a model: its task is made, and has no step before the caller waits."""
    services = client.app[SERVICES]
    job = services.downloads.start(services.catalog.get("a"))
    assert job.task is not None and job.state is JobState.QUEUED
    return services.downloads, job


async def test_who_pauses_before_the_first_step_is_heeded(client, hub):
    await add(client, "a")
    downloads, job = begin(client)
    async with asyncio.timeout(10):
        await downloads.pause(job.model_id)
    assert (job.state, job.paused, job.task) == (JobState.QUEUED, Paused.USER, None)
    assert hub.requests == []
    await post(client, "models/a/download/resume")
    await until(client, lambda now: now["a"]["state"] == "completed")


async def test_who_cancels_before_the_first_step_is_heeded(client, hub):
    await add(client, "a")
    downloads, job = begin(client)
    async with asyncio.timeout(10):
        await downloads.cancel(job.model_id)
    assert (job.state, job.task) == (JobState.CANCELED, None)
    assert hub.requests == []
    await post(client, "models/a/download")
    await until(client, lambda now: now["a"]["state"] == "completed")


async def test_who_resumes_before_the_first_step_is_heeded(client):
    await add(client, "a")
    downloads, job = begin(client)
    pausing = downloads.pause(job.model_id)
    pausing.send(None)  # as far as it gets without the loop
    assert job.why is Paused.USER
    downloads.resume(job.model_id)
    found = await until(client, lambda now: now["a"]["state"] == "completed")
    assert found["a"]["paused"] is None
    pausing.close()


@pytest.mark.parametrize("how", ["pause", "cancel"])
async def test_what_was_asked_before_modeld_stops_outlives_it(start, hub, tmp_path, how):
    """The job's fetcher ends only while the daemon does."""
    hub.faults = Faults(rate_bytes_s=4 * MIB)
    client = await start(tmp_path / "data")
    await add(client, "a")
    await post(client, "models/a/download")
    await until(client, lambda now: now["a"]["done_bytes"] >= MIB)
    services = client.app[SERVICES]
    model_id = services.catalog.get("a").id
    asked = asyncio.create_task(getattr(services.downloads, how)(model_id))
    while services.downloads.get(model_id).why is None:
        await asyncio.sleep(0)
    closing = asyncio.create_task(services.downloads.close())
    await asyncio.gather(asked, closing)
    with pytest.raises(Stopping):
        await services.downloads.pause(model_id)
    with pytest.raises(Stopping):
        await services.downloads.cancel(model_id)
    await start.end()

    client = await start(tmp_path / "data")
    found = await jobs(client)
    if how == "pause":
        assert (found["a"]["state"], found["a"]["paused"]) == ("queued", "user")
    else:
        assert found == {}, "it does not begin again by itself"


async def test_progress_is_told_also_while_nothing_comes(client, hub, services):
    hub.faults = Faults(stall_at=3 * MIB)
    await add(client, "a")
    await post(client, "models/a/download")
    assert await asyncio.to_thread(hub.stalled.wait, 30)
    async with asyncio.timeout(10):  # long before anybody gives the connection up
        await until(client, lambda now: now["a"]["done_bytes"] >= 2 * MIB)
    await services.downloads.cancel(services.catalog.get("a").id)


async def test_how_far_a_file_is_never_goes_back_over_a_pause(client, hub):
    hub.faults = Faults(stall_at=6 * MIB)
    await add(client, "a")
    await post(client, "models/a/download")
    shown = 0

    def grows(now):
        nonlocal shown
        (file,) = now["a"]["files"] or [{"done_bytes": 0}]
        assert file["done_bytes"] >= shown
        shown = file["done_bytes"]
        return shown >= 4 * MIB

    await until(client, grows)
    await post(client, "models/a/download/pause")
    hub.faults = Faults()
    await post(client, "models/a/download/resume")
    await until(client, lambda now: grows(now) and now["a"]["state"] == "completed")
    assert shown == (await jobs(client))["a"]["total_bytes"]
