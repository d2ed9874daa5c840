"""Every fault of a server, a network or a disk: the model is whole and verified, or not there.

A real fetcher and the real client of the hub, against a local hub that misbehaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from disks import small_disk
from fetch_driver import Fetcher, Outcome, Places, fetch
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub

from backends import wire
from daemon.downloads.messages import Fetched, Progress

REPO, NAME = "owner/tiny", "tiny-Q4_K_M.gguf"
SOURCE = f"hf:{REPO}"
MIB = 1024**2
QUICK = ("--stall-timeout-s=0.5", "--patience-s=3", "--first-patience-s=2")


def model(folder: Path, mib: int, seed: int = 0) -> bytes:
    """A valid GGUF of so much noise."""
    path = write_gguf(folder / f"{mib}-{seed}.gguf", tensors=[Tensor(dimensions=(256, mib * 1024))])
    noise = random.Random(seed).randbytes(mib * MIB)
    return path.read_bytes()[: -len(noise)] + noise


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(root=tmp_path / "store")


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return model(tmp_path, 12)


@pytest.fixture
def local_hub(content: bytes) -> Iterator[LocalHub]:
    with LocalHub() as running:
        running.add(REPO, {NAME: content})
        yield running


def download(
    places: Places, hub: LocalHub, kind: str = "hub", *arguments: str, **options
) -> Outcome:
    source = SOURCE if kind == "hub" else hub.file_url(REPO, NAME)
    return fetch(places, source, endpoint=hub.url, arguments=(*QUICK, *arguments), **options)


def assert_whole(outcome: Outcome, places: Places, content: bytes) -> None:
    (file,) = outcome.fetched.artifact.files
    assert Path(file.path).read_bytes() == content
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    left = [path.name for path in places.partials_dir.iterdir()]
    assert left == list(outcome.fetched.partials), "the daemon removes them"
    assert_never_back(outcome.progress, len(content))


def assert_never_back(progress: list[Progress], size: int) -> None:
    done = [frame.done_bytes for frame in progress]
    assert done == sorted(done) and done[-1] <= size
    of_file = [file.done_bytes for frame in progress for file in frame.files]
    assert of_file == sorted(of_file)


def assert_refused(outcome: Outcome, places: Places, code: str, *words: str) -> None:
    assert outcome.error.code == code
    assert all(word in outcome.error.message for word in words), outcome.error.message
    assert places.stored() == [], "nothing of it is in the store"
    assert outcome.status == 0 and "Traceback" not in outcome.stderr


# what passes


@pytest.mark.parametrize("kind", ["hub", "url"])
@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (Faults(truncate_at=5 * MIB, times=1), "was lost after"),
        (Faults(stall_at=5 * MIB, times=1), "sent nothing for 0.5 s"),
        (Faults(status=429, retry_after="1", times=1), "HTTP 429"),
        (Faults(status=503, retry_after="1", times=2), "HTTP 503"),
        (Faults(status=500, times=2), "HTTP 500"),
        (Faults(status=522, times=2), "HTTP 522"),
    ],
    ids=["reset", "stall", "429", "503", "500", "522"],
)
def test_what_passes_costs_no_byte_that_is_here(places, local_hub, content, faults, said, kind):
    local_hub.faults = replace(faults)

    outcome = download(places, local_hub, kind)

    assert_whole(outcome, places, content)
    assert local_hub.sent_bytes - len(content) <= MIB, "what was here is not fetched again"
    if faults.status:
        waits = [frame.waiting for frame in outcome.progress if frame.waiting]
        assert any(said in wait and "trying again in" in wait for wait in waits), waits
        assert outcome.progress[-1].waiting == ""


def test_a_server_that_says_when_is_asked_then(places, local_hub, content):
    local_hub.faults = Faults(status=503, retry_after="2", times=1)

    outcome = download(places, local_hub)

    assert_whole(outcome, places, content)
    assert outcome.times[-1] - outcome.times[0] >= 1.9


@pytest.mark.parametrize(
    ("faults", "least_s"),
    [
        (Faults(listing_status=503, listing_times=2), 0.1),
        (Faults(listing_status=429, retry_after="2", listing_times=1), 1.9),
        (Faults(listing_status=429, rate_limit='"api";r=0;t=2', listing_times=1), 1.9),
        (Faults(status=429, rate_limit='"resolvers";r=0;t=2', times=1), 1.9),
    ],
    ids=["503", "429", "listing's quota", "files' quota"],
)
def test_a_hub_that_can_t_answer_now_is_asked_again(places, local_hub, content, faults, least_s):
    local_hub.faults = replace(faults)

    # long enough for a busy machine to start asking
    outcome = download(places, local_hub, "hub", "--first-patience-s=20")

    assert_whole(outcome, places, content)
    assert outcome.times[-1] - outcome.times[0] >= least_s
    waits = [frame.waiting for frame in outcome.progress if frame.waiting]
    assert any("trying again in" in wait for wait in waits), waits
    assert outcome.progress[-1].waiting == ""


def test_a_hub_that_never_answers_is_named(places, local_hub):
    local_hub.faults = Faults(listing_status=503)
    outcome = download(places, local_hub, "hub", "--first-patience-s=8")
    assert_refused(outcome, places, "download_failed", "HTTP 503", REPO)
    assert len(local_hub.requests) >= 3


def test_what_had_begun_waits_longer_for_a_network_that_is_not_up_yet(places, content):
    """As after the machine was started: the daemon is up before the network is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hub = LocalHub(port=port)
    hub.add(REPO, {NAME: content})
    patient = ("--first-patience-s=1", "--patience-s=20")
    with Fetcher(places, arguments=patient) as child:
        child.order(SOURCE, endpoint=hub.url, began=True)
        time.sleep(3)
        with hub:
            assert_whole(child.outcome(), places, content)


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_a_network_that_asks_for_a_login_costs_no_byte(places, local_hub, content, kind):
    local_hub.faults = Faults(stall_at=6 * MIB)
    assert_refused(download(places, local_hub, kind), places, "download_failed", "sent nothing")
    local_hub.faults = Faults(page=True)
    outcome = download(places, local_hub, kind)
    assert_refused(outcome, places, "download_failed", "sends a web page", "login")
    local_hub.faults, before = Faults(), local_hub.sent_bytes

    outcome = download(places, local_hub, kind)

    assert_whole(outcome, places, content)
    assert local_hub.sent_bytes - before <= len(content) - 5 * MIB


