"""The doctor's report over the facts of computers that this is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from computers import GIB, TREES, see, see_apple

from backends.contract import Probe
from daemon.cli.doctor import _lines
from daemon.doctor import Facts, ModelFacts, report

ENGINE = Probe(
    backend="xllamacpp", available=True, version="2026.10", devices=("CPU",), features=("AVX2",)
)
BROKEN = Probe(
    backend="llama_cpp", available=False, reason="not there; pip install llama-cpp-python"
)
REMOTE = Probe(backend="remote", available=True)
MODEL = ModelFacts(
    unique="big:7b",
    state="unloaded",
    backend="xllamacpp",
    reason="batches",
    placement="all on the CPU: no GPU that this engine can use",
    threads=4,
    context_length=4096,
    slots=2,
    parts={"weights": 4 * GIB, "kv_cache": GIB // 2, "compute": 0},
)


def facts(hardware, **changes):
    return Facts(
        version="1.0",
        hardware=hardware,
        **{
            "running": True,
            "probes": [ENGINE, BROKEN, REMOTE],
            "models": [MODEL],
            "budget_bytes": 8 * GIB,
            "available_bytes": 6 * GIB,
        }
        | changes,
    )


def text(found):
    return "\n".join(_lines(found))


@pytest.mark.parametrize("name", sorted(path.stem for path in TREES.glob("*.tree")))
def test_every_computer_has_a_report_for_people_and_for_programs(tmp_path, name):
    hardware = see_apple(tmp_path) if name == "apple_silicon" else see(tmp_path, name)
    found = report(facts(hardware))
    json.dumps(found)
    assert found["ok"] and found["hardware"]["sources"]
    shown = text(found)
    assert hardware.cpu_model in shown
    assert all(gpu.name in shown for gpu in hardware.gpus)
    assert ("GPU   none" in shown) == (not hardware.gpus)
    for part in (
        "xllamacpp",
        "pip install llama-cpp-python",
        "big:7b",
        "4.5 GiB of RAM",
        "4 threads",
    ):
        assert part in shown
    assert all(advice in shown for advice in found["advice"])


def test_two_cards_and_an_engine_that_can_use_them(tmp_path):
    hardware = see(tmp_path, "two_nvidia")
    model = replace(
        MODEL,
        placement="33 of 33 layers on NVIDIA GeForce RTX 4080 SUPER (5.0 GiB of 15.0 GiB free)",
        gpu_layers=33,
        parts={"weights": GIB // 4},
        gpu_parts={"0000:01:00.0": {"weights": 4 * GIB, "runtime": GIB}},
    )
    cuda = replace(ENGINE, devices=("CUDA0", "CUDA1", "CPU"), gpu_vendors=("nvidia",))
    found = report(facts(hardware, probes=[cuda], models=[model]))
    assert found["advice"] == [] and found["models"][0]["fits"] == "now"
    shown = text(found)
    assert "15.0 GiB of 16.0 GiB free" in shown
    assert "33 of 33 layers on NVIDIA GeForce RTX 4080 SUPER" in shown
    assert "5.0 GiB of 0000:01:00.0: 4.0 GiB weights, 1.0 GiB runtime" in shown


def test_a_container_that_is_too_small(tmp_path):
    found = report(facts(see(tmp_path, "container"), budget_bytes=GIB, available_bytes=GIB // 2))
    (model,) = found["models"]
    assert model["fits"] == "never" and "needs 4.5 GiB" in model["problem"]
    assert any("big:7b: too large for the 1.0 GiB" in advice for advice in found["advice"])
    assert found["ok"], "a smaller model could run"
    assert "a quota of 1.5 CPUs" in text(found)


def test_a_model_that_fits_only_alone(tmp_path):
    found = report(facts(see(tmp_path, "wsl"), available_bytes=GIB))
    assert found["models"][0]["fits"] == "alone" and not found["models"][0]["problem"]
    assert "not now" in text(found)
    ready = replace(MODEL, state="ready")
    found = report(facts(see(tmp_path, "wsl"), available_bytes=GIB, models=[ready]))
    assert found["models"][0]["fits"] == "now"


def test_without_any_engine_nothing_can_run(tmp_path):
    problem = replace(MODEL, backend="", parts={}, problem="no backend can run this model here")
    found = report(facts(see(tmp_path, "apu"), probes=[BROKEN, REMOTE], models=[problem]))
    assert not found["ok"]
    assert "no engine works" in found["advice"][0] and "pip install" in found["advice"][1]
    assert "cannot run: no backend can run this model here" in text(found)


def test_a_model_that_an_upstream_runs_is_something(tmp_path):
    found = report(facts(see(tmp_path, "apu"), probes=[BROKEN, REMOTE]))
    assert found["ok"]


def test_that_no_daemon_runs_is_the_first_line(tmp_path):
    found = report(facts(see(tmp_path, "apu"), running=False, models=[]))
    assert text(found).startswith("modeld 1.0 is not running: start it with `modeld serve`.")
    assert "modeld pull MODEL" in text(found)
