"""The content store: ids become paths inside it or nothing, and no file goes that is still used."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disks import small_disk

from backends.contract import Artifact, ModelFile
from daemon.downloads.unfinished import locked
from daemon.errors import Conflict
from daemon.store import Store, check_unchanged, remove_at_once


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def add_blob(store: Store, sha256: str, content: bytes = b"weights") -> Path:
    blob = store.blobs / sha256
    blob.write_bytes(content)
    return blob


def link(store: Store, model_id: str, name: str, blob: Path) -> Path:
    path = store.model_dir(model_id) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(blob, path)
    return path


def new_id() -> str:
    return str(uuid.uuid4())


# paths


def test_a_model_s_folders_are_named_by_its_id(store):
    model_id = new_id()
    assert store.model_dir(model_id) == store.root / "models" / model_id
    assert store.work_dir(model_id) == store.root / "work" / model_id


@pytest.mark.parametrize(
    "model_id",
    [
        "",
        ".",
        "..",
        "../blobs",
        "/etc",
        "smollm2",
        "00000000-0000-0000-0000-00000000000",
        "00000000-0000-0000-0000-0000000000000",
        "00000000-0000-0000-0000-000000000000/..",
        "00000000-0000-0000-0000-000000000000\n",
        "00000000-0000-0000-0000-00000000000G",
        "AAAAAAAA-0000-0000-0000-000000000000",
        "{00000000-0000-0000-0000-000000000000}",
        "00000000000000000000000000000000",
        "٠0000000-0000-0000-0000-000000000000",
    ],
)
def test_what_is_no_id_never_becomes_a_path(store, model_id):
    for use in (store.model_dir, store.work_dir, store.drop_model, store.drop_work):
        with pytest.raises(ValueError, match="is not a model id"):
            use(model_id)


def test_the_store_is_for_this_user_alone(store):
    for folder in ("blobs", "models", "partial", "scratch"):
        assert stat.S_IMODE((store.root / folder).stat().st_mode) == 0o700


# scratch


def test_every_worker_gets_a_private_folder_of_its_own(store):
    one, two = store.new_scratch(), store.new_scratch()
    assert one != two and one.parent == two.parent == store.root / "scratch"
    assert stat.S_IMODE(one.stat().st_mode) == 0o700
    (one / "deep").mkdir()
    (one / "deep" / "file").touch()
    store.drop_scratch(one)
    store.drop_scratch(one)
    assert not one.exists() and two.is_dir()


def test_what_an_earlier_daemon_did_not_finish_goes_and_all_that_is_whole_stays(store):
    model_id = new_id()
    left = store.new_scratch()
    link(store, model_id, "m.gguf", add_blob(store, "a" * 64))
    store.work_dir(model_id).mkdir()
    (store.work_dir(model_id) / "m.gguf").touch()
    (store.partials / ("a" * 64)).mkdir()
    (store.partials / ("a" * 64) / "data").write_bytes(b"what is here")
    again = Store(store.root)
    assert not left.exists() and not again.work_dir(model_id).exists()
    assert (again.partials / ("a" * 64) / "data").read_bytes() == b"what is here"
    assert (again.model_dir(model_id) / "m.gguf").read_bytes() == b"weights"
    for folder in ("scratch", "work"):
        assert stat.S_IMODE((again.root / folder).stat().st_mode) == 0o700


# dropping


def test_the_last_model_of_a_blob_takes_it_along(store):
    model_id = new_id()
    blob = add_blob(store, "a" * 64)
    link(store, model_id, "m.gguf", blob)
    store.drop_model(model_id)
    assert not blob.exists() and not store.model_dir(model_id).exists()


def test_a_blob_stays_as_long_as_any_model_has_it(store):
    one, two = new_id(), new_id()
    shared, own = add_blob(store, "a" * 64), add_blob(store, "b" * 64, b"other")
    link(store, one, "first.gguf", shared)
    link(store, one, "own.gguf", own)
    kept = link(store, two, "second.gguf", shared)
    store.drop_model(one)
    assert shared.exists() and kept.read_bytes() == b"weights"
    assert not own.exists()
    store.drop_model(two)
    assert not shared.exists()


def test_files_in_folders_of_a_model_count_like_all_others(store):
    one, two = new_id(), new_id()
    shared, own = add_blob(store, "a" * 64), add_blob(store, "b" * 64, b"other")
    link(store, one, "1_Pooling/config.json", shared)
    link(store, one, "a/b/c.json", own)
    kept = link(store, two, "onnx/deep/model.onnx", shared)
    store.drop_model(one)
    assert not store.model_dir(one).exists() and not own.exists()
    assert shared.exists() and kept.read_bytes() == b"weights"
    store.sweep({two})
    assert shared.exists() and kept.read_bytes() == b"weights"
    store.drop_model(two)
    assert not shared.exists()


def test_a_blob_that_a_download_just_finished_is_not_mistaken_for_rubbish(store):
    model_id = new_id()
    link(store, model_id, "m.gguf", add_blob(store, "a" * 64))
    unlinked = add_blob(store, "b" * 64, b"not linked yet")
    store.drop_model(model_id)
    assert unlinked.exists()


def test_a_user_s_own_file_stays_when_its_model_goes(store, tmp_path):
    model_id = new_id()
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"weights")
    blob = store.blobs / ("a" * 64)
    os.link(mine, blob)
    link(store, model_id, "mine.gguf", blob)
    store.drop_model(model_id)
    assert not blob.exists()
    assert mine.read_bytes() == b"weights"


def test_models_may_be_dropped_side_by_side(store):
    """Each is dropped on a thread of its own, so one may go while another looks around."""
    models = [new_id() for _ in range(200)]
    shared = add_blob(store, "f" * 64, b"shared by all")
    for number, model_id in enumerate(models):
        link(store, model_id, "own.gguf", add_blob(store, f"{number:064x}", b"own"))
        link(store, model_id, "shared.gguf", shared)
    with ThreadPoolExecutor(max_workers=4) as threads:
        list(threads.map(store.drop_model, models))
    assert list((store.root / "models").iterdir()) == []
    assert list(store.blobs.iterdir()) == []


def test_dropping_what_is_not_there_is_no_error(store):
    store.drop_model(new_id())
    store.drop_work(new_id())
    store.drop_partial("a" * 64)


@pytest.mark.parametrize("key", ["", "..", "../blobs", "a/b", "A" * 64, "a" * 39, "u-"])
def test_a_key_of_an_unfinished_file_leads_nowhere_else(store, key):
    with pytest.raises(ValueError, match="no key"):
        store.drop_partial(key)


def test_an_unfinished_download_is_dropped_alone(store):
    one, two = new_id(), new_id()
    for model_id in (one, two):
        store.work_dir(model_id).mkdir()
        (store.work_dir(model_id) / "m.gguf").touch()
    store.drop_work(one)
    assert not store.work_dir(one).exists()
    assert (store.work_dir(two) / "m.gguf").exists()


# unchanged files


def artifact(*paths: Path) -> Artifact:
    files = []
    for path in paths:
        facts = path.stat()
        files.append(
            ModelFile(
                path=str(path), size_bytes=facts.st_size, mtime_ns=facts.st_mtime_ns, sha256=""
            )
        )
    return Artifact(
        format="gguf",
        files=tuple(files),
        architecture="llama",
        parameters=1,
        quantization="F16",
        context_length=1,
        weights_bytes=1,
    )


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    for path in (one, two):
        path.write_bytes(b"weights")
    return one, two


def conflict(checked: Artifact) -> str:
    with pytest.raises(Conflict) as error:
        check_unchanged(checked)
    return error.value.message


def test_files_as_they_were_verified_pass(files):
    check_unchanged(artifact(*files))


def test_a_file_that_has_gone_is_named_with_what_to_do(files):
    checked = artifact(*files)
    files[1].unlink()
    message = conflict(checked)
    assert str(files[1]) in message and str(files[0]) not in message
    assert "No such file" in message and "download or import the model again" in message


def test_a_file_of_another_size_is_named_with_both_sizes(files):
    checked = artifact(*files)
    files[0].write_bytes(b"longer weights")
    message = conflict(checked)
    assert str(files[0]) in message and "changed" in message
    assert "14 bytes now, 7 then" in message and "download or import the model again" in message


def test_a_file_that_was_written_to_is_refused_even_at_the_same_size(files):
    checked = artifact(*files)
    facts = files[0].stat()
    os.utime(files[0], ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert str(files[0]) in conflict(checked)


def test_a_folder_that_took_a_file_s_place_is_refused(files):
    checked = artifact(files[0])
    files[0].unlink()
    files[0].mkdir()
    assert str(files[0]) in conflict(checked)
    shutil.rmtree(files[0])


def test_a_sweep_removes_what_a_kill_left_and_nothing_else(store, tmp_path):
    whole, half, orphan = new_id(), new_id(), add_blob(store, "c" * 64, b"orphan")
    shared = add_blob(store, "a" * 64, b"shared")
    kept = link(store, whole, "m.gguf", shared)
    # linked, but the daemon was killed before it was recorded
    unrecorded = add_blob(store, "b" * 64, b"unrecorded")
    link(store, half, "m.gguf", unrecorded)
    link(store, half, "shared.gguf", shared)
    deep = add_blob(store, "d" * 64, b"in a folder")
    link(store, half, "sub/config.json", deep)
    own = tmp_path / "the user's own file"
    os.link(unrecorded, own)
    store.sweep({whole})
    assert kept.read_bytes() == b"shared" and own.read_bytes() == b"unrecorded"
    assert sorted(path.name for path in store.blobs.iterdir()) == ["a" * 64]
    assert not store.model_dir(half).exists() and not orphan.exists()


def test_an_unfinished_file_that_somebody_works_on_stays(tmp_path):
    store = Store(tmp_path)
    folder = store.partials / ("a" * 64)
    with locked(folder, lambda: None):
        (folder / "data").write_bytes(b"x")
        store.drop_partial(folder.name)
        assert (folder / "data").read_bytes() == b"x"
    store.drop_partial(folder.name)
    assert not folder.exists() and list((tmp_path / "scratch").iterdir()) == []
    store.drop_partial(folder.name)


def test_who_waits_for_an_unfinished_file_that_is_removed_begins_anew(tmp_path):
    store = Store(tmp_path)
    folder = store.partials / ("b" * 64)
    found: list[bool] = []
    told = threading.Event()

    def work() -> None:
        with locked(folder, told.set):
            found.append((folder / "data").exists())
            (folder / "data").write_bytes(b"new")

    waiting = threading.Thread(target=work)
    with locked(folder, lambda: None):
        (folder / "data").write_bytes(b"old")
        waiting.start()
        assert told.wait(10)
        remove_at_once(folder, tmp_path / "scratch")
    waiting.join(10)
    assert found == [False] and (folder / "data").read_bytes() == b"new"


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_disk_that_can_take_no_more_files_can_be_cleaned(tmp_path, has_lock):
    with small_disk(tmp_path / "disk", 1024**2, files=24) as disk:
        store = Store(disk)
        folder = store.partials / ("c" * 64)
        folder.mkdir()
        for name in ("data", "journal", *(["lock"] if has_lock else [])):
            (folder / name).touch()
        with contextlib.suppress(OSError):
            for number in range(64):
                (disk / f"hog{number}").touch()
        with pytest.raises(OSError, match="No space left"):
            (disk / "another").touch()
        assert store.drop_partial(folder.name)
        assert not folder.exists() and list((disk / "scratch").iterdir()) == []
        (disk / "another").touch()


def test_what_is_removed_goes_also_where_there_is_no_folder_aside(tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "data").touch()
    remove_at_once(tmp_path / "partial", tmp_path / "none")
    assert not (tmp_path / "partial").exists()
