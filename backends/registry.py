"""Which backends there are, and which one suits a model best.

Owns the built-in table and the entry-point group `modeld.backends`. Importing a backend's module
imports no engine, so the daemon can ask each class for `fit` and `estimate`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

from backends.contract import Artifact, Backend, Fit, Hardware, Probe

ENTRY_POINT_GROUP = "modeld.backends"
# What every backend has; the methods for its tasks come on top.
_MEMBERS = (
    *("name", "formats", "distribution", "options"),
    *("probe", "fit", "estimate", "load", "close"),
)
BUILTIN = {
    "xllamacpp": "backends.xllamacpp:Xllamacpp",
    "llama_cpp": "backends.llama_cpp:LlamaCpp",
    "onnx": "backends.onnx:Onnx",
    "ctransformers": "backends.ctransformers:CTransformers",
    "remote": "backends.remote:Remote",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What one backend says of running a model here."""

    backend: str
    fit: Fit


def load_class(path: str) -> type[Backend]:
    """Return the class at `module:Class`. Raises whatever its import raises."""
    module, _, name = path.partition(":")
    cls: type[Backend] = getattr(importlib.import_module(module), name)
    return cls


def _fit(cls: type[Backend], artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
    """Ask a backend how well it suits; a fault of a plugin's costs itself alone."""
    try:
        return cls.fit(artifact, probe, hardware)
    except Exception as error:  # noqa: BLE001  plugins fail as they like
        return Fit(score=0, reason=f"its fit failed: {type(error).__name__}: {error}")


class Registry:
    """The backends known to this installation, by name. `paths` maps a name to `module:Class`.

    A backend whose module can't be imported is kept as a reason in `broken`.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.paths = dict(paths)
        self.classes: dict[str, type[Backend]] = {}
        self.broken: dict[str, str] = {}
        for name, path in self.paths.items():
            try:
                cls = load_class(path)
            except (Exception, SystemExit) as error:  # noqa: BLE001  plugins fail as they like
                self.broken[name] = f"{path} cannot be imported: {type(error).__name__}: {error}"
                continue
            lacking = [member for member in _MEMBERS if not hasattr(cls, member)]
            if lacking:
                self.broken[name] = f"{path} is no backend: it has no {', '.join(lacking)}"
            else:
                self.classes[name] = cls

    @classmethod
    def installed(cls) -> Registry:
        """Return the registry of the built-in backends and the installed plugins."""
        plugins = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
        return cls(plugins | BUILTIN)

    def for_format(self, model_format: str) -> list[str]:
        """Return the names of the backends that read `model_format`, such as `gguf`."""
        return [name for name, cls in self.classes.items() if model_format in cls.formats]

    def rank(
        self, artifact: Artifact, probes: Mapping[str, Probe], hardware: Hardware
    ) -> list[Candidate]:
        """Return every backend with its fit for `artifact`, the best first; score 0 can't run it.

        `probes` holds what is known; a backend that reads the format and has no probe is left out.
        """
        candidates = []
        for name, cls in self.classes.items():
            if artifact.format not in cls.formats:
                reads = ", ".join(sorted(cls.formats))
                fit = Fit(score=0, reason=f"reads {reads}, not {artifact.format}")
            elif name not in probes:
                continue
            elif not probes[name].available:
                fit = Fit(score=0, reason=probes[name].reason)
            else:
                fit = _fit(cls, artifact, probes[name], hardware)
            candidates.append(Candidate(backend=name, fit=fit))
        candidates += [
            Candidate(backend=name, fit=Fit(score=0, reason=reason))
            for name, reason in self.broken.items()
        ]
        return sorted(candidates, key=lambda candidate: -candidate.fit.score)
