"""The real Python SDK of Pieces drives every model endpoint of a running daemon.

The SDK's models are the oracle: it must read every answer, and find nothing in it that it does not
know. It knows no `source`, so a model is created by a `unique` name that is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from gguf_files import MINIMAL, Tensor, write_gguf
from hub import LocalHub
from pieces_os_client.api.model_api import ModelApi
from pieces_os_client.api.models_api import ModelsApi
from pieces_os_client.api.well_known_api import WellKnownApi
from pieces_os_client.api_client import ApiClient
from pieces_os_client.configuration import Configuration
from pieces_os_client.exceptions import ApiException, ServiceException
from pieces_os_client.models.byte_descriptor import ByteDescriptor
from pieces_os_client.models.grouped_timestamp import GroupedTimestamp
from pieces_os_client.models.model import Model
from pieces_os_client.models.model_delete_cache_input import ModelDeleteCacheInput
from pieces_os_client.models.model_download_progress import ModelDownloadProgress
from pieces_os_client.models.model_max_tokens import ModelMaxTokens
from pieces_os_client.models.seeded_model import SeededModel
from pieces_os_client.models.seeded_score_increment import SeededScoreIncrement
from pieces_sdk import check_understood
from running import ALIASES, BUILT_IN, SAMPLE, RunningDaemon

REPO, FILE = "owner/repo", "Tiny.Q4_K_M.gguf"
OTHER_REPO = "other/repo"
SOURCE = f"hf:{REPO}/{FILE}"
SIZE_BYTES = 2 * 1024 * 1024
SLOW_BYTES_S = 512 * 1024
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
WAIT_S = 60.0

ANSWERS_WITH_A_MODEL = (
    "model_specific_model_download",
    "model_specific_model_download_cancel",
    "model_specific_model_load",
    "model_specific_model_unload",
)


@dataclass(frozen=True, slots=True)
class Sdk:
    """The SDK at one daemon: `sdk("name_of_its_method", …)` returns what it read, after checks."""

    apis: tuple[ModelApi, ModelsApi, WellKnownApi]

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        (api,) = (api for api in self.apis if hasattr(api, method))
        response = getattr(api, f"{method}_with_http_info")(*args, **kwargs)
        assert response.status_code in (200, 204)
        check_understood(response)
        return response.data

    def fails(self, method: str, *args: Any, **kwargs: Any) -> str:
        """Return the text of the failure, which must be a 500 in plain text."""
        with pytest.raises(ServiceException) as failed:
            self(method, *args, **kwargs)
        error = failed.value
        assert error.status == 500
        assert error.headers is not None
        assert error.headers["Content-Type"].startswith("text/plain")
        assert error.data == error.body
        assert error.body
        assert error.body.strip()
        return error.body

    def snapshot(self, model: str) -> Model:
        return self("models_specific_model_snapshot", model)

    def all(self) -> list[Model]:
        return self("models_snapshot").iterable

    def downloaded(self, model_id: str) -> Model:
        """Poll as the C# client does, which loops for ever if it sees neither of two things."""
        deadline = time.monotonic() + WAIT_S
        while not (model := self.snapshot(model_id)).downloaded:
            assert model.downloading, "neither downloading nor downloaded"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not model.downloading
        return model


@contextlib.contextmanager
def sdk_of(daemon: RunningDaemon) -> Iterator[Sdk]:
    client = ApiClient(Configuration(host=daemon.url))
    try:
        yield Sdk((ModelApi(client), ModelsApi(client), WellKnownApi(client)))
    finally:
        client.rest_client.pool_manager.clear()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A hub with two repositories, which have a file of the same name but not the same content."""
    with LocalHub() as hub:
        for repo, name in ((REPO, "Tiny"), (OTHER_REPO, "Another")):
            facts = MINIMAL | {"general.name": name}
            tensors = [Tensor(dimensions=(32, SIZE_BYTES // 128))]
            hub.add(repo, {FILE: write_gguf(tmp_path / name, facts, tensors).read_bytes()})
        yield hub


@pytest.fixture
def hub_daemon(start_daemon: Callable[..., RunningDaemon], hub: LocalHub) -> RunningDaemon:
    """A daemon of this test's own, that downloads from the local hub."""
    return start_daemon(HF_ENDPOINT=hub.url)


@pytest.fixture
def sdk(hub_daemon: RunningDaemon) -> Iterator[Sdk]:
    """The SDK at a daemon of this test's own."""
    with sdk_of(hub_daemon) as sdk:
        yield sdk


