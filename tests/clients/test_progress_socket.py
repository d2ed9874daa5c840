"""Download progress and the other pushed surfaces, over real WebSockets to a real daemon."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import pytest
import websocket
from gguf_files import MINIMAL, Tensor, write_gguf
from hub import LocalHub
from pieces_os_client.models.model import Model
from pieces_os_client.models.model_download_progress import ModelDownloadProgress
from pieces_os_client.models.model_download_progress_status_enum import (
    ModelDownloadProgressStatusEnum,
)
from pieces_os_client.models.streamed_identifiers import StreamedIdentifiers
from pieces_os_client.wrapper.websockets.base_websocket import BaseWebsocket
from pieces_os_client.wrapper.websockets.health_ws import HealthWS
from running import BUILT_IN, SAMPLE, RunningDaemon

REPO, FILE = "owner/repo", "Tiny.Q4_K_M.gguf"
SIZE_BYTES = 2 * 1024 * 1024
SLOW_BYTES_S = 512 * 1024  # the whole file takes 4 s
SILENCE_S = 1.0  # some times longer than the interval between two frames
FRAME_S = 20.0
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
TERMINAL = frozenset({"COMPLETED", "FAILED", "CANCELED"})
STATUSES = frozenset(status.value for status in ModelDownloadProgressStatusEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One progress frame; `at` is when it came, in seconds of the monotonic clock."""

    at: float
    status: str
    percentage: float | None


def read_frame(text: str) -> Frame:
    """Read a frame as the SDK does, and more strictly: it takes an unknown status for UNKNOWN."""
    assert json.loads(text)["status"] in STATUSES
    progress = ModelDownloadProgress.from_json(text)
    assert progress is not None
    assert progress.status is not None
    assert set(json.loads(text)) == set(progress.to_dict()), "the SDK does not know all of it"
    return Frame(at=time.monotonic(), status=progress.status.value, percentage=progress.percentage)


class Socket:
    """One WebSocket to the daemon."""

    def __init__(self, opened: aiohttp.ClientWebSocketResponse) -> None:
        self._opened = opened

    async def text(self, timeout_s: float = FRAME_S) -> str:
        """Wait for the next text frame."""
        async with asyncio.timeout(timeout_s):
            message = await self._opened.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, message
        return str(message.data)

    async def frame(self) -> Frame:
        """Wait for the next progress frame."""
        return read_frame(await self.text())

    async def until(self, condition: Callable[[Frame], bool]) -> list[Frame]:
        """Return all frames up to the first that fulfils the condition."""
        frames = [await self.frame()]
        while not condition(frames[-1]):
            frames.append(await self.frame())
        return frames

    async def until_end(self) -> list[Frame]:
        """Return all frames up to the terminal one."""
        return await self.until(lambda frame: frame.status in TERMINAL)

    async def stays_silent(self, seconds: float = SILENCE_S) -> None:
        """Check that nothing comes for a while, and that the socket is open after that."""
        with pytest.raises(TimeoutError):
            await self._opened.receive(timeout=seconds)
        await self._opened.ping(b"there?")
        async with asyncio.timeout(FRAME_S):
            answer = await self._opened.receive()
        assert (answer.type, answer.data) == (aiohttp.WSMsgType.PONG, b"there?")

    async def closed(self) -> int | None:
        """Wait until the daemon closes the socket, whatever it still sends; return its code."""
        async with asyncio.timeout(FRAME_S):
            while True:
                message = await self._opened.receive()
                if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED):
                    return self._opened.close_code


