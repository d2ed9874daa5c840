"""What is kept of conversations: by which key, for how long, how much, and that a mess is survived."""

from __future__ import annotations

import stat

import pytest

from backends.contract import (
    Artifact,
    LoadOptions,
    MemoryEstimate,
    ModelFile,
    Placement,
    SavedConversation,
)
from daemon.config import Resume
from daemon.models.conversations import Conversations, state_key


def artifact(sha256="a" * 64, role="weights", **metadata):
    file = ModelFile(path="/m", size_bytes=1, mtime_ns=0, sha256=sha256, role=role)
    return Artifact(
        format="gguf",
        files=(file,),
        architecture="llama",
        parameters=1,
        quantization="Q4",
        context_length=8192,
        weights_bytes=1,
        metadata=metadata,
    )


def estimate(context_length=4096, slots=4, **more):
    return MemoryEstimate(context_length=context_length, slots=slots, parts={}, **more)


def key(model=None, backend="one", version="1", settings=None, **options):
    return state_key(
        model or artifact(), backend, version, settings or estimate(), LoadOptions(**options)
    )


def test_the_same_load_has_the_same_key():
    assert key() == key()
    assert key() == key(settings=estimate(slots=1)) == key(threads=2)


def test_a_longer_context_goes_on_from_a_shorter_one():
    assert key() == key(settings=estimate(8192))


@pytest.mark.parametrize("scaling", ["longrope", "yarn", "dynamic"])
def test_but_not_where_positions_depend_on_the_context(scaling):
    model = artifact(**{"llama.rope.scaling.type": scaling})
    assert key(model) != key(model, settings=estimate(8192))


def test_headers_of_models_with_two_sets_of_factors_need_not_name_the_scaling():
    """As those of Phi-3 and Phi-4-mini."""
    model = artifact(
        **{
            "llama.rope.scaling.original_context_length": 4096,
            "llama.rope.scaling.attn_factor": 1.19,
        }
    )
    assert key(model) == key(model, settings=estimate(2048))
    assert key(model) != key(model, settings=estimate(8192))
    assert key(model, settings=estimate(8192)) == key(model, settings=estimate(16_384))


@pytest.mark.parametrize(
    "other",
    [
        {"model": artifact("b" * 64)},
        {"model": artifact(role="adapter")},
        {"backend": "two"},
        {"version": "2"},
        {"engine": {"cache_type_k": "q8_0"}},
        {"settings": estimate(placement=Placement(gpu_layers=3, layers=(("gpu", 3),)))},
    ],
)
def test_whatever_the_state_depends_on_is_in_the_key(other):
    assert key(**other) != key()


# what is on disk


@pytest.fixture
def opened(tmp_path):
    def make(resume=Resume.SESSION, limit_bytes=1000):
        found = Conversations(tmp_path / "kept", resume=resume, limit_bytes=limit_bytes)
        return found, found.open(artifact(), "one", "1", estimate(), LoadOptions())

    return make


def written(folder, name, size_bytes=100):
    """A file as a worker writes it."""
    (folder / name).write_bytes(b"x" * size_bytes)
    return SavedConversation(name=name, size_bytes=size_bytes, sha256="0" * 64, tokens=7)


def save(kept, *files, old=()):
    """Have conversations kept, as at an unload: `files` are names, or names and sizes."""
    with kept.saving() as folder:
        assert kept.room() > 0
        pairs = [(file, 100) if isinstance(file, str) else file for file in files]
        kept.replace(old, [written(folder, name, size) for name, size in pairs], folder)


def names(kept):
    return [file.name for file in kept.files()]


def test_what_was_saved_is_there_for_the_next_load(opened):
    _, kept = opened()
    assert kept.files() == ()
    save(kept, "a.kv", "b.kv")
    assert set(names(kept)) == {"a.kv", "b.kv"}
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700


def test_what_follows_takes_the_place_of_what_was_restored(opened):
    _, kept = opened()
    save(kept, "a.kv", "b.kv")
    save(kept, "c.kv", old=("a.kv",))
    # the one that was not restored, for want of slots, is still there
    assert set(names(kept)) == {"b.kv", "c.kv"}
    assert not (kept.folder / "a.kv").exists()


