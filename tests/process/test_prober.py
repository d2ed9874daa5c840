"""Probers: what a backend can do here, or why not, whatever its engine does when imported."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from backends.registry import Registry
from daemon.catalog.database import Catalog
from daemon.workers import prober
from daemon.workers.prober import Probers

TESTS = Path(__file__).parents[1]
PATIENCE_S = 20.0  # for some interpreters that start at once on a busy machine
PATHS = {
    "reference": "reference_backend:ReferenceBackend",
    "missing": "reference_backend:MissingBackend",
    "crashing": "reference_backend:CrashingProbe",
}
# Backends are written as they should be: their module imports no engine, `probe` does.
BACKEND = """
from reference_backend import ReferenceBackend

class Backend(ReferenceBackend):
    name = "{name}"

    @classmethod
    def probe(cls):
        import {name}_engine
"""

pytestmark = pytest.mark.timeout(60)

AddBackend = Callable[[str, str], str]


def running_probers() -> list[psutil.Process]:
    """The probers of this process; it may have a daemon of other tests as a child as well."""
    own = psutil.Process().children()
    return [child for child in own if "backends.prober" in child.cmdline()]


@pytest.fixture
def add_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AddBackend:
    """Write a backend and the engine that its probe imports; return the backend's path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{TESTS}")

    def add(name: str, engine: str) -> str:
        (tmp_path / f"{name}_backend.py").write_text(BACKEND.format(name=name))
        (tmp_path / f"{name}_engine.py").write_text(engine)
        return f"{name}_backend:Backend"

    return add


@pytest.fixture
async def probers(tmp_path: Path) -> AsyncIterator[Callable[..., Probers]]:
    """Make the probers of a registry; they are closed after the test."""
    made: list[Probers] = []

    def make(paths: dict[str, str], *drivers: Callable[[], str]) -> Probers:
        made.append(Probers(Registry(paths), catalog, *drivers))
        return made[-1]

    catalog = Catalog(tmp_path / "catalog.db")
    yield make
    for each in made:
        await each.close()
    catalog.close()


async def ask(probers: Probers, *names: str):
    async with asyncio.timeout(PATIENCE_S):
        return await probers.ask(names)


async def test_a_backend_that_works_says_what_it_can(probers):
    probes = await ask(probers(PATHS), "reference")
    assert list(probes) == ["reference"]
    probe = probes["reference"]
    assert probe.available and probe.reason == ""
    assert (probe.version, probe.devices) == ("1.0", ("CPU",))


async def test_an_engine_that_is_missing_is_the_backend_s_own_reason(probers):
    probe = (await ask(probers(PATHS), "missing"))["missing"]
    assert not probe.available
    assert probe.reason == "its engine is not installed; install it with: pip install engine"


async def test_an_engine_that_crashes_is_a_reason_and_harms_no_other(probers):
    probes = await ask(probers(PATHS), *PATHS)
    assert not probes["crashing"].available
    assert "killed by SIGSEGV (11)" in probes["crashing"].reason
    assert probes["reference"].available


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("raise RuntimeError('needs AVX-512')", "exit status 1: RuntimeError: needs AVX-512"),
        ("import an_engine_that_is_nowhere", "No module named 'an_engine_that_is_nowhere'"),
        ("raise SystemExit('no license')", "exit status 1: no license"),
        ("import os; os._exit(0)", "exit status 0"),
        ("import os; os.close(0); os.abort()", "killed by SIGABRT (6)"),
    ],
)
async def test_a_probe_that_fails_is_a_reason(probers, add_backend, engine, reason):
    probe = (await ask(probers({"bad": add_backend("bad", engine)}), "bad"))["bad"]
    assert not probe.available and probe.backend == "bad"
    assert reason in probe.reason


async def test_a_probe_that_talks_a_lot_is_heard_all_the_same(probers, add_backend):
    chatter = "import sys; [print('x' * 1000, file=stream) for stream in (sys.stdout, sys.stderr) for _ in range(2000)]"
    path = add_backend("loud", f"{chatter}\nraise RuntimeError('in the end')")
    probe = (await ask(probers({"loud": path}), "loud"))["loud"]
    assert "in the end" in probe.reason


@pytest.mark.alone
async def test_an_engine_that_hangs_is_given_up_and_ended(probers, add_backend, monkeypatch):
    monkeypatch.setattr(prober, "_TIMEOUT_S", 1.0)
    hang = "import time; time.sleep(3600)"
    paths = {name: add_backend(name, hang) for name in ("one", "two")}
    began = time.monotonic()
    probes = await ask(probers(paths), "one", "two")
    assert time.monotonic() - began < 3, "they were not asked side by side"
    for probe in probes.values():
        assert not probe.available
        assert "did not answer within 1 s" in probe.reason
    assert not running_probers()