@pytest.fixture
def sample_sdk(sample_daemon: RunningDaemon) -> Iterator[Sdk]:
    """The SDK at the daemon that has the sample model; every model is unloaded afterwards."""
    with sdk_of(sample_daemon) as sdk:
        yield sdk
        sdk("unload_models")


def seeded(**fields: Any) -> SeededModel:
    """What a client sends to create a model."""
    required: dict[str, Any] = {
        "version": "0.1",
        "created": GroupedTimestamp(value=datetime.now(UTC)),
        "name": "My model",
        "cloud": False,
        "type": "SPEED",
        "usage": "CODE_CONVERSATION",
    }
    return SeededModel(**(required | fields))


# how a client finds the daemon


def test_well_known(sample_sdk: Sdk, sample_daemon: RunningDaemon) -> None:
    health = sample_sdk("get_well_known_health")
    assert UUID.fullmatch(health.removeprefix("ok:"))
    assert sample_sdk("get_well_known_health") == health
    assert sample_sdk("get_well_known_stream_health") == "ok"
    version = tuple(int(part) for part in sample_sdk("get_well_known_version").split("."))
    assert (12, 0, 0) <= version < (13, 0, 0)
    assert Path(sample_sdk("get_installation_path")).is_dir()
    status, _, text = sample_daemon.request("HEAD", "/.well-known/health")
    assert (status, text) == (200, "")


# snapshots


def test_models_snapshot(sample_sdk: Sdk) -> None:
    models = sample_sdk.all()
    (sample,) = (model for model in models if model.unique == SAMPLE)
    assert UUID.fullmatch(sample.id)
    assert sample.downloaded is True
    assert sample.downloading is False
    assert sample.loaded is False
    assert sample.custom is False
    assert sample.cloud is False
    assert sample.name
    assert sample.version
    assert (sample.type.value, sample.usage.value) == ("SPEED", "CODE_CONVERSATION")
    assert sample.provider is not None
    assert sample.provider.value == "HUGGING_FACE"
    assert sample.quantization == "Q4_1"
    assert 0.13 < sample.parameters < 0.14
    assert sample.bytes is not None
    assert sample.bytes.value == 98362432
    assert sample.bytes.readable == "93.8 MB"
    assert sample.max_tokens is not None
    assert sample.max_tokens.total == 8192
    assert datetime.now(UTC) - sample.created.value < timedelta(hours=1)


def test_a_snapshot_by_id_and_by_unique_name(sample_sdk: Sdk) -> None:
    by_name = sample_sdk.snapshot(SAMPLE)
    assert sample_sdk.snapshot(by_name.id) == by_name
    assert sample_sdk.snapshot(by_name.id.upper()) == by_name
    assert sample_sdk.snapshot(SAMPLE.upper()) == by_name


@pytest.mark.parametrize("model", [UNKNOWN_ID, "no-such-model", "../catalog.db", "a/b", "%", "ü"])
def test_the_snapshot_of_an_unknown_model_is_gone(sample_sdk: Sdk, model: str) -> None:
    with pytest.raises(ApiException) as failed:
        sample_sdk.snapshot(model)
    assert failed.value.status == 410
    assert failed.value.body == "model was not found."
    assert failed.value.headers is not None
    assert failed.value.headers["Content-Type"].startswith("text/plain")


def test_identifiers(sample_sdk: Sdk) -> None:
    identifiers = sample_sdk("models_stream_identifiers").iterable
    real = [model.id for model in sample_sdk.all() if model.unique not in ALIASES]
    assert [one.model.id for one in identifiers] == real


@pytest.mark.parametrize(
    "method",
    [
        *ANSWERS_WITH_A_MODEL,
        "model_specific_model_download_progress",
        "model_scores_increment",
        "models_delete_specific_model",
        "models_delete_specific_model_cache",
    ],
)
def test_an_unknown_model_is_an_error_that_names_it(sample_sdk: Sdk, method: str) -> None:
    assert UNKNOWN_ID in sample_sdk.fails(method, UNKNOWN_ID)


# loading


