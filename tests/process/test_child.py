"""Child: whatever a child process does, it is heard, explained, ended within bounds and reaped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends import contract, wire
from daemon.workers.child import Child, describe_exit
from daemon.workers.environment import DEFAULTS, for_engines, for_fetcher

CHILDREN = Path(__file__).parent / "children"
GRACE_S = 0.3
PATIENCE_S = 10.0  # for what takes an interpreter's start on a busy machine

pytestmark = pytest.mark.timeout(60)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

Start = Callable[..., Awaitable[Child]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start a program of `children/`: `await start("obeys", *arguments)`; it ends with the test."""
    started: list[Child] = []

    async def start_child(program: str, *arguments: str, **options: Any) -> Child:
        child = await Child.start(
            [str(CHILDREN / f"{program}.py"), *arguments],
            union=wire.FromWorker,
            name=program,
            **options,
        )
        started.append(child)
        return child

    yield start_child
    for child in started:
        child.kill()
        await exit_status(child)


async def exit_status(child: Child, *, within_s: float = PATIENCE_S) -> int:
    """Wait for the child's end without ever cancelling what waits for it inside."""
    done, _ = await asyncio.wait([child.exited], timeout=within_s)
    assert done, f"the end of {child.name} was not seen within {within_s} s"
    return child.exited.result()


async def hear(child: Child, kind: type[Any]) -> Any:
    """Return the child's next message of this kind."""
    async with asyncio.timeout(PATIENCE_S):
        async for message in child.messages():
            if isinstance(message, kind):
                return message
    raise AssertionError(f"no {kind.__name__}: {child.tail}")


