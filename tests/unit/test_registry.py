"""Which backend is chosen, and why the others are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from reference_backend import ReferenceBackend

from backends.contract import Artifact, Fit, Hardware, ModelFile, Probe, Task
from backends.registry import BUILTIN, Registry, load_class

HARDWARE = Hardware(cpu_model="", physical_cores=2, logical_cores=4, ram_bytes=2**34)
ENGINES = {"xllamacpp", "llama_cpp", "onnxruntime", "numpy", "ctransformers", "huggingface_hub"}


class Scored(ReferenceBackend):
    score: ClassVar[int] = 0

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        return Fit(score=cls.score, reason=f"scores {cls.score}", tasks=(Task.CHAT,))


class Good(Scored):
    name = "good"
    score = 90


class Fair(Scored):
    name = "fair"
    score = 70


class Unfit(Scored):
    name = "unfit"
    score = 0


class OnnxOnly(Scored):
    name = "onnx"
    formats = frozenset({"onnx", "ort"})
    score = 100


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which the classes above can be imported."""
    monkeypatch.setitem(sys.modules, "backends_for_this_test", sys.modules[__name__])
    return "backends_for_this_test"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write an importable module: `plugin("name", "its text")`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


def artifact(model_format: str = "gguf") -> Artifact:
    return Artifact(
        format=model_format,
        files=(ModelFile(path="/m", size_bytes=1, mtime_ns=1, sha256=""),),
        architecture="llama",
        parameters=1,
        quantization="F16",
        context_length=1,
        weights_bytes=1,
    )


def probes(*names: str) -> dict[str, Probe]:
    return {name: Probe(backend=name, available=True, version="1") for name in names}


def test_the_best_score_comes_first(here):
    registry = Registry({"fair": f"{here}:Fair", "unfit": f"{here}:Unfit", "good": f"{here}:Good"})
    ranked = registry.rank(artifact(), probes("fair", "unfit", "good"), HARDWARE)
    assert [(c.backend, c.fit.score) for c in ranked] == [("good", 90), ("fair", 70), ("unfit", 0)]
    assert ranked[0].fit.reason == "scores 90" and ranked[0].fit.tasks == (Task.CHAT,)


def test_equal_scores_keep_the_order_of_the_table(here):
    registry = Registry({"b": f"{here}:Good", "a": f"{here}:Good"})
    ranked = registry.rank(artifact(), probes("a", "b"), HARDWARE)
    assert [candidate.backend for candidate in ranked] == ["b", "a"]


def test_a_backend_of_another_format_says_what_it_reads(here):
    registry = Registry({"onnx": f"{here}:OnnxOnly"})
    (candidate,) = registry.rank(artifact(), {}, HARDWARE)
    assert candidate.fit == Fit(score=0, reason="reads onnx, ort, not gguf")


def test_a_backend_that_is_not_available_gives_its_probe_s_reason(here):
    registry = Registry({"good": f"{here}:Good", "fair": f"{here}:Fair"})
    missing = Probe(backend="good", available=False, reason="install it with: pip install good")
    ranked = registry.rank(artifact(), probes("fair") | {"good": missing}, HARDWARE)
    assert [(c.backend, c.fit.score) for c in ranked] == [("fair", 70), ("good", 0)]
    assert ranked[1].fit.reason == "install it with: pip install good"


def test_a_backend_that_was_not_probed_is_left_out(here):
    registry = Registry({"good": f"{here}:Good", "fair": f"{here}:Fair"})
    ranked = registry.rank(artifact(), probes("fair"), HARDWARE)
    assert [candidate.backend for candidate in ranked] == ["fair"]


def test_a_format_that_nobody_reads_gives_a_reason_each(here):
    registry = Registry({"good": f"{here}:Good", "onnx": f"{here}:OnnxOnly"})
    assert registry.for_format("safetensors") == []
    ranked = registry.rank(artifact("safetensors"), {}, HARDWARE)
    assert {candidate.backend for candidate in ranked} == {"good", "onnx"}
    assert all(c.fit.score == 0 and "not safetensors" in c.fit.reason for c in ranked)


def test_for_format_names_the_backends_that_read_it(here):
    registry = Registry({"onnx": f"{here}:OnnxOnly", "good": f"{here}:Good"})
    assert registry.for_format("gguf") == ["good"]
    assert registry.for_format("ort") == ["onnx"]


# backends that cannot be imported


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no_such_module_at_all:Backend", "ModuleNotFoundError"),
        ("reference_backend:NoSuchClass", "AttributeError"),
        ("reference_backend", "AttributeError"),
        ("", "ValueError"),
    ],
)
def test_a_path_that_leads_nowhere_becomes_a_reason(here, path, why):
    registry = Registry({"broken": path, "good": f"{here}:Good"})
    assert why in registry.broken["broken"] and path in registry.broken["broken"]
    assert list(registry.classes) == ["good"]
    ranked = registry.rank(artifact(), probes("good"), HARDWARE)
    assert [(c.backend, c.fit.score) for c in ranked] == [("good", 90), ("broken", 0)]
    assert ranked[1].fit.reason == registry.broken["broken"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("def (", "SyntaxError"),
        ("import an_engine_that_is_not_installed", "an_engine_that_is_not_installed"),
        ("raise SystemExit('this engine needs a GPU')", "this engine needs a GPU"),
    ],
)
def test_a_plugin_that_fails_at_import_becomes_a_reason(plugin, text, why):
    name = f"broken_plugin_{why.lower().replace(' ', '_')}"
    plugin(name, text)
    registry = Registry({"plugin": f"{name}:Backend"})
    assert why in registry.broken["plugin"]
    assert registry.classes == {}


def test_the_built_in_backends_are_known_and_whole():
    registry = Registry.installed()
    assert set(BUILTIN) <= set(registry.classes)
    assert registry.broken == {}
    for name, path in BUILTIN.items():
        cls = load_class(path)
        assert cls.name == name and cls.formats
        assert registry.paths[name] == path


def test_importing_the_built_in_backends_imports_no_engine():
    program = (
        "import sys\n"
        "from backends.registry import Registry\n"
        "from backends import worker, prober, hardware\n"
        "assert not Registry.installed().broken\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    imported = set(done.stdout.split())
    assert "backends" in imported
    assert not imported & ENGINES


def test_a_class_that_is_no_backend_says_what_it_lacks(plugin):
    plugin("half_a_backend", "class Half:\n    name = 'half'\n    formats = frozenset()\n")
    registry = Registry({"half": "half_a_backend:Half"})
    assert registry.classes == {}
    assert (
        "has no distribution, options, probe, fit, estimate, load, close" in registry.broken["half"]
    )