@pytest.mark.parametrize("lie", [Faults(listed_bytes=9_999), Faults(status=404), Faults(gated=403)])
def test_what_is_here_outlives_answers_that_are_wrong(places, local_hub, content, lie):
    local_hub.faults = Faults(stall_at=6 * MIB)
    assert_refused(download(places, local_hub), places, "download_failed", "sent nothing")
    local_hub.faults = replace(lie)
    assert_refused(download(places, local_hub), places, "download_failed")
    local_hub.faults, before = Faults(), local_hub.sent_bytes

    outcome = download(places, local_hub)

    assert_whole(outcome, places, content)
    assert local_hub.sent_bytes - before <= len(content) - 5 * MIB


def test_what_never_began_leaves_nothing_to_clean_up(places, local_hub):
    local_hub.faults = Faults(status=404)
    assert_refused(download(places, local_hub), places, "download_failed", "HTTP 404")
    assert list(places.partials_dir.iterdir()) == []


def test_an_address_of_an_empty_file_leaves_nothing_to_clean_up(places, local_hub):
    local_hub.add("owner/empty", {"empty.gguf": b""})
    outcome = fetch(places, f"{local_hub.url}/files/owner/empty/empty.gguf", endpoint=local_hub.url)
    assert outcome.error.code in ("download_failed", "invalid_model_file")
    assert places.stored() == [] and list(places.partials_dir.iterdir()) == []


def test_wrong_bytes_once_are_fetched_again_and_it_is_said(places, local_hub, content):
    local_hub.faults = Faults(corrupt_at=MIB, times=1)

    outcome = download(places, local_hub)

    assert_whole(outcome, places, content)
    assert "SHA-256 of what arrived is" in outcome.progress[-1].note