class Api:
    """A client of one daemon."""

    def __init__(self, daemon: RunningDaemon, session: aiohttp.ClientSession) -> None:
        self.daemon = daemon
        self._session = session

    async def model(self, method: str, path: str, body: Any = None) -> Model:
        """Send one request whose answer is a Model."""
        async with self._session.request(method, path, json=body) as response:
            assert response.status == 200, await response.text()
            model = Model.from_json(await response.text())
        assert model is not None
        return model

    async def add(self, source: str = f"hf:{REPO}/{FILE}", unique: str = "tiny") -> str:
        """Add a custom model; return its id."""
        body = {"source": source, "unique": unique}
        async with self._session.post("/modeld/v1/models", json=body) as response:
            assert response.status == 201, await response.text()
            return str((await response.json())["id"])

    async def download(self, model_id: str) -> Model:
        return await self.model("POST", f"/model/{model_id}/download")

    async def cancel(self, model_id: str) -> Model:
        return await self.model("POST", f"/model/{model_id}/download/cancel")

    async def snapshot(self, model_id: str) -> Model:
        return await self.model("GET", f"/model/{model_id}")

    async def status(self, method: str, path: str) -> int:
        async with self._session.request(method, path) as response:
            await response.read()
            return response.status

    @contextlib.asynccontextmanager
    async def socket(self, path: str, **headers: str) -> AsyncIterator[Socket]:
        """Open a WebSocket."""
        async with self._session.ws_connect(path, headers=headers, autoping=False) as opened:
            yield Socket(opened)

    def progress(self, model_id: str) -> contextlib.AbstractAsyncContextManager[Socket]:
        """Open a progress socket as Pieces clients do: with an Origin that is the daemon's own."""
        return self.socket(f"/model/{model_id}/download/progress", Origin=self.daemon.url)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A hub that serves one small model."""
    path = write_gguf(tmp_path / FILE, MINIMAL, [Tensor(dimensions=(32, SIZE_BYTES // 128))])
    with LocalHub() as hub:
        hub.add(REPO, {FILE: path.read_bytes()})
        yield hub


@pytest.fixture
async def api(start_daemon: Callable[..., RunningDaemon], hub: LocalHub) -> AsyncIterator[Api]:
    """A client of a daemon that downloads from the local hub."""
    daemon = start_daemon(HF_ENDPOINT=hub.url)
    async with aiohttp.ClientSession(daemon.url) as session:
        yield Api(daemon, session)


def check_course(frames: list[Frame], end: str) -> None:
    """Check a download that was watched from its start to its end."""
    statuses = [frame.status for frame in frames]
    assert statuses[0] == "INITIALIZED"
    assert set(statuses[1:-1]) <= {"IN-PROGRESS"}
    assert statuses[-1] == end
    percentages = [frame.percentage for frame in frames if frame.percentage is not None]
    assert percentages == sorted(percentages), "progress went back"
    before_the_end = [frame.percentage or 0.0 for frame in frames[:-1]]
    assert max(before_the_end) < 100
    if end == "COMPLETED":
        assert frames[-1].percentage == 100
        assert "IN-PROGRESS" in statuses


@pytest.mark.alone
async def test_a_socket_that_is_open_before_the_start_is_told_everything(
    api: Api, hub: LocalHub
) -> None:
    model_id = await api.add()
    hub.faults.rate_bytes_s = SLOW_BYTES_S
    async with api.progress(model_id) as socket:
        started = await api.download(model_id)
        assert (started.downloading, started.downloaded) == (True, False)

        frames = await socket.until_end()
        ended = await api.snapshot(model_id)

        check_course(frames, "COMPLETED")
        assert (ended.downloading, ended.downloaded) == (False, True)
        assert ended.bytes is not None
        assert ended.bytes.value >= SIZE_BYTES
        moving = [frame.at for frame in frames if frame.percentage and frame.percentage < 100]
        assert 0.1 <= median(b - a for a, b in pairwise(moving)) <= 0.5
        busiest = max(sum(1 for at in moving if 0 <= at - first < 1) for first in moving)
        assert busiest <= 10, "frames in one second"
        await socket.stays_silent()


async def test_all_sockets_of_a_model_are_told_and_those_of_others_are_not(
    api: Api, hub: LocalHub
) -> None:
    model_id = await api.add()
    other_id = await api.add(unique="other")
    async with (
        api.progress(model_id) as one,
        api.progress(model_id) as two,
        api.progress("tiny") as by_name,
        api.progress(other_id) as other,
        api.progress(SAMPLE) as sample,
    ):
        await other.stays_silent(0.2)
        await api.download(model_id)
        for socket in (one, two, by_name):
            check_course(await socket.until_end(), "COMPLETED")
        for socket in (other, sample, one):
            await socket.stays_silent(0.5)


async def test_a_cancelled_download_says_so_once_and_the_next_one_starts_afresh(
    api: Api, hub: LocalHub
) -> None:
    model_id = await api.add()
    hub.faults.rate_bytes_s = SLOW_BYTES_S
    async with api.progress(model_id) as socket:
        await api.download(model_id)
        frames = await socket.until(lambda frame: (frame.percentage or 0) > 20)

        canceled = await api.cancel(model_id)
        asked = len(hub.requests)
        frames += await socket.until_end()

        assert (canceled.downloading, canceled.downloaded) == (False, False)
        check_course(frames, "CANCELED")
        assert api.daemon.children() == [], "the fetcher runs on"
        await socket.stays_silent()
        assert len(hub.requests) == asked, "something is still fetched"

        hub.faults.rate_bytes_s = 0
        await api.download(model_id)
        check_course(await socket.until_end(), "COMPLETED")
        assert (await api.snapshot(model_id)).downloaded
        await socket.stays_silent(0.3)


async def test_cancelling_what_is_not_downloaded_tells_nobody(api: Api, hub: LocalHub) -> None:
    model_id = await api.add()
    async with api.progress(model_id) as socket:
        assert (await api.cancel(model_id)).downloading is False
        await socket.stays_silent(0.5)


async def test_a_socket_that_opens_during_a_download_gets_the_present_state_at_once(
    api: Api, hub: LocalHub
) -> None:
    model_id = await api.add()
    hub.faults.rate_bytes_s = SLOW_BYTES_S
    hub.faults.stall_at = SIZE_BYTES // 2  # so that nothing but the opening itself makes a frame
    async with api.progress(model_id) as first:
        await api.download(model_id)
        assert await asyncio.to_thread(hub.stalled.wait, FRAME_S)
        told = []
        with contextlib.suppress(TimeoutError):
            while True:
                told.append(read_frame(await first.text(3 * SILENCE_S)))

        async with api.progress(model_id) as late:
            frame = await late.frame()
            assert frame.status == "IN-PROGRESS"
            assert frame.percentage == told[-1].percentage
            assert 0 < frame.percentage < 100

            await api.cancel(model_id)
            assert [frame.status for frame in await late.until_end()] == ["CANCELED"]
            assert [frame.status for frame in await first.until_end()] == ["CANCELED"]
            await late.stays_silent(0.3)


async def test_the_start_of_a_download_that_runs_already_tells_nothing_new(
    api: Api, hub: LocalHub
) -> None:
    model_id = await api.add()
    hub.faults.rate_bytes_s = SLOW_BYTES_S
    async with api.progress(model_id) as socket:
        await api.download(model_id)
        frames = await socket.until(lambda frame: (frame.percentage or 0) > 10)
        assert (await api.download(model_id)).downloading
        hub.faults.rate_bytes_s = 0
        check_course(frames + await socket.until_end(), "COMPLETED")
        assert len(hub.seen("/cdn/")) <= 2, "it was fetched twice"  # one may be a HEAD


async def test_a_socket_that_opens_after_a_quick_download_gets_its_end(api: Api) -> None:
    """The sample model is a package's file, often copied before the client opens its socket."""
    sample = await api.snapshot(SAMPLE)
    async with api.progress(sample.id) as idle:
        await idle.stays_silent(0.3)
    await api.download(sample.id)
    deadline = time.monotonic() + 60
    while not (now := await api.snapshot(sample.id)).downloaded:
        assert now.downloading, "a client that polls would wait for ever"
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)

    async with api.progress(sample.id) as socket:
        frame = await socket.frame()
        assert (frame.status, frame.percentage) == ("COMPLETED", 100)
        await socket.stays_silent()
    async with api.progress(sample.id) as later:
        await later.stays_silent(0.5)


