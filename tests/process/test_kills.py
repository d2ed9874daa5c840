"""Downloads that are killed at any moment, again and again: nothing is lost but a little."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import pytest
from fetch_driver import Fetcher, Places, fetch
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub
from running import RunningDaemon

MIB = 1024**2
LOST_BYTES = 8 * MIB
REPO, NAME = "owner/large", "large.gguf"


def model(folder: Path, mib: int) -> Path:
    path = write_gguf(folder / NAME, tensors=[Tensor(dimensions=(256, mib * 1024))])
    with path.open("r+b") as file:
        file.seek(-mib * MIB, 2)
        noise = random.Random(mib)
        for _ in range(mib):
            file.write(noise.randbytes(MIB))
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["hub", "url"])
def test_a_fetcher_that_is_killed_loses_little_and_completes(tmp_path, kind):
    """Each kill comes at a random moment; 10 of them in one download."""
    path = model(tmp_path, 200)
    draw = random.Random(kind)
    with LocalHub() as hub:
        hub.add(REPO, {NAME: path})
        hub.faults = Faults(rate_bytes_s=40 * MIB)
        source = f"hf:{REPO}" if kind == "hub" else hub.file_url(REPO, NAME)
        places = Places(root=tmp_path / "store")
        kills = 0
        for _ in range(10):
            with Fetcher(places) as child:
                child.order(source, endpoint=hub.url)
                time.sleep(draw.uniform(0.3, 0.9))
                if child.process.poll() is None:
                    child.process.kill()
                    kills += 1
                child.process.wait(10)
        outcome = fetch(places, source, endpoint=hub.url)
        (file,) = outcome.fetched.artifact.files
        assert sha256(Path(file.path)) == file.sha256 == sha256(path)
        again = hub.sent_bytes - path.stat().st_size
        print(f"{kind}: {kills} kills, {again / MIB:.1f} MiB fetched again")
        assert kills >= 5
        assert again <= kills * LOST_BYTES


@pytest.mark.timeout(300)
def test_a_daemon_that_is_killed_goes_on_by_itself(tmp_path):
    """The daemon, or it and its fetcher, killed at random moments: it is only started again."""
    path = model(tmp_path, 200)
    draw = random.Random("daemon")
    with LocalHub() as hub:
        hub.add(REPO, {NAME: path})
        hub.faults = Faults(rate_bytes_s=40 * MIB)
        daemon = RunningDaemon(tmp_path, HF_ENDPOINT=hub.url)
        daemon.start()
        try:
            body = {"source": f"hf:{REPO}", "unique": "large"}
            daemon.json("POST", "/modeld/v1/models", body)
            daemon.json("POST", "/modeld/v1/models/large/download")
            kills = 0
            for round_ in range(10):
                time.sleep(draw.uniform(0.3, 0.9))
                if daemon.model("large")["downloaded"]:
                    break
                children = daemon.children()
                if round_ % 2:
                    daemon.kill()
                else:
                    for child in children:  # the fetcher first
                        child.kill()
                    daemon.kill()
                kills += 1
                daemon.start()
            deadline = time.monotonic() + 60
            while not daemon.model("large")["downloaded"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            (file,) = daemon.model("large")["files"]
            assert sha256(Path(file)) == sha256(path)
            again = hub.sent_bytes - path.stat().st_size
            print(f"{kills} kills, {again / MIB:.1f} MiB fetched again")
            assert kills >= 5 and again <= kills * LOST_BYTES
        finally:
            daemon.stop()
        assert list((daemon.data_dir / "store" / "partial").iterdir()) == []
