"""The catalog follows what upstreams list: real listers, a real catalog, an upstream that changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Self

import pytest
from upstream import KEY, FaultyUpstream, status

from daemon import upstreams as module
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord
from daemon.catalog.seed import builtin
from daemon.config import Remote
from daemon.errors import LoadFailed, ModelNotFound
from daemon.upstreams import Upstreams

PATIENCE_S = 20.0


@pytest.fixture
async def upstream() -> AsyncIterator[FaultyUpstream]:
    async with FaultyUpstream() as started:
        yield started


@pytest.fixture
def catalog(tmp_path: Path):
    opened = Catalog(tmp_path / "catalog.db")
    yield opened
    opened.close()


class Followed:
    """Upstreams at work on a catalog, and which models they took away."""

    def __init__(self, settings: Mapping[str, Remote], catalog: Catalog) -> None:
        self.upstreams = Upstreams(settings, catalog)
        self.catalog = catalog
        self.gone: list[str] = []

    async def _gone(self, record: ModelRecord) -> None:
        self.gone.append(record.unique)
        self.catalog.remove(record.id)

    async def __aenter__(self) -> Self:
        self.upstreams.begin(self._gone)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.upstreams.close()

    def names(self) -> list[str]:
        return sorted(record.unique for record in self.catalog.cloud())

    async def until(self, *names: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.names() != sorted(names):
                await asyncio.sleep(0.02)


def lists(upstream: FaultyUpstream, *models: str) -> None:
    upstream.models = {"data": [{"id": model} for model in models]}


def settings(upstream: FaultyUpstream, **fields) -> dict[str, Remote]:
    return {"far": Remote(url=upstream.url, api_key=KEY, **fields)}


async def test_listed_models_are_in_the_catalog_ready_to_be_asked(upstream, catalog):
    async with Followed(settings(upstream), catalog) as followed:
        await followed.until("far:tiny-Model-1")
        record = catalog.get("far:tiny-Model-1")
        assert record.cloud and record.downloaded and not record.custom
        assert record.source == "remote:far/tiny/Model 1" and record.name == "tiny/Model 1"
        assert (record.format, record.backend, record.context_length) == ("remote", "remote", 2048)
        far = followed.upstreams.of(record)
        assert far is not None
        assert (far.url, far.model, far.api_key) == (upstream.url, "tiny/Model 1", KEY)


async def test_ids_stay_the_same_and_the_built_in_catalog_leaves_them_alone(
    upstream, catalog, tmp_path
):
    async with Followed(settings(upstream), catalog) as followed:
        await followed.until("far:tiny-Model-1")
        before = catalog.get("far:tiny-Model-1")
    catalog.seed(builtin())
    assert catalog.get("far:tiny-Model-1") == before
    catalog.remove(before.id)
    async with Followed(settings(upstream), catalog) as followed:
        await followed.until("far:tiny-Model-1")
        assert catalog.get("far:tiny-Model-1").id == before.id


async def test_names_that_clash_are_told_apart_always_in_the_same_way(upstream, catalog):
    found = []
    for order in (("a b", "a/b", "a-b"), ("a-b", "a/b", "a b")):
        lists(upstream, *order)
        async with Followed(settings(upstream), catalog):
            async with asyncio.timeout(PATIENCE_S):
                while len(catalog.cloud()) < 3:
                    await asyncio.sleep(0.02)
        found.append({record.name: record.unique for record in catalog.cloud()})
        for record in catalog.cloud():
            catalog.remove(record.id)
    assert found[0] == found[1]
    assert found[0]["a-b"] == "far:a-b" and len(set(found[0].values())) == 3
    assert all(name.startswith("far:a-b") for name in found[0].values())


async def test_a_user_s_own_model_keeps_its_name(upstream, catalog):
    own = ModelRecord(id="own", unique="far:m", name="m", created="2026-01-01T00:00:00Z")
    catalog.add(own)
    lists(upstream, "m", "x" * 300)
    async with Followed(settings(upstream), catalog) as followed:
        async with asyncio.timeout(PATIENCE_S):
            while len(catalog.cloud()) < 2:
                await asyncio.sleep(0.02)
        assert catalog.get("far:m") == own
        assert followed.names()[0].startswith("far:m-")
        assert len(followed.names()[1]) == 200


async def test_only_allowed_models_are_taken(upstream, catalog):
    lists(upstream, "a", "b")
    async with Followed(settings(upstream, models=("b", "c")), catalog) as followed:
        await followed.until("far:b")


async def test_a_look_at_the_models_asks_again_once_the_answer_is_old(
    upstream, catalog, monkeypatch
):
    lists(upstream, "a", "b")
    async with Followed(settings(upstream), catalog) as followed:
        await followed.until("far:a", "far:b")
        catalog.all()
        assert len(upstream.requests) == 1
    monkeypatch.setattr(module, "_STALE_S", 0.0)
    async with Followed(settings(upstream), catalog) as followed:
        lists(upstream, "b", "c")
        async with asyncio.timeout(PATIENCE_S):
            while followed.names() != ["far:b", "far:c"]:
                catalog.all()
                await asyncio.sleep(0.02)
        assert followed.gone == ["far:a"]


async def test_an_upstream_that_fails_keeps_its_models_and_is_asked_again(
    upstream, catalog, monkeypatch, caplog
):
    lists(upstream, "a")
    async with Followed(settings(upstream), catalog) as followed:
        await followed.until("far:a")
    upstream.requests.clear()
    upstream.listing = status(500, {"error": {"message": f"the key {KEY} made me fail"}})
    monkeypatch.setattr(module, "_FAILED_S", 0.0)
    async with Followed(settings(upstream), catalog) as followed:
        async with asyncio.timeout(PATIENCE_S):
            while "made me fail" not in caplog.text:
                await asyncio.sleep(0.02)
        assert followed.names() == ["far:a"]
        assert KEY not in caplog.text
        upstream.listing = None
        lists(upstream, "a", "b")
        async with asyncio.timeout(PATIENCE_S):
            while catalog.find("far:b") is None:  # the first one to ask for it starts the inquiry
                await asyncio.sleep(0.02)


async def test_what_the_settings_no_longer_have_is_forgotten_at_the_start(upstream, catalog):
    lists(upstream, "a", "b")
    async with Followed(settings(upstream), catalog) as followed:
        await followed.until("far:a", "far:b")
        record = catalog.get("far:a")
    upstream.listing = status(500)
    async with Followed(settings(upstream, models=("b",)), catalog) as followed:
        assert followed.names() == ["far:b"]
    async with Followed({}, catalog) as followed:
        assert followed.names() == []
        with pytest.raises(LoadFailed, match=r"\[remote.far\]"):
            followed.upstreams.of(record)
        with pytest.raises(ModelNotFound):
            catalog.get("far:a")


async def test_an_inquiry_that_goes_on_ends_with_the_daemon(upstream, catalog):
    from upstream import silent

    upstream.listing = silent
    async with Followed(settings(upstream), catalog):
        async with asyncio.timeout(PATIENCE_S):
            while not upstream.requests:
                await asyncio.sleep(0.02)
    await asyncio.wait_for(upstream.left.wait(), PATIENCE_S)