async def test_downloading_what_is_there_already_ends_at_once(api: Api) -> None:
    model_id = await api.add()
    async with api.progress(model_id) as socket:
        await api.download(model_id)
        await socket.until_end()
        answer = await api.download(model_id)
        assert (answer.downloading, answer.downloaded) == (False, True)
        frames = await socket.until_end()
        assert [frame.status for frame in frames] in (["COMPLETED"], ["INITIALIZED", "COMPLETED"])
        await socket.stays_silent(0.3)


async def test_a_download_that_fails_says_so_once(api: Api, hub: LocalHub) -> None:
    model_id = await api.add()
    hub.faults.corrupt_at = SIZE_BYTES // 2
    async with api.progress(model_id) as socket:
        await api.download(model_id)
        check_course(await socket.until_end(), "FAILED")
        after = await api.snapshot(model_id)
        assert (after.downloading, after.downloaded) == (False, False)
        assert await api.status("POST", f"/model/{model_id}/load") == 500
        await socket.stays_silent()

        hub.faults.corrupt_at = None
        await api.download(model_id)
        check_course(await socket.until_end(), "COMPLETED")
        assert (await api.snapshot(model_id)).downloaded


async def test_deleting_a_model_ends_its_download_for_those_who_watch(
    api: Api, hub: LocalHub
) -> None:
    model_id = await api.add()
    hub.faults.stall_at = SIZE_BYTES // 2
    async with api.progress(model_id) as socket:
        await api.download(model_id)
        assert await asyncio.to_thread(hub.stalled.wait, FRAME_S)
        assert await api.status("POST", f"/models/{model_id}/delete") == 204
        check_course(await socket.until_end(), "CANCELED")