def test_load_and_unload(sample_sdk: Sdk, sample_daemon: RunningDaemon) -> None:
    model_id = sample_sdk.snapshot(SAMPLE).id

    loaded = sample_sdk("model_specific_model_load", model_id)
    assert (loaded.id, loaded.loaded) == (model_id, True)
    assert loaded.ram is not None
    worker = sample_daemon.model()["worker_pid"]
    (process,) = (child for child in sample_daemon.children() if child.pid == worker)
    weights_bytes = 98_362_432
    assert weights_bytes < loaded.ram.value < 10 * weights_bytes
    assert sample_sdk.snapshot(model_id).loaded is True
    assert sample_sdk("model_specific_model_load", model_id).loaded is True  # as it is already
    assert sample_daemon.model()["worker_pid"] == worker

    unloaded = sample_sdk("model_specific_model_unload", model_id)
    assert (unloaded.id, unloaded.loaded, unloaded.downloaded) == (model_id, False, True)
    assert not process.is_running(), "its RAM is not back yet"
    assert sample_sdk("model_specific_model_unload", model_id).loaded is False  # as it was already


def test_unload_all(sample_sdk: Sdk, sample_daemon: RunningDaemon) -> None:
    sample_sdk("model_specific_model_load", SAMPLE)
    assert sample_sdk("unload_models") is None
    assert sample_sdk.snapshot(SAMPLE).loaded is False
    assert sample_daemon.model()["worker_pid"] is None
    assert sample_sdk("unload_models") is None


def test_a_model_that_is_not_downloaded_does_not_load(sdk: Sdk) -> None:
    text = sdk.fails("model_specific_model_load", SAMPLE)
    assert SAMPLE in text
    assert "download" in text
    assert sdk.snapshot(SAMPLE).loaded is False
    assert sdk("model_specific_model_unload", SAMPLE).loaded is False


# downloading


@pytest.mark.alone
def test_download(sdk: Sdk, hub: LocalHub, hub_daemon: RunningDaemon) -> None:
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    assert (model.downloaded, model.downloading) == (False, False)
    hub.faults.rate_bytes_s = SLOW_BYTES_S

    started = sdk("model_specific_model_download", model.id)
    assert (started.id, started.downloading, started.downloaded) == (model.id, True, False)
    deadline = time.monotonic() + WAIT_S
    while not (progress := sdk("model_specific_model_download_progress", model.id)).percentage:
        assert progress.status.value == "IN-PROGRESS"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert isinstance(progress, ModelDownloadProgress)
    assert 0 < progress.percentage < 100
    hub.faults.rate_bytes_s = 0

    done = sdk.downloaded(model.id)
    assert done.bytes is not None
    assert done.bytes.value >= SIZE_BYTES
    progress = sdk("model_specific_model_download_progress", model.id)
    assert (progress.status.value, progress.percentage) == ("COMPLETED", 100)
    (file,) = hub_daemon.model(model.id)["files"]
    assert sha256(file) == hub._repos[REPO].files[FILE].digest("sha256")


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_sample_model_needs_no_network(sdk: Sdk, hub: LocalHub) -> None:
    model_id = sdk.snapshot(SAMPLE).id
    assert sdk("model_specific_model_download", model_id).downloading is True
    assert sdk.downloaded(model_id).bytes is not None
    assert hub.requests == []


def test_cancel(sdk: Sdk, hub: LocalHub, hub_daemon: RunningDaemon) -> None:
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    hub.faults.stall_at = SIZE_BYTES // 2
    sdk("model_specific_model_download", model.id)
    assert hub.stalled.wait(WAIT_S)

    canceled = sdk("model_specific_model_download_cancel", model.id)
    assert (canceled.downloading, canceled.downloaded) == (False, False)
    progress = sdk("model_specific_model_download_progress", model.id)
    assert progress.status.value == "CANCELED"
    assert hub_daemon.children() == []

    again = sdk("model_specific_model_download_cancel", model.id)  # nothing is left to cancel
    assert (again.downloading, again.downloaded) == (False, False)
    hub.faults.stall_at = None
    sdk("model_specific_model_download", model.id)
    assert sdk.downloaded(model.id).downloaded
    assert sdk("model_specific_model_download_cancel", model.id).downloaded is True


def test_a_cancel_that_comes_together_with_its_download(
    sdk: Sdk, hub: LocalHub, hub_daemon: RunningDaemon
) -> None:
    """Two apps, or an impatient one: whichever is first, the model must not stay in between."""
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(contextlib.closing(HTTPConnection(*hub_daemon.host_port)))
            for _ in range(2)
        ]
        for connection in connections:  # so that nothing is left to do but to send a request
            connection.request("GET", "/.well-known/health")
            connection.getresponse().read()
        hub_daemon.process.suspend()
        try:
            connections[0].request("POST", f"/model/{model.id}/download")
            connections[1].request("POST", f"/model/{model.id}/download/cancel")
        finally:
            hub_daemon.process.resume()
        for connection in connections:
            connection.sock.settimeout(WAIT_S)
            assert connection.getresponse().status == 200
    deadline = time.monotonic() + WAIT_S
    while sdk.snapshot(model.id).downloading:
        assert time.monotonic() < deadline, "it neither goes on nor ends"
        time.sleep(0.05)
    sdk("model_specific_model_download", model.id)
    assert sdk.downloaded(model.id).downloaded