async def test_an_engine_that_hangs_and_ignores_sigterm_is_ended_too(
    probers, add_backend, monkeypatch
):
    monkeypatch.setattr(prober, "_TIMEOUT_S", 1.0)
    hang = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    probe = (await ask(probers({"one": add_backend("one", hang)}), "one"))["one"]
    assert "did not answer" in probe.reason
    assert not running_probers()


async def test_a_backend_that_the_daemon_cannot_import_is_listed_with_the_reason(probers):
    asked = probers({"gone": "no_such_module:Backend", "reference": PATHS["reference"]})
    async with asyncio.timeout(PATIENCE_S):
        found = {probe.backend: probe for probe in await asked.all()}
    assert found["reference"].available
    assert not found["gone"].available
    assert "no_such_module:Backend cannot be imported" in found["gone"].reason


async def test_a_backend_that_only_its_child_cannot_import_is_a_reason(
    probers, add_backend, monkeypatch
):
    path = add_backend("here", "")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    probe = (await ask(probers({"here": path}), "here"))["here"]
    assert not probe.available
    assert "No module named 'here_backend'" in probe.reason


async def test_each_backend_is_asked_once(probers, add_backend, tmp_path):
    """The engine leaves a line each time that it is imported."""
    log = tmp_path / "imports"
    path = add_backend("counted", f"open({str(log)!r}, 'a').write('x'); 1 / 0")
    asked = probers({"counted": path})
    first, second = await asyncio.gather(ask(asked, "counted"), ask(asked, "counted"))
    assert first == second == await ask(asked, "counted")
    assert log.read_text() == "x"


async def test_who_leaves_early_does_not_end_the_probe_for_others(probers, add_backend, tmp_path):
    gate = tmp_path / "gate"
    wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n1 / 0"
    asked = probers({"slow": add_backend("slow", wait)})
    impatient = asyncio.create_task(asked.ask(["slow"]))
    patient = asyncio.create_task(asked.ask(["slow"]))
    await asyncio.sleep(0)
    impatient.cancel()
    gate.touch()
    async with asyncio.timeout(PATIENCE_S):
        assert "ZeroDivisionError" in (await patient)["slow"].reason


async def test_names_may_come_from_any_iterable(probers):
    async with asyncio.timeout(PATIENCE_S):
        probes = await probers(PATHS).ask(name for name in ("reference", "missing"))
    assert set(probes) == {"reference", "missing"}


async def test_nothing_asked_is_nothing_answered(probers):
    assert await ask(probers(PATHS)) == {}


async def test_closing_ends_what_is_being_asked_and_tells_who_waits(probers, add_backend, tmp_path):
    started = tmp_path / "started"
    hang = f"import time; open({str(started)!r}, 'w').close(); time.sleep(3600)"
    asked = probers({"slow": add_backend("slow", hang)})
    waiting = asyncio.create_task(asked.ask(["slow"]))
    async with asyncio.timeout(PATIENCE_S):
        while not started.exists():
            await asyncio.sleep(0.01)
    async with asyncio.timeout(3):
        await asked.close()
        probes = await waiting
    assert "stopping" in probes["slow"].reason
    assert not running_probers()


# memory over restarts

VERSIONED = """
from reference_backend import ReferenceBackend
from backends.contract import Probe

class Backend(ReferenceBackend):
    name = "versioned"
    distribution = "versioned-engine"

    @classmethod
    def probe(cls):
        with open({log!r}, "a") as file:
            file.write("probed\\n")
        {first}
        return Probe(backend="versioned", available={available}, version="1", reason="")
"""