@pytest.mark.parametrize("kind", ["hub", "url"])
@pytest.mark.parametrize(
    "faults",
    [Faults(no_range=True), Faults(no_size=True), Faults(no_range=True, no_size=True)],
    ids=["no ranges", "no size", "neither"],
)
def test_a_server_without_ranges_sends_one_stream(places, local_hub, content, faults, kind):
    local_hub.faults = faults
    outcome = download(places, local_hub, kind)
    assert_whole(outcome, places, content)
    assert local_hub.sent_bytes - len(content) <= MIB


def test_a_server_that_stops_giving_ranges_is_asked_for_all(places, local_hub, content):
    local_hub.faults = Faults(rate_bytes_s=4 * MIB)
    with Fetcher(places, arguments=QUICK) as child:
        child.order(SOURCE, endpoint=local_hub.url)
        until_bytes(child, 2 * MIB)
        child.process.kill()
        child.process.wait(5)
    local_hub.faults = Faults(no_range=True)

    outcome = download(places, local_hub)

    assert_whole(outcome, places, content)
    assert "gives no parts of files" in outcome.progress[-1].note


def until_bytes(child: Fetcher, wanted: int) -> None:
    for line in child._lines:
        message = child._decoder.decode(line)
        assert not isinstance(message, wire.Error | Fetched), message
        if isinstance(message, Progress) and message.done_bytes >= wanted:
            return
    raise AssertionError("the fetcher ended")


def test_a_file_that_changes_midway_starts_clean_and_says_so(places, local_hub, content, tmp_path):
    newer = model(tmp_path, 12, seed=1)
    local_hub.faults = Faults(rate_bytes_s=4 * MIB)
    with Fetcher(places, arguments=QUICK) as child:
        child.order(local_hub.file_url(REPO, NAME), endpoint=local_hub.url)
        until_bytes(child, 2 * MIB)
        local_hub.add(REPO, {NAME: newer})
        local_hub.faults = Faults()
        outcome = child.outcome()

    (file,) = outcome.fetched.artifact.files
    assert Path(file.path).read_bytes() == newer
    assert "was changed on 127.0.0.1" in outcome.progress[-1].note
    assert "fetched anew" in outcome.progress[-1].note


def test_a_file_that_changed_between_two_attempts_starts_clean(
    places, local_hub, content, tmp_path
):
    local_hub.faults = Faults(stall_at=4 * MIB)
    assert download(places, local_hub, "url").error.code == "download_failed"
    newer = model(tmp_path, 12, seed=1)
    local_hub.add(REPO, {NAME: newer})
    local_hub.faults = Faults()

    outcome = download(places, local_hub, "url")

    (file,) = outcome.fetched.artifact.files
    assert Path(file.path).read_bytes() == newer
    assert "was changed" in outcome.progress[-1].note


def test_a_slow_trickle_is_no_stall(places, local_hub, tmp_path):
    content = model(tmp_path, 1)
    local_hub.add(REPO, {NAME: content})
    local_hub.faults = Faults(rate_bytes_s=200_000)

    assert_whole(download(places, local_hub), places, content)


# what does not


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (Faults(truncate_at=100_000), [NAME, "was lost after"]),
        (Faults(stall_at=70_000), [NAME, "sent nothing for 0.5 s"]),
        (Faults(corrupt_at=200_000), [NAME, "SHA-256 of what arrived is", "should be", "again"]),
        (Faults(served_bytes=9_999), [NAME, "is 9,999 bytes", "should be 12,"]),
        (Faults(listed_bytes=9_999), [NAME, "is 12,", "should be 9,999"]),
        (Faults(redirect="loop"), [NAME, "redirects in a circle"]),
        (Faults(redirect="endless"), [NAME, "redirects more than 10 times"]),
        (Faults(wrong_range=True), [NAME, "was asked for bytes=0-", "bytes 1-"]),
        (Faults(encoding="gzip"), [NAME, "encoded (gzip)"]),
        (Faults(status=503), [NAME, "HTTP 503 Service Unavailable"]),
        (Faults(status=416), [NAME, "HTTP 416", "shorter than expected"]),
        (Faults(status=404), [NAME, "HTTP 404"]),
        (Faults(gated=403), ["accept its licence at", "HF_TOKEN"]),
    ],
    ids=(
        "cut-off stalled corrupt served-size listed-size circle endless other-part encoded "
        "unavailable 416 missing gated"
    ).split(),
)
def test_a_transfer_that_goes_wrong_says_how(places, local_hub, faults, words):
    local_hub.faults = faults
    assert_refused(download(places, local_hub), places, "download_failed", *words)