def test_a_model_that_nobody_downloads_has_no_progress(sdk: Sdk) -> None:
    progress = sdk("model_specific_model_download_progress", SAMPLE)
    assert progress.status.value == "UNKNOWN"


def test_a_model_without_a_source_says_so(sdk: Sdk) -> None:
    model = sdk("models_create_new_model", seeded(unique="from-nowhere"))
    text = sdk.fails("model_specific_model_download", model.id)
    assert "from-nowhere" in text
    assert "source" in text
    assert sdk.snapshot(model.id).downloading is False


def test_a_download_that_fails_is_over(sdk: Sdk, hub: LocalHub) -> None:
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    hub.faults.corrupt_at = SIZE_BYTES // 2
    sdk("model_specific_model_download", model.id)
    deadline = time.monotonic() + WAIT_S
    while sdk.snapshot(model.id).downloading:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert sdk.snapshot(model.id).downloaded is False
    progress = sdk("model_specific_model_download_progress", model.id)
    assert progress.status.value == "FAILED"
    assert "download" in sdk.fails("model_specific_model_load", model.id)


# creating


def test_create_keeps_what_the_client_says(sdk: Sdk) -> None:
    model = sdk(
        "models_create_new_model",
        seeded(
            name="A model of mine",
            unique="mine:1b-q4",
            description="It knows my code.",
            type="ACCURACY",
            usage="TEXT_EMBEDDING",
            provider="META",
            foundation="LLAMA_3_8B",
            quantization="q4f16_1",
            parameters=1.5,
            bytes=ByteDescriptor(value=1000, readable="1 KB"),
            max_tokens=ModelMaxTokens(total=2048),
            custom=False,
            downloaded=True,
        ),
    )
    assert UUID.fullmatch(model.id)
    assert model.custom is True, "created models are always custom"
    assert model.downloaded is False, "only a download makes it so"
    assert (model.name, model.unique, model.version) == ("A model of mine", "mine:1b-q4", "0.1")
    assert model.description == "It knows my code."
    assert (model.type.value, model.usage.value) == ("ACCURACY", "TEXT_EMBEDDING")
    assert (model.provider.value, model.foundation.value) == ("META", "LLAMA_3_8B")
    assert (model.quantization, model.parameters) == ("q4f16_1", 1.5)
    assert model.bytes.value == 1000
    assert model.max_tokens.total == 2048
    assert sdk.snapshot(model.id) == model
    assert model in sdk.all()


def added(sdk: Sdk) -> list[str]:
    """The models that are not built in, after a look that these and the aliases are all there."""
    names = [model.unique for model in sdk.all()]
    known = {*BUILT_IN, *ALIASES}
    assert set(names) >= known and len(set(names)) == len(names)
    return sorted(set(names) - known)


def test_no_duplicates(sdk: Sdk) -> None:
    first = sdk("models_create_new_model", seeded(unique="mine", name="First"))
    again = sdk("models_create_new_model", seeded(unique="mine", name="Second"))
    shouted = sdk("models_create_new_model", seeded(unique="MINE"))
    assert again.id == shouted.id == first.id
    sample = sdk("models_create_new_model", seeded(unique=SAMPLE))
    assert sample.id == sdk.snapshot(SAMPLE).id
    assert sample.custom is False
    assert added(sdk) == ["mine"]


def test_a_unique_name_that_is_a_source_becomes_one(sdk: Sdk, hub_daemon: RunningDaemon) -> None:
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    assert model.unique == "tiny.q4_k_m"
    assert hub_daemon.model(model.id)["source"] == SOURCE
    assert sdk("models_create_new_model", seeded(unique=SOURCE)).id == model.id
    assert sdk.snapshot("tiny.q4_k_m") == model