def test_what_was_used_the_longest_ago_goes_when_there_is_too_much(opened, tmp_path):
    everything, kept = opened(limit_bytes=250)
    other = everything.open(artifact("b" * 64), "one", "1", estimate(), LoadOptions())
    save(kept, "a.kv")
    save(other, "b.kv")
    kept.used(["a.kv"])
    save(other, "c.kv")
    assert names(kept) == ["a.kv"] and names(other) == ["c.kv"]
    assert everything.size_bytes() == 200


def test_one_that_alone_is_too_much_is_not_kept(opened):
    everything, kept = opened(limit_bytes=50)
    save(kept, "a.kv")
    assert kept.files() == () and everything.size_bytes() == 0


def test_a_broken_index_is_as_good_as_none(opened):
    _, kept = opened()
    save(kept, "a.kv")
    (kept.folder / "index.json").write_text("{")
    assert kept.files() == ()
    save(kept, "b.kv")
    assert names(kept) == ["b.kv"]


def test_what_no_index_knows_is_swept_at_the_next_start(opened):
    _, kept = opened(Resume.KEEP)
    save(kept, "a.kv")
    written(kept.folder, "torn.kv.part")
    (kept.folder / "saving-torn").mkdir()
    _, again = opened(Resume.KEEP)
    assert sorted(path.name for path in again.folder.iterdir()) == ["a.kv", "index.json"]


def test_what_another_worker_writes_meanwhile_is_left_alone(opened):
    everything, kept = opened(limit_bytes=250)
    other = everything.open(artifact("b" * 64), "one", "1", estimate(), LoadOptions())
    save(other, "b.kv")
    written(other.folder, "fresh.kv")
    save(kept, ("a.kv", 200))  # too much: `b` goes
    assert [path.name for path in other.folder.glob("*.kv")] == ["fresh.kv"]


def test_by_default_nothing_outlives_the_daemon(opened, tmp_path):
    everything, kept = opened()
    save(kept, "a.kv")
    everything.close()
    assert not list((tmp_path / "kept").rglob("*"))
    _, kept = opened()
    save(kept, "a.kv")
    _, again = opened()  # after a kill
    assert again.files() == ()


def test_what_is_to_outlive_it_does(opened):
    everything, kept = opened(Resume.KEEP)
    save(kept, "a.kv")
    everything.close()
    _, again = opened(Resume.KEEP)
    assert names(again) == ["a.kv"]
    # until the settings say otherwise
    _, again = opened(Resume.SESSION)
    assert again.files() == ()


def test_off_keeps_nothing(opened):
    _, kept = opened(Resume.OFF)
    assert kept is None


def test_a_full_disk_costs_nothing_but_the_order(opened, monkeypatch):
    _, kept = opened()
    save(kept, "a.kv")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("daemon.models.conversations.os.replace", full)
    kept.used(["a.kv"])
    assert names(kept) == ["a.kv"]


def test_nothing_is_left_of_a_save_that_failed(opened):
    _, kept = opened()
    save(kept, "a.kv")
    with pytest.raises(OSError), kept.saving() as folder:
        written(folder, "b.kv")
        raise OSError("the worker took too long")
    assert sorted(path.name for path in kept.folder.iterdir()) == ["a.kv", "index.json"]


def test_the_order_is_that_of_the_worker_and_of_use(opened):
    _, kept = opened()
    save(kept, "a.kv", "b.kv", "c.kv")
    assert names(kept) == ["a.kv", "b.kv", "c.kv"]
    kept.used(["c.kv"])
    assert names(kept) == ["c.kv", "a.kv", "b.kv"]


def test_what_belongs_to_files_goes_with_them(opened):
    everything, kept = opened()
    save(kept, "a.kv")
    everything.forget(artifact("b" * 64))
    assert names(kept) == ["a.kv"]
    everything.forget(artifact())
    assert kept.files() == () and not kept.folder.exists()