def test_what_is_wrong_twice_is_not_kept(places, local_hub):
    local_hub.faults.corrupt_at = 5000
    assert_refused(download(places, local_hub), places, "download_failed")
    assert list(places.partials_dir.iterdir()) == []


def test_one_flipped_bit_of_a_file_outside_lfs_is_seen(places, local_hub, content):
    """The hub tells no SHA-256 of small files, but Git's own hash of them."""
    local_hub.add(REPO, {"model.bin": content[:5000], "config.json": b'{"model_type": "gpt2"}'})
    local_hub.faults = Faults(corrupt_at=8)
    outcome = fetch(places, f"hf:{REPO}/model.bin", endpoint=local_hub.url, arguments=QUICK)
    assert_refused(outcome, places, "download_failed", "config.json", "Git id")


def test_a_hash_that_the_user_gave_decides(places, local_hub, content):
    url = local_hub.file_url(REPO, NAME)
    right = hashlib.sha256(content).hexdigest()
    outcome = fetch(places, f"{url}#sha256={'0' * 64}", arguments=QUICK)
    assert_refused(outcome, places, "download_failed", "0" * 64, right)
    assert fetch(places, f"{url}#sha256={right}", arguments=QUICK).fetched


def test_a_host_that_is_not_known_is_asked_for_again_and_named(places):
    outcome = fetch(places, "http://host.invalid/x.gguf", arguments=QUICK)
    assert_refused(outcome, places, "download_failed", "host.invalid is not known", "online?")
    assert any("trying again in" in frame.waiting for frame in outcome.progress)


def test_what_is_here_outlives_a_failure(places, local_hub, content):
    local_hub.faults = Faults(stall_at=6 * MIB)
    assert_refused(download(places, local_hub), places, "download_failed", "sent nothing")
    local_hub.faults = Faults()
    before = local_hub.sent_bytes

    outcome = download(places, local_hub)

    assert_whole(outcome, places, content)
    assert next(f.done_bytes for f in outcome.progress if f.done_bytes) >= 4 * MIB
    assert local_hub.sent_bytes - before <= len(content) - 5 * MIB


def test_credentials_do_not_go_to_another_host(places, local_hub, content):
    local_hub.faults = Faults(redirect="host", gated=401)
    local_hub.token = "hf_never-to-be-seen"
    outcome = download(places, local_hub, environment={"HF_TOKEN": local_hub.token})
    assert_whole(outcome, places, content)
    assert {r.authorization for r in local_hub.requests if r.host == "localhost"} == {""}


# the disk


def test_a_disk_that_fills_up_loses_nothing(tmp_path, local_hub, content):
    with small_disk(tmp_path / "disk", 100 * MIB) as disk:
        places = Places(root=disk / "store")
        local_hub.faults = Faults(rate_bytes_s=4 * MIB)
        with Fetcher(places, arguments=QUICK) as child:
            child.order(SOURCE, endpoint=local_hub.url)
            until_bytes(child, 2 * MIB)
            hog = disk / "hog"
            with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(MIB // 4))
            outcome = child.outcome()
        assert_refused(outcome, places, "insufficient_disk", "is full", "goes on")
        hog.unlink()
        local_hub.faults = Faults()
        before = local_hub.sent_bytes

        outcome = download(places, local_hub)

        assert_whole(outcome, places, content)
        assert local_hub.sent_bytes - before <= len(content) - MIB


def test_a_disk_without_room_is_told_before_the_first_byte(tmp_path, local_hub):
    with small_disk(tmp_path / "disk", 70 * MIB) as disk:
        outcome = download(Places(root=disk / "store"), local_hub)
        assert outcome.error.code == "insufficient_disk"
        assert "bytes free" in outcome.error.message and "free " in outcome.error.message
        assert local_hub.sent_bytes == 0