def test_another_source_is_never_taken_for_one_that_is_there(
    sdk: Sdk, hub: LocalHub, hub_daemon: RunningDaemon
) -> None:
    """Two repositories have a file of one name: a client must not get the other one's bytes."""
    other_source = f"hf:{OTHER_REPO}/{FILE}"
    sdk("models_create_new_model", seeded(unique=SOURCE))
    try:
        other = sdk("models_create_new_model", seeded(unique=other_source))
    except ApiException as refused:
        assert refused.status == 500
        assert FILE.lower().removesuffix(".gguf") in str(refused.body)
        return
    assert hub_daemon.model(other.id)["source"] == other_source


def test_a_model_without_a_source_gets_the_one_that_comes_later(
    sdk: Sdk, hub_daemon: RunningDaemon
) -> None:
    """Whoever created a model without a source can mend that in the way its error says."""
    first = sdk("models_create_new_model", seeded(unique="tiny.q4_k_m"))
    sdk.fails("model_specific_model_download", first.id)
    try:
        second = sdk("models_create_new_model", seeded(unique=SOURCE))
    except ApiException as refused:
        assert refused.status == 500
        return
    assert hub_daemon.model(second.id)["source"] == SOURCE


def test_a_model_without_a_unique_name_gets_one(sdk: Sdk) -> None:
    model = sdk("models_create_new_model", seeded(name="My Fine Model (v2)"))
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", model.unique)
    assert sdk.snapshot(model.unique) == model


@pytest.mark.parametrize(
    ("unique", "problem"),
    [
        ("../../etc/passwd", "unique name"),
        ("a b", "unique name"),
        ("-x", "unique name"),
        ("a" * 300, "unique name"),
        ("hf:nothing", "source"),
        ("hf:a/b/../c", "source"),
        ("package:/x", "source"),
    ],
)
def test_a_unique_name_that_is_neither_name_nor_source_is_refused(
    sdk: Sdk, unique: str, problem: str
) -> None:
    assert problem in sdk.fails("models_create_new_model", seeded(unique=unique))
    assert added(sdk) == []


@pytest.mark.parametrize("body", [None, {"name": 7}, {"name": "x", "type": "LARGE"}, []])
def test_a_body_that_no_sdk_sends_is_refused(
    sdk: Sdk, hub_daemon: RunningDaemon, body: Any
) -> None:
    for path in ("/models/create", "/model/update"):
        status, headers, text = hub_daemon.request("POST", path, body)
        assert status == 500
        assert headers["content-type"].startswith("text/plain")
        assert text
    assert added(sdk) == []


# updating


def test_update(sdk: Sdk) -> None:
    model = sdk("models_create_new_model", seeded(unique="mine"))
    model.name, model.description, model.unique = "Another name", "Changed.", "mine-2"
    updated = sdk("model_update", model)
    assert updated == model
    assert sdk.snapshot(model.id) == model
    assert sdk.snapshot("mine-2") == model


def test_update_changes_nothing_that_is_calculated(sdk: Sdk) -> None:
    model = sdk("models_create_new_model", seeded(unique="mine"))
    lie = model.model_copy(
        update={"custom": False, "downloaded": True, "downloading": True, "loaded": True}
    )
    assert sdk("model_update", lie) == model


def test_updating_a_download_does_not_lose_it(sdk: Sdk, hub_daemon: RunningDaemon) -> None:
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    sdk("model_specific_model_download", model.id)
    model = sdk.downloaded(model.id)
    files = hub_daemon.model(model.id)["files"]
    model.name = "Renamed"
    assert sdk("model_update", model) == model
    assert hub_daemon.model(model.id)["files"] == files
    assert sdk("model_specific_model_download", model.id).downloaded is True


def test_only_custom_models_are_updated(sdk: Sdk) -> None:
    before = sdk.snapshot(SAMPLE)
    change = before.model_copy(update={"name": "Mine now", "custom": True})
    text = sdk.fails("model_update", change)
    assert SAMPLE in text
    assert "custom" in text
    assert sdk.snapshot(SAMPLE) == before


def test_an_update_that_cannot_be_is_refused(sdk: Sdk) -> None:
    model = sdk("models_create_new_model", seeded(unique="mine"))
    for change in ({"unique": SAMPLE}, {"unique": "not a name"}, {"name": " "}):
        assert sdk.fails("model_update", model.model_copy(update=change))
    assert UNKNOWN_ID in sdk.fails("model_update", model.model_copy(update={"id": UNKNOWN_ID}))
    assert sdk.snapshot(model.id) == model


# deleting


