"""Fixtures of all tiers. Every test has its own home; no child outlives a test."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings
from running import RunningDaemon
from turns import turn

from daemon.workers.environment import DEFAULTS

TESTS = Path(__file__).parent

# Some tests call an engine without modeld, beside others that want the same cores: its threads must
# not spin there either. 24 tokens of SmolLM2 beside two busy programs took 17 s, and take 4.
os.environ.setdefault("GOMP_SPINCOUNT", DEFAULTS["GOMP_SPINCOUNT"])

# A machine that others use as well makes examples slowly; that says nothing of the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Wait before the test's own time begins to be counted."""
    with turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


def pytest_collection_finish() -> None:
    """Keep what all tests share out of collections, which would halt the loop of the one that runs."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing may be skipped: every tool is there, so a skip hides a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's settings, tokens or a daemon of theirs."""
    for name in list(os.environ):
        if name.startswith(("MODELD_", "HF_", "HUGGING")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    # children find the backends that tests bring
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(TESTS), str(TESTS / "plugin"))))


@pytest.fixture(autouse=True)
def no_children_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process behind. Session-wide daemons were there before it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    if "daemon" in request.fixturenames or "sample_daemon" in request.fixturenames:
        return  # its own fixture stops it later and checks that
    new = [each for each in psutil.Process().children(recursive=True) if each not in before]
    left = [child for child in new if not gone(child)]
    assert not left, left


def gone(child: psutil.Process) -> bool:
    """Whether a process has ended, if its parent has seen that or not."""
    try:
        return child.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """Start daemons that share this test's home: `start_daemon(*arguments, **environment)`."""
    started: list[RunningDaemon] = []

    def start(*arguments: str, **extra: str) -> RunningDaemon:
        daemon = RunningDaemon(tmp_path, *arguments, **extra)
        started.append(daemon)
        return daemon.start()

    yield start
    for daemon in started:
        if daemon.alive:
            daemon.stop()


@pytest.fixture
def daemon(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A running daemon with an empty data directory."""
    return start_daemon()


@pytest.fixture(scope="session")
def sample_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """One running daemon for the whole session, with the sample model downloaded."""
    daemon = RunningDaemon(tmp_path_factory.mktemp("sample"))
    daemon.start()
    try:
        daemon.download()
        yield daemon
    finally:
        daemon.stop()