@pytest.fixture
def versioned(tmp_path, monkeypatch):
    """A backend whose engine is an installed distribution: `versioned(version, available)`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{TESTS}")
    log = tmp_path / "probes.log"
    log.touch()

    def remove() -> None:
        for old in tmp_path.glob("versioned_engine-*.dist-info"):
            shutil.rmtree(old)

    def install(version: str, *, available: bool = True, first: str = "") -> dict[str, str]:
        (tmp_path / "versioned_backend.py").write_text(
            VERSIONED.format(log=str(log), available=available, first=first)
        )
        remove()
        info = tmp_path / f"versioned_engine-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: versioned-engine\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
        return install.paths

    install.paths = {"versioned": "versioned_backend:Backend"}
    install.remove = remove
    install.count = lambda: len(log.read_text().splitlines())
    return install


async def test_a_working_engine_is_asked_once_for_each_version(probers, versioned):
    """Each `probers(…)` is another start of the daemon on the same data."""
    paths = versioned("1.0")
    for _ in range(2):
        assert (await probers(paths).ask(["versioned"]))["versioned"].available
    assert versioned.count() == 1
    assert (await probers(versioned("1.1")).ask(["versioned"]))["versioned"].available
    assert versioned.count() == 2


async def test_an_engine_that_does_not_work_is_asked_at_every_start(probers, versioned):
    for _ in range(2):
        probes = await probers(versioned("1.0", available=False)).ask(["versioned"])
        assert not probes["versioned"].available
    assert versioned.count() == 2


async def test_an_engine_that_is_installed_again_in_the_same_version_is_asked_again(
    probers, versioned
):
    """A repair, or a build for a GPU: pip writes a new RECORD."""
    asked = probers(versioned("1.0"))
    await ask(asked, "versioned")
    await ask(asked, "versioned")
    assert versioned.count() == 1
    versioned("1.0")
    assert (await ask(asked, "versioned"))["versioned"].available
    assert versioned.count() == 2
    assert (await ask(probers(versioned.paths), "versioned"))["versioned"].available
    assert versioned.count() == 2


async def test_an_engine_that_is_removed_is_asked_again(probers, versioned):
    asked = probers(versioned("1.0"))
    await ask(asked, "versioned")
    versioned.remove()
    await ask(asked, "versioned")
    assert versioned.count() == 2


async def test_a_new_driver_has_every_engine_asked_again(probers, versioned):
    driver = ["6.1, nvidia 550"]
    asked = probers(versioned("1.0"), lambda: driver[0])
    await ask(asked, "versioned")
    driver[0] = "6.1, nvidia 560"
    await ask(asked, "versioned")
    assert versioned.count() == 2


async def test_an_engine_that_failed_at_a_load_is_asked_again(probers, versioned):
    asked = probers(versioned("1.0"))
    await ask(asked, "versioned")
    asked.doubt("versioned")
    await ask(asked, "versioned")
    assert versioned.count() == 2


@pytest.mark.alone
async def test_an_engine_that_hangs_is_not_waited_for_at_the_next_start(
    probers, versioned, monkeypatch
):
    monkeypatch.setattr(prober, "_TIMEOUT_S", 4.0)
    paths = versioned("1.0", first="import time; time.sleep(3600)")
    asked = probers(paths)
    assert "hangs" in (await ask(asked, "versioned"))["versioned"].reason
    for again in (asked, probers(paths)):
        began = time.monotonic()
        assert "hangs" in (await ask(again, "versioned"))["versioned"].reason
        assert not [probe for probe in await again.all() if probe.available]
        assert time.monotonic() - began < 0.5
    assert versioned.count() == 1
    # until it is repaired
    assert (await ask(probers(versioned("1.0")), "versioned"))["versioned"].available


async def test_that_an_engine_hangs_is_forgotten_after_an_hour(probers, versioned, monkeypatch):
    monkeypatch.setattr(prober, "_TIMEOUT_S", 4.0)
    paths = versioned("1.0", first="import time; time.sleep(3600)")
    await ask(probers(paths), "versioned")
    later = time.time() + 3601
    monkeypatch.setattr(prober.time, "time", lambda: later)
    await ask(probers(paths), "versioned")
    assert versioned.count() == 2


async def test_an_engine_that_hangs_delays_nobody_who_has_another(probers, add_backend):
    hang = add_backend("slow", "import time; time.sleep(3600)")
    asked = probers({"reference": PATHS["reference"], "slow": hang})
    began = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        probes = await asked.ask(["reference", "slow"], patience_s=0.1)
    assert time.monotonic() - began < 5
    assert probes["reference"].available
    assert "has not answered yet" in probes["slow"].reason


async def test_patience_lasts_until_there_is_one_that_works(probers, add_backend, tmp_path):
    gate = tmp_path / "gate"
    wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
    path = add_backend("late", wait)
    with (tmp_path / "late_backend.py").open("a") as file:
        file.write("        return super().probe()\n")
    asked = probers({"late": path, "missing": PATHS["missing"]})
    waiting = asyncio.create_task(asked.ask(["late", "missing"], patience_s=0.05))
    await asked.ask(["missing"])
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    gate.touch()
    async with asyncio.timeout(PATIENCE_S):
        assert (await waiting)["late"].available


async def test_a_backend_of_no_distribution_is_asked_at_every_start(probers, tmp_path):
    for _ in range(2):
        probes = await probers({"reference": PATHS["reference"]}).ask(["reference"])
        assert probes["reference"].available