async def test_nobody_is_told_of_a_download_whose_files_are_deleted(api: Api) -> None:
    """Nobody listened to the download; who opens a socket later must not take it for there."""
    model_id = await api.add()
    await api.download(model_id)
    deadline = time.monotonic() + FRAME_S
    while not (await api.snapshot(model_id)).downloaded:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert await api.status("POST", f"/models/{model_id}/delete/cache") == 200
    async with api.progress(model_id) as socket:
        await socket.stays_silent(0.5)


async def test_downloads_that_wait_their_turn_can_be_cancelled(api: Api, hub: LocalHub) -> None:
    hub.faults.stall_at = SIZE_BYTES // 2
    ids = [await api.add(unique=f"tiny-{number}") for number in range(3)]
    async with api.progress(ids[2]) as socket:
        for model_id in ids:  # two at once is the default
            await api.download(model_id)
        assert await asyncio.to_thread(hub.stalled.wait, FRAME_S)
        assert (await api.snapshot(ids[2])).downloading is True
        assert (await api.cancel(ids[2])).downloading is False
        check_course(await socket.until_end(), "CANCELED")
        await socket.stays_silent(0.3)


async def test_a_source_that_is_not_there_fails_too(api: Api, hub: LocalHub) -> None:
    model_id = await api.add("hf:owner/nowhere/none.gguf", "nowhere")
    async with api.progress(model_id) as socket:
        await api.download(model_id)
        check_course(await socket.until_end(), "FAILED")


async def test_an_unknown_model_is_an_error_of_the_handshake(api: Api) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with api.progress(UNKNOWN_ID):
            pass
    assert refused.value.status == 500
    with pytest.raises(websocket.WebSocketBadStatusException) as refused_again:
        websocket.create_connection(progress_url(api.daemon, UNKNOWN_ID), timeout=FRAME_S)
    assert refused_again.value.status_code == 500
    assert UNKNOWN_ID in refused_again.value.resp_body.decode()
    assert refused_again.value.resp_headers["content-type"].startswith("text/plain")


async def test_changes_of_models_are_pushed(api: Api, hub: LocalHub) -> None:
    async with api.socket("/models/stream/identifiers") as socket:
        at_first = read_identifiers(await socket.text())
        sample = await api.snapshot(SAMPLE)
        assert len(at_first) == len(BUILT_IN) and set(at_first.values()) == {False}
        assert sample.id in at_first

        model_id = await api.add()
        assert await told_of(socket, model_id) is False
        await api.download(model_id)
        while not (await api.snapshot(model_id)).downloaded:
            assert await told_of(socket, model_id) is False
        async with asyncio.timeout(FRAME_S):
            assert await api.status("POST", f"/models/{model_id}/delete") == 204
            while not await told_of(socket, model_id):
                pass
        await socket.stays_silent(0.3)


async def told_of(socket: Socket, model_id: str) -> bool:
    """Wait until the socket speaks of this model; return whether it calls it deleted."""
    while model_id not in (told := read_identifiers(await socket.text())):
        pass
    return told[model_id]


def read_identifiers(text: str) -> dict[str, bool]:
    """Return the ids of the models that a frame is about, and whether each is deleted."""
    read = StreamedIdentifiers.from_json(text)
    assert read is not None
    assert read.to_dict() == json.loads(text)
    ids = {one.model.id: bool(one.deleted) for one in read.iterable if one.model is not None}
    assert len(ids) == len(read.iterable)
    return ids


async def test_health_is_pushed(api: Api) -> None:
    async with api.socket("/.well-known/stream/health") as socket:
        assert await socket.text() == "ok"


@pytest.mark.alone
async def test_a_daemon_that_stops_closes_its_sockets_at_once(api: Api, hub: LocalHub) -> None:
    model_id = await api.add()
    hub.faults.stall_at = SIZE_BYTES // 2
    async with contextlib.AsyncExitStack() as stack:
        paths = (
            f"/model/{model_id}/download/progress",
            f"/model/{model_id}/download/progress",
            f"/model/{SAMPLE}/download/progress",
            "/models/stream/identifiers",
            "/.well-known/stream/health",
        )
        sockets = [await stack.enter_async_context(api.socket(path)) for path in paths]
        await api.download(model_id)
        assert await asyncio.to_thread(hub.stalled.wait, FRAME_S)

        asked = time.monotonic()
        status, *codes = await asyncio.gather(
            asyncio.to_thread(api.daemon.stop), *(socket.closed() for socket in sockets)
        )

        assert time.monotonic() - asked < 5
        assert status == 0
        assert set(codes) <= {1000, 1001}, "the sockets were cut, not closed"