async def hear_all(child: Child) -> list[Any]:
    """Return the child's messages until its channel ends."""
    async with asyncio.timeout(PATIENCE_S):
        return [message async for message in child.messages()]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds; for what ends without an event that a test could see."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def gone_within(process: psutil.Process, seconds: float) -> bool:
    """Say whether the process, which is not ours to wait for, ends within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


# talking


async def test_messages_pass_both_ways_in_order(start):
    child = await start("obeys")
    assert (await hear(child, wire.Hello)).pid == child.pid
    for number in range(100):
        child.send(wire.Ping(id=number))
    for number in range(100):
        assert await hear(child, wire.Pong) == wire.Pong(id=number)


async def test_a_message_of_megabytes_passes_whole(start):
    child = await start("obeys")
    text = "größe 🙂\n" * 500_000
    request = contract.ChatRequest(messages=({"role": "user", "content": text},))
    child.send(wire.Chat(id=1, request=request))
    assert (await hear(child, wire.Delta)).delta.content == text


async def test_a_message_to_a_child_that_has_gone_is_lost_without_fuss(start):
    child = await start("obeys")
    await child.stop(wire.Shutdown())
    child.send(wire.Ping(id=1))
    assert await hear_all(child) in ([], [wire.Hello(pid=child.pid)])


async def test_a_child_that_dies_with_messages_unread_just_ends(start):
    child = await start("never_answers")
    await hear(child, wire.Hello)
    for number in range(10_000):
        child.send(wire.Ping(id=number))
    child.kill()
    assert await hear_all(child) == []
    assert await exit_status(child) == -signal.SIGKILL


async def test_a_line_that_its_death_tore_is_dropped(start):
    child = await start("torn")
    child.send(wire.Ping(id=1))
    messages = await hear_all(child)
    assert messages[1:] == [wire.Delta(id=1, delta=contract.Delta(content="whole"))]
    assert await exit_status(child) == 7


async def test_the_last_word_of_a_child_that_read_nothing_is_heard(start):
    """Its end is a reset of the connection then, which must not take what came before it."""
    child = await start("leaves_unread")
    child.send(wire.Ping(id=1))
    assert await exit_status(child) == 0
    assert (await hear_all(child))[1:] == [wire.Pong(id=7)]


@pytest.mark.parametrize("kind", ["text", "unknown", "incomplete", "binary", "nested"])
async def test_a_line_that_is_no_message_kills_the_child_at_once(start, kind):
    child = await start("garbage", kind)
    await hear(child, wire.Hello)
    child.send(wire.Ping(id=1))
    with pytest.raises(wire.ProtocolError, match="garbage broke the protocol"):
        await hear(child, wire.Pong)
    assert await exit_status(child, within_s=1) == -signal.SIGKILL


async def test_a_line_over_the_limit_kills_the_child(start, monkeypatch):
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 1_000_000)
    child = await start("garbage", "long")
    await hear(child, wire.Hello)
    child.send(wire.Ping(id=1))
    with pytest.raises(wire.ProtocolError, match="garbage broke the protocol"):
        await hear(child, wire.Pong)
    assert await exit_status(child, within_s=1) == -signal.SIGKILL


async def test_a_child_that_closes_its_channel_is_heard_to_and_lives(start):
    child = await start("closes_channel")
    child.send(wire.Ping(id=1))
    assert len(await hear_all(child)) == 1
    assert not child.exited.done()
    assert psutil.pid_exists(child.pid)


# ending


@pytest.mark.parametrize(
    ("program", "status", "graces"),
    [
        ("obeys", 0, 0),
        ("never_answers", -signal.SIGTERM, 1),
        ("closes_channel", -signal.SIGTERM, 1),
        ("ignores_everything", -signal.SIGKILL, 2),
    ],
)
async def test_the_stop_ladder_goes_as_far_as_it_must(start, program, status, graces):
    child = await start(program)
    await hear(child, wire.Hello)
    if program == "closes_channel":
        child.send(wire.Ping(id=1))
        await hear_all(child)
    began = time.monotonic()
    async with asyncio.timeout(2 * GRACE_S + 1):
        assert await child.stop(wire.Shutdown(), grace_s=GRACE_S) == status
    assert time.monotonic() - began >= graces * GRACE_S
    assert not psutil.pid_exists(child.pid), "not reaped"


async def test_without_a_goodbye_the_ladder_begins_with_sigterm(start):
    child = await start("obeys")
    await hear(child, wire.Hello)
    async with asyncio.timeout(1):
        assert await child.stop(grace_s=5) == -signal.SIGTERM


async def test_a_child_that_is_still_starting_can_be_stopped(start):
    child = await start("ignores_everything")
    async with asyncio.timeout(2 * GRACE_S + 1):
        assert await child.stop(wire.Shutdown(), grace_s=GRACE_S) < 0


async def test_a_frozen_child_is_killed(start):
    child = await start("obeys")
    await hear(child, wire.Hello)
    os.kill(child.pid, signal.SIGSTOP)
    async with asyncio.timeout(2 * GRACE_S + 1):
        status = await child.stop(wire.Shutdown(), grace_s=GRACE_S)
    assert status == -signal.SIGKILL


async def test_a_child_in_the_middle_of_a_flood_can_be_stopped(start):
    child = await start("floods")
    await hear(child, wire.Hello)
    async with asyncio.timeout(2 * GRACE_S + 1):
        await child.stop(wire.Shutdown(), grace_s=GRACE_S)


async def test_a_child_may_be_stopped_by_several_at_once_and_after_its_end(start):
    child = await start("ignores_everything")
    await hear(child, wire.Hello)
    stops = [child.stop(wire.Shutdown(), grace_s=GRACE_S) for _ in range(3)]
    async with asyncio.timeout(2 * GRACE_S + 1):
        assert await asyncio.gather(*stops) == [-signal.SIGKILL] * 3
    assert await child.stop(wire.Shutdown()) == -signal.SIGKILL
    child.kill()


async def test_a_stop_that_is_given_up_does_not_lose_the_exit(start):
    child = await start("ignores_everything")
    await hear(child, wire.Hello)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(GRACE_S / 2):
            await child.stop(wire.Shutdown(), grace_s=GRACE_S)
    assert not child.exited.done()
    async with asyncio.timeout(GRACE_S + 1):
        assert await child.stop(grace_s=GRACE_S) == -signal.SIGKILL


async def test_kill_ends_it_at_once(start):
    child = await start("ignores_everything")
    await hear(child, wire.Hello)
    child.kill()
    assert await exit_status(child, within_s=1) == -signal.SIGKILL


@contextlib.asynccontextmanager
async def with_grandchild(start: Start) -> AsyncIterator[tuple[Child, psutil.Process]]:
    child = await start("leaves_grandchild")
    grandchild = psutil.Process((await hear(child, wire.Pong)).id)
    try:
        yield child, grandchild
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            grandchild.kill()


async def test_the_end_of_a_child_is_seen_though_a_grandchild_holds_its_pipes(start):
    async with with_grandchild(start) as (child, grandchild):
        async with asyncio.timeout(2 * GRACE_S + 2):
            assert await child.stop(wire.Shutdown(), grace_s=GRACE_S) == 0
        assert child.last_line() == "last words"
        assert await hear_all(child) == []


async def test_a_crash_is_seen_though_a_grandchild_holds_the_pipes(start):
    async with with_grandchild(start) as (child, grandchild):
        os.kill(child.pid, signal.SIGKILL)
        assert await exit_status(child, within_s=2) == -signal.SIGKILL
        assert await hear_all(child) == []


async def test_a_grandchild_does_not_outlive_a_kill(start):
    async with with_grandchild(start) as (child, grandchild):
        child.kill()
        assert gone_within(grandchild, 1)
        assert await exit_status(child, within_s=1) == -signal.SIGKILL


# starting


@linux_only
async def test_a_start_that_fails_leaves_nothing(start, tmp_path):
    before = open_descriptors()
    with pytest.raises(OSError):
        await start("obeys", cwd=tmp_path / "missing")
    assert open_descriptors() == before


@linux_only
async def test_a_child_that_has_ended_leaves_no_descriptor(start):
    first = await start("obeys")  # asyncio opens some of its own with the first child
    await first.stop(wire.Shutdown())
    before = open_descriptors()
    child = await start("obeys")
    await child.stop(wire.Shutdown())
    await eventually(lambda: open_descriptors() == before)


@linux_only
@pytest.mark.parametrize("rounds", range(12))
async def test_a_start_that_is_cancelled_leaves_nothing(rounds):
    """Whatever round of the event loop it is in: the process, its pipes and its channel all go."""
    processes, descriptors = set(psutil.Process().children()), open_descriptors()
    task = asyncio.create_task(
        Child.start([str(CHILDREN / "never_answers.py")], union=wire.FromWorker, name="cancelled")
    )
    for _ in range(rounds):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        child = await task
        await child.stop(grace_s=GRACE_S)  # it was quicker
    await eventually(lambda: set(psutil.Process().children()) == processes)
    await eventually(lambda: open_descriptors() == descriptors)


@linux_only
async def test_a_child_makes_way_for_the_user_s_programs(start):
    child = await start("obeys")
    await hear(child, wire.Hello)
    assert psutil.Process(child.pid).nice() == 5
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "500"
    assert os.getsid(child.pid) == child.pid


async def test_ctrl_c_in_a_terminal_does_not_reach_it(start):
    child = await start("obeys")
    await hear(child, wire.Hello)
    os.kill(child.pid, signal.SIGINT)
    child.send(wire.Ping(id=1))
    await hear(child, wire.Pong)


# secrets


def test_engines_see_what_they_need_and_no_secret():
    secrets = [
        "HF_TOKEN",
        "GITHUB_PAT",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DATABASE_URL",
        "SSH_AUTH_SOCK",
        "HTTPS_PROXY",
        "LLAMA_API_KEY",
        "PYTHON_KEYRING_PASSWORD",
        "NOTIFY_SOCKET",
        "LISTEN_FDS",
        "MODELD_HOST",
    ]
    kept = {"PATH": "/bin", "HOME": "/", "LANG": "C", "OMP_NUM_THREADS": "2", "CUDA_PATH": "/c"}
    assert for_engines(kept | dict.fromkeys(secrets, "hidden")) == DEFAULTS | kept


def test_what_engines_get_by_default_a_user_may_change():
    assert for_engines({}) == DEFAULTS
    assert for_engines({"GOMP_SPINCOUNT": "9"})["GOMP_SPINCOUNT"] == "9"


def test_a_fetcher_sees_the_hub_s_token_and_the_proxy_and_no_other_secret():
    kept = {"PATH": "/bin", "HF_TOKEN": "hf_x", "https_proxy": "http://proxy:1", "HF_HOME": "/h"}
    secrets = dict.fromkeys(["GITHUB_PAT", "OPENAI_API_KEY", "NOTIFY_SOCKET"], "hidden")
    assert for_fetcher(kept | secrets) == DEFAULTS | kept


@linux_only
async def test_a_child_sees_no_secret_and_no_standard_input(start, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    child = await start("shows_environment")
    assert await exit_status(child) == 0
    names, stdin = child.tail.splitlines()
    assert {"OMP_NUM_THREADS", "PATH", "GOMP_SPINCOUNT"} <= set(names.split())
    assert "HF_TOKEN" not in names and "NOTIFY_SOCKET" not in names
    assert stdin == "stdin: /dev/null"


async def test_an_environment_that_is_given_is_the_whole_one(start):
    child = await start("shows_environment", environment={"HF_TOKEN": "for the fetcher"})
    assert await exit_status(child) == 0
    assert "HF_TOKEN" in child.tail and "PATH" not in child.tail


# last words


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exit status 0"),
        (3, "exit status 3"),
        (-9, "killed by SIGKILL (9)"),
        (-11, "killed by SIGSEGV (11)"),
        (-6, "killed by SIGABRT (6)"),
        (-120, "killed by signal 120"),
    ],
)
def test_an_exit_is_told_in_words(status, words):
    assert describe_exit(status) == words


async def test_a_child_that_dies_at_start_explains_itself(start):
    child = await start("dies_at_start")
    assert await hear_all(child) == []
    assert await exit_status(child) == 3
    assert "loading the engine" in child.tail
    assert child.last_line() == "giving up"
    assert child.first_complaint() == "Error: libengine.so.1: größer als erlaubt"


async def test_a_child_that_said_nothing_has_no_last_words(start):
    child = await start("never_answers")
    await hear(child, wire.Hello)
    await child.stop(grace_s=GRACE_S)
    assert (child.tail, child.last_line(), child.first_complaint()) == ("", "", "")


async def test_a_flood_of_output_neither_blocks_the_child_nor_fills_memory(start):
    before = psutil.Process().memory_info().rss
    child = await start("floods")
    await hear(child, wire.Pong)  # it got to the end of its 50 MB
    assert psutil.Process().memory_info().rss - before < 20_000_000
    assert await child.stop(wire.Shutdown()) == 0
    assert "last words" in child.tail
    assert 8000 < len(child.tail.encode()) <= 8192


async def test_what_a_child_prints_is_logged_line_by_line_under_its_name(start, caplog):
    caplog.set_level(logging.DEBUG, logger="daemon.workers.child")
    child = await start("obeys", "größe", "of", "it")
    await hear(child, wire.Hello)
    await child.stop(wire.Shutdown())
    assert "child=obeys größe of it" in caplog.messages


# the parent's own death


@pytest.mark.parametrize("program", ["obeys", "never_answers", "ignores_everything"])
def test_a_child_dies_with_a_parent_that_is_killed(program):
    with subprocess.Popen(
        [sys.executable, str(CHILDREN / "parent.py"), str(CHILDREN / f"{program}.py")],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
        parent.wait(timeout=PATIENCE_S)
        assert gone_within(child, 1)


@linux_only
def test_a_child_whose_parent_died_before_it_could_attach_ends_itself():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        orphan = subprocess.Popen(
            [sys.executable, str(CHILDREN / "never_answers.py")]
            + [f"--channel-fd={theirs.fileno()}", f"--parent-pid={os.getppid()}"],
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        assert orphan.wait(timeout=PATIENCE_S) == 1
        assert ours.recv(100) == b"", "it greeted a parent that is not there"
