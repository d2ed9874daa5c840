"""The real npm SDK of Pieces, and the `ws` package, against a running daemon.

`node/drive.mjs` does the talking, once; the tests look at what it saw.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gguf_files import MINIMAL, Tensor, write_gguf
from hub import LocalHub
from running import ALIASES, BUILT_IN, RunningDaemon

NODE = Path(__file__).parent / "node"
REPOS = {"owner/repo": "Tiny.Q4_K_M.gguf", "other/repo": "Other.Q4_K_M.gguf"}  # as in drive.mjs
SIZE_BYTES = 2 * 1024 * 1024
RATE_BYTES_S = 256 * 1024
TERMINAL = {"COMPLETED", "FAILED", "CANCELED"}

Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What the SDK saw of a daemon that downloads from a local hub."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (NODE / "node_modules" / "@pieces.app").is_dir():
        pytest.skip("run make node-modules")
    home = tmp_path_factory.mktemp("node")
    with LocalHub() as hub:
        for repo, file in REPOS.items():
            facts = MINIMAL | {"general.name": file}
            path = write_gguf(home / file, facts, [Tensor(dimensions=(32, SIZE_BYTES // 128))])
            hub.add(repo, {file: path.read_bytes()})
        hub.faults.rate_bytes_s = RATE_BYTES_S
        daemon = RunningDaemon(home, HF_ENDPOINT=hub.url)
        try:
            daemon.start()
            driven = subprocess.run(
                [node, NODE / "drive.mjs", daemon.url],
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
        finally:
            daemon.stop()
    assert driven.returncode == 0, driven.stderr
    return json.loads(driven.stdout)


def test_the_sdk_reads_every_answer_as_it_was_sent(seen: Seen) -> None:
    assert seen["misread"] == []


def test_the_daemon_is_found(seen: Seen) -> None:
    assert seen["health"].startswith("ok:")
    assert seen["streamHealth"] == "ok"
    assert seen["version"].startswith("12.")
    assert Path(seen["installationPath"]).is_dir()


def test_errors_are_plain_text(seen: Seen) -> None:
    snapshot = seen["unknown"].pop("snapshot")
    assert (snapshot["status"], snapshot["text"]) == (410, "model was not found.")
    for answer in (snapshot, *seen["unknown"].values(), *seen["refused"].values()):
        assert answer["type"].startswith("text/plain"), answer
        assert answer["text"]
    for answer in (*seen["unknown"].values(), *seen["refused"].values()):
        assert answer["status"] == 500, answer
    refused = {what: answer["text"] for what, answer in seen["refused"].items()}
    assert "built-in" in refused["updateBuiltin"]
    assert "built-in" in refused["deleteBuiltin"]
    assert "download" in refused["loadBeforeDownload"]
    assert "source" in refused["downloadWithoutSource"]


def test_models_are_created_once_and_updated(seen: Seen) -> None:
    created = seen["created"]
    assert created["custom"] is True
    assert created["unique"] == "tiny.q4_k_m"
    assert created["downloaded"] is False
    assert seen["createdAgain"] == created["id"]
    assert seen["updated"] == created | {"description": "Changed."}
    assert sorted(seen["listed"]) == sorted(["tiny.q4_k_m", *BUILT_IN, *ALIASES])


def test_a_download_is_told_from_its_start_to_its_end(seen: Seen) -> None:
    assert (seen["started"]["downloading"], seen["started"]["downloaded"]) == (True, False)
    assert seen["plainProgress"]["status"] == "IN-PROGRESS"
    assert 0 < seen["plainProgress"]["percentage"] < 100
    check_course(seen["frames"], "COMPLETED")
    assert seen["frames"][-1]["percentage"] == 100
    done = seen["downloaded"]
    assert (done["downloading"], done["downloaded"]) == (False, True)
    assert done["bytes"]["value"] >= SIZE_BYTES


def test_a_download_is_cancelled(seen: Seen) -> None:
    canceled = seen["canceled"]
    assert (canceled["downloading"], canceled["downloaded"]) == (False, False)
    check_course(seen["canceledFrames"], "CANCELED")


def check_course(frames: list[dict[str, Any]], end: str) -> None:
    statuses = [frame["status"] for frame in frames]
    assert statuses[0] == "INITIALIZED"
    assert set(statuses[1:-1]) == {"IN-PROGRESS"}
    assert [status for status in statuses if status in TERMINAL] == [end]
    assert statuses[-1] == end
    percentages = [frame["percentage"] for frame in frames]
    assert percentages == sorted(percentages)
    assert max(percentages[:-1]) < 100


def test_the_sample_model_is_loaded_and_unloaded(seen: Seen) -> None:
    loaded = seen["loaded"]
    assert loaded["loaded"] is True
    assert loaded["ram"]["value"] > loaded["bytes"]["value"]
    assert seen["unloaded"]["loaded"] is False
    assert seen["unloadedWithAll"]["loaded"] is False
    assert seen["unloadedWithAll"]["downloaded"] is True


def test_models_and_their_files_are_deleted(seen: Seen) -> None:
    assert seen["deletedCache"]["model"]["id"] == seen["loaded"]["id"]
    assert seen["afterDeletedCache"]["downloaded"] is False
    assert seen["afterDelete"]["status"] == 410
    assert seen["identifiers"] == len(BUILT_IN) + 1  # and the one that was cancelled


def test_the_lock_file_names_no_registry() -> None:
    """`npm ci` then takes each package from the registry that the machine is set to."""
    lock = json.loads((NODE / "package-lock.json").read_text())
    for name, package in lock["packages"].items():
        assert "resolved" not in package, name
        assert name == "" or package["integrity"].startswith("sha512-")
