"""Downloads when the daemon is started again, and on a disk that is full."""

from __future__ import annotations

import asyncio
import contextlib
import shutil

from disks import small_disk
from downloading import MIB, add, jobs, model, post, until
from hub import Faults

from daemon.downloads import room
from daemon.downloads.publish import DISK_MARGIN_BYTES


async def test_downloads_go_on_after_a_restart_by_themselves(start, hub, tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    hub.faults = Faults(rate_bytes_s=4 * MIB)
    client = await start(data_dir)
    await add(client, "a", "b", "c")
    for name in ("a", "b", "c"):
        await post(client, f"models/{name}/download", {"priority": "high"})
    await post(client, "models/b/download/pause")
    await until(client, lambda now: now["a"]["done_bytes"] >= 2 * MIB)
    await start.end()
    sent = hub.sent_bytes
    hub.faults = Faults()
    client = await start(data_dir)
    found = await until(client, lambda now: now["a"]["state"] == now["c"]["state"] == "completed")
    assert (found["b"]["state"], found["b"]["paused"]) == ("queued", "user")
    assert found["a"]["priority"] == "high"
    assert hub.sent_bytes - sent <= 2 * 8 * MIB - MIB
    await start.end()
    client = await start(data_dir)
    assert set(await jobs(client)) == {"b"}, "what is over is forgotten"


async def test_a_full_disk_pauses_a_download_and_room_goes_on_with_it(start, hub, tmp_path):
    with small_disk(tmp_path / "disk", 100 * MIB) as disk:
        hub.faults = Faults(rate_bytes_s=4 * MIB)
        client = await start(disk)
        await add(client, "a")
        await post(client, "models/a/download")
        await until(client, lambda now: now["a"]["done_bytes"] >= MIB)
        hog = disk / "hog"
        try:
            with hog.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(MIB // 4))
        except OSError:
            pass
        found = await until(client, lambda now: now["a"]["paused"])
        assert (found["a"]["state"], found["a"]["paused"]) == ("queued", "disk")
        assert found["a"]["error"]["code"] == "insufficient_disk"
        assert "is full" in found["a"]["error"]["message"]
        sent = hub.sent_bytes
        hub.faults = Faults()
        hog.unlink()
        await until(client, lambda now: now["a"]["state"] == "completed")
        assert hub.sent_bytes - sent <= 8 * MIB
        await start.end()


async def test_what_a_paused_download_wants_is_kept_and_shown_after_a_restart(start, hub, tmp_path):
    hub.faults = Faults(stall_at=3 * MIB)
    client = await start(tmp_path / "data")
    await add(client, "a", "b")
    for name in "ab":
        await post(client, f"models/{name}/download")
        await until(client, lambda now, name=name: now[name]["done_bytes"] >= MIB)
    paused = await post(client, "models/a/download/pause")
    await post(client, "models/b/download/cancel")
    await start.end()

    client = await start(tmp_path / "data")
    again = (await jobs(client))["a"]
    assert again["paused"] == "user" and again["done_bytes"] == paused["done_bytes"]
    assert again["percentage"] == paused["percentage"] > 0
    partials = (await (await client.get("/modeld/v1/downloads")).json())["partials"]
    assert {p["address"][-6:]: p["wanted"] for p in partials} == {"a.gguf": True, "b.gguf": False}
    await post(client, "downloads/clean")
    sent, hub.faults = hub.sent_bytes, Faults()
    await post(client, "models/a/download/resume")
    await until(client, lambda now: now["a"]["state"] == "completed")
    assert hub.sent_bytes - sent <= 8 * MIB - 2 * MIB, "nothing was lost"
    await start.end()


async def test_what_is_left_of_a_model_goes_with_it_also_after_a_restart(start, hub, tmp_path):
    hub.faults = Faults(stall_at=3 * MIB)
    client = await start(tmp_path / "data")
    await add(client, "a")
    await post(client, "models/a/download")
    await until(client, lambda now: now["a"]["done_bytes"] >= MIB)
    await post(client, "models/a/download/cancel")
    await start.end()
    client = await start(tmp_path / "data")
    partials = tmp_path / "data" / "store" / "partial"
    assert len(list(partials.iterdir())) == 1
    assert (await client.delete("/modeld/v1/models/a")).status == 204
    assert list(partials.iterdir()) == []
    await start.end()


async def test_a_disk_without_room_is_not_asked_again_and_again(start, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_LOOK_S", 0.5)
    big = model(tmp_path, 40, 9)
    hub.add("owner/big", {"big.gguf": big})
    with small_disk(tmp_path / "disk", 150 * MIB) as disk:
        client = await start(disk / "data")
        hog = disk / "hog"
        with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
            for _ in range(80):
                file.write(bytes(MIB))
        await post(client, "models", {"source": "hf:owner/big", "unique": "big"}, 201)
        await post(client, "models/big/download")
        found = await until(client, lambda now: now["big"]["paused"])
        assert found["big"]["paused"] == "disk" and hub.sent_bytes == 0
        asked = len(hub.requests)
        await asyncio.sleep(2)
        assert len(hub.requests) == asked, "it knows how much there must be"
        hog.unlink()
        await until(client, lambda now: now["big"]["state"] == "completed")
        await start.end()


async def test_what_is_here_of_a_download_needs_no_room_twice(start, hub, tmp_path):
    hub.add("owner/begun", {"m.gguf": model(tmp_path, 20, 7)})
    hub.add("owner/other", {"m.gguf": model(tmp_path, 20, 8)})
    with small_disk(tmp_path / "disk", 120 * MIB) as disk:
        client = await start(disk / "data")
        hub.faults = Faults(stall_at=12 * MIB)
        await post(client, "models", {"source": "hf:owner/begun", "unique": "begun"}, 201)
        await post(client, "models/begun/download")
        await until(client, lambda now: now["begun"]["done_bytes"] >= 7 * MIB)
        await post(client, "models/begun/download/cancel")
        hub.faults = Faults()
        spare = shutil.disk_usage(disk).free - DISK_MARGIN_BYTES - 14 * MIB
        (disk / "hog").write_bytes(bytes(spare))

        async def fits(repo: str) -> bool:
            answer = await post(client, "estimate", {"source": f"hf:{repo}"})
            return bool(answer["download"]["fits_disk"])

        assert await fits("owner/begun") and not await fits("owner/other")
        await post(client, "models/begun/download")
        await until(client, lambda now: now["begun"]["state"] == "completed")
        await start.end()