def test_delete(sdk: Sdk, hub_daemon: RunningDaemon) -> None:
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    sdk("model_specific_model_download", model.id)
    sdk.downloaded(model.id)
    assert stored_bytes(hub_daemon) >= SIZE_BYTES

    assert sdk("models_delete_specific_model", model.id) is None
    with pytest.raises(ApiException) as gone:
        sdk.snapshot(model.id)
    assert gone.value.status == 410
    assert added(sdk) == []
    assert stored_bytes(hub_daemon) == 0
    assert model.id in sdk.fails("models_delete_specific_model", model.id)


def stored_bytes(daemon: RunningDaemon) -> int:
    """Return the size of all files in the daemon's store."""
    files = (path for path in (daemon.data_dir / "store").rglob("*") if path.is_file())
    return sum({(stat := path.stat()).st_ino: stat.st_size for path in files}.values())


def test_only_custom_models_are_deleted(sample_sdk: Sdk) -> None:
    before = sample_sdk.snapshot(SAMPLE)
    text = sample_sdk.fails("models_delete_specific_model", before.id)
    assert SAMPLE in text
    assert sample_sdk.snapshot(SAMPLE) == before


def test_deleting_during_a_download_ends_it(
    sdk: Sdk, hub: LocalHub, hub_daemon: RunningDaemon
) -> None:
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    hub.faults.stall_at = SIZE_BYTES // 2
    sdk("model_specific_model_download", model.id)
    assert hub.stalled.wait(WAIT_S)
    sdk("models_delete_specific_model", model.id)
    assert added(sdk) == []
    assert hub_daemon.children() == []
    assert stored_bytes(hub_daemon) == 0


def test_delete_cache_removes_the_files_of_any_model(sdk: Sdk, hub_daemon: RunningDaemon) -> None:
    custom = sdk("models_create_new_model", seeded(unique=SOURCE))
    sample = sdk.snapshot(SAMPLE)
    for model_id in (custom.id, sample.id):
        sdk("model_specific_model_download", model_id)
        sdk.downloaded(model_id)

        output = sdk("models_delete_specific_model_cache", model_id, ModelDeleteCacheInput())
        assert output.model.id == model_id
        after = sdk.snapshot(model_id)
        assert (after.downloaded, after.downloading, after.loaded) == (False, False, False)
        assert stored_bytes(hub_daemon) == 0
        sdk("models_delete_specific_model_cache", model_id)  # nothing is left, and no body is sent
    assert len(added(sdk)) == 1

    sdk("model_specific_model_download", custom.id)
    assert sdk.downloaded(custom.id).downloaded


def test_what_was_deleted_is_not_said_to_be_downloaded(sdk: Sdk) -> None:
    model = sdk("models_create_new_model", seeded(unique=SOURCE))
    sdk("model_specific_model_download", model.id)
    sdk.downloaded(model.id)
    sdk("models_delete_specific_model_cache", model.id, ModelDeleteCacheInput())
    progress = sdk("model_specific_model_download_progress", model.id)
    assert progress.status.value != "COMPLETED"
    assert not progress.percentage


def test_delete_cache_unloads_first(sdk: Sdk, hub_daemon: RunningDaemon) -> None:
    sdk("model_specific_model_download", SAMPLE)
    sdk.downloaded(SAMPLE)
    sdk("model_specific_model_load", SAMPLE)
    sdk("models_delete_specific_model_cache", SAMPLE, ModelDeleteCacheInput())
    after = sdk.snapshot(SAMPLE)
    assert (after.downloaded, after.loaded) == (False, False)
    assert hub_daemon.model()["worker_pid"] is None


# the rest


def test_scores_increment(sample_sdk: Sdk) -> None:
    before = sample_sdk.snapshot(SAMPLE)
    assert sample_sdk("model_scores_increment", before.id, SeededScoreIncrement()) is None
    assert sample_sdk("model_scores_increment", before.id) is None
    assert sample_sdk.snapshot(SAMPLE).model_copy(update={"score": before.score}) == before


def test_models_and_downloads_outlive_the_daemon(
    start_daemon: Callable[..., RunningDaemon], hub: LocalHub
) -> None:
    daemon = start_daemon(HF_ENDPOINT=hub.url)
    with sdk_of(daemon) as sdk:
        model = sdk("models_create_new_model", seeded(unique=SOURCE))
        sdk("model_specific_model_download", model.id)
        before = sdk.downloaded(model.id)
        health = sdk("get_well_known_health")
    daemon.kill()
    with sdk_of(daemon.start()) as sdk:
        assert sdk.snapshot(model.id) == before
        assert sdk("get_well_known_health") == health