@pytest.mark.alone
def test_a_daemon_that_stops_does_not_wait_for_its_clients(daemon: RunningDaemon) -> None:
    """Some clients read what they are sent now and then, and others leave their end open."""
    base = daemon.url.replace("http", "ws", 1)
    paths = (
        f"/model/{SAMPLE}/download/progress",
        f"/model/{SAMPLE}/download/progress",
        "/models/stream/identifiers",
        "/models/stream/identifiers",
        "/.well-known/stream/health",
    )
    with contextlib.ExitStack() as stack:
        for path in paths:
            opened = websocket.create_connection(base + path, timeout=FRAME_S, origin=daemon.url)
            stack.callback(opened.shutdown)
        asked = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - asked < 5


@pytest.mark.parametrize(
    "path",
    [
        f"/model/{SAMPLE}/download/progress",
        "/models/stream/identifiers",
        "/.well-known/stream/health",
    ],
)
async def test_pages_of_other_origins_get_no_socket(api: Api, path: str) -> None:
    port = api.daemon.host_port[1]
    foreign = [
        "https://evil.example",
        "null",
        f"http://127.0.0.1:{port + 1}",
        f"https://127.0.0.1:{port}",
        f"http://127.0.0.1.evil.example:{port}",
        f"http://localhost.evil.example:{port}",
        "",
    ]
    for origin in foreign:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with api.socket(path, Origin=origin):
                pass
        assert refused.value.status == 403, origin
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with api.socket(path, Host=f"evil.example:{port}"):
            pass
    assert refused.value.status == 403
    for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}", "vscode-webview://x"):
        async with api.socket(path, Origin=origin):
            pass


def progress_url(daemon: RunningDaemon, model_id: str) -> str:
    return f"{daemon.url.replace('http', 'ws', 1)}/model/{model_id}/download/progress"


def test_the_websocket_library_of_the_sdk_sees_a_download(daemon: RunningDaemon) -> None:
    """As the Sublime plugin does: the socket opens after the POST; any end ends it."""
    model_id = daemon.model()["id"]
    assert daemon.json("POST", f"/model/{model_id}/download")["downloading"] is True
    opened = websocket.create_connection(
        progress_url(daemon, model_id), timeout=60, origin=daemon.url
    )
    try:
        frames = [read_frame(opened.recv())]
        while frames[-1].status == "IN-PROGRESS":
            frames.append(read_frame(opened.recv()))
    finally:
        opened.close()
    assert frames[-1].status == "COMPLETED"
    assert frames[-1].percentage == 100
    assert daemon.json("GET", f"/model/{model_id}")["downloaded"] is True


class ProgressWS(BaseWebsocket):
    """The SDK's own socket, at a path that its wrapper has no class for."""

    model_id = ""

    @property
    def url(self) -> str:
        return progress_url(self.pieces_client, self.model_id)

    def on_message(self, ws: Any, message: str) -> None:
        self.on_message_callback(message)


class ClientOf:
    """What the SDK's sockets want to know of a PiecesClient."""

    is_pos_stream_running = False

    def __init__(self, daemon: RunningDaemon) -> None:
        self.url = daemon.url
        self.port: str | None = str(daemon.host_port[1])
        self.HEALTH_WS_URL = f"{daemon.url.replace('http', 'ws', 1)}/.well-known/stream/health"


# The library forgets its end of a connection that the daemon closed.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_the_sockets_of_the_sdk_see_a_download_and_the_daemons_end(daemon: RunningDaemon) -> None:
    told: queue.Queue[str] = queue.Queue()
    problems: queue.Queue[object] = queue.Queue()
    healthy: queue.Queue[str] = queue.Queue()
    client = ClientOf(daemon)
    progress = ProgressWS(client, told.put, on_error=lambda _, error: problems.put(error))
    progress.model_id = daemon.model()["id"]
    health = HealthWS(client, healthy.put, on_error=lambda _, error: problems.put(error))
    progress.start()
    health.start()
    try:
        assert progress._initialized.wait(FRAME_S)
        assert healthy.get(timeout=FRAME_S) == "ok"
        daemon.json("POST", f"/model/{progress.model_id}/download")
        frames = [read_frame(told.get(timeout=60))]
        while frames[-1].status not in TERMINAL:
            frames.append(read_frame(told.get(timeout=60)))
        check_course(frames, "COMPLETED")
        assert client.is_pos_stream_running
        assert problems.empty()
    finally:
        daemon.stop()
        for opened in (progress, health):
            opened.thread.join(FRAME_S)
            assert not opened.thread.is_alive()
        BaseWebsocket.instances.clear()
        gc.collect()
    assert told.empty()
