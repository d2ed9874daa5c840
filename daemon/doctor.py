"""The doctor's report: what this computer is, what runs on it where and why, what would help. Pure.

Knows neither HTTP nor how the facts are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from backends.advice import advice
from backends.contract import Hardware, Probe
from daemon.units import size

_THERE = ("loading", "ready")
_ELSEWHERE = "remote"  # the backend that needs no engine: it asks other computers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One downloaded model: what a load of it would be, or in `problem` why there can be none.

    `parts` are bytes of RAM by purpose, `gpu_parts` those of each GPU's own memory.
    """

    unique: str
    state: str
    problem: str = ""
    backend: str = ""
    reason: str = ""
    placement: str = ""
    gpu_layers: int = 0
    threads: int = 0
    context_length: int = 0
    slots: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    gpu_parts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the report is made of.

    `budget_bytes` is what all models together may take, `available_bytes` what another load may
    take now. `pressure_percent` is the part of the time in which programs wait for memory, None
    where that is not told.
    """

    version: str
    running: bool
    hardware: Hardware
    probes: Sequence[Probe]
    models: Sequence[ModelFacts]
    budget_bytes: int
    available_bytes: int
    pressure_percent: float | None = None


def report(facts: Facts) -> dict[str, Any]:
    """Return the report as JSON data.

    `ok` says whether anything can run here. `models[].fits` is `now`, `alone` (once other models
    and programs have given memory back) or `never`.
    """
    models = [_model(facts, model) for model in facts.models]
    engines = [probe for probe in facts.probes if probe.available and probe.backend != _ELSEWHERE]
    return {
        "ok": bool(engines) or any(not model["problem"] for model in models),
        "version": facts.version,
        "running": facts.running,
        "hardware": asdict(facts.hardware),
        "memory": {
            "budget_bytes": facts.budget_bytes,
            "available_bytes": facts.available_bytes,
            "pressure_percent": facts.pressure_percent,
        },
        "engines": [asdict(probe) for probe in facts.probes],
        "models": models,
        "advice": [
            *_about_engines(facts, bool(engines)),
            *advice(facts.hardware, facts.probes, pressure_percent=facts.pressure_percent),
            *_about_models(facts, models),
        ],
    }


def _model(facts: Facts, model: ModelFacts) -> dict[str, Any]:
    need = sum(model.parts.values())
    problem, fits = model.problem, ""
    if not problem:
        there = model.state in _THERE
        fits = "now" if there or need <= facts.available_bytes else "alone"
        if need > facts.budget_bytes and not there:
            fits = "never"
            problem = (
                f"it needs {size(need)}, and all models together may take "
                f"{size(facts.budget_bytes)}"
            )
    return asdict(model) | {"need_bytes": need, "fits": fits, "problem": problem}


def _about_engines(facts: Facts, works: bool) -> list[str]:  # noqa: FBT001
    if works:
        return []
    missing = [probe for probe in facts.probes if not probe.available]
    return ["no engine works, so no model can run here: install one", *(p.reason for p in missing)]


def _about_models(facts: Facts, models: Sequence[dict[str, Any]]) -> list[str]:
    texts = []
    never = [model["unique"] for model in models if model["fits"] == "never"]
    if never:
        texts.append(
            f"{', '.join(never)}: too large for the {size(facts.budget_bytes)} that models may "
            "take: use a smaller quantization or a smaller context_length, or raise [memory] limit"
        )
    later = [model["unique"] for model in models if model["fits"] == "alone"]
    if later:
        texts.append(
            f"{', '.join(later)}: only {size(facts.available_bytes)} is free for models now: "
            "unload others or close programs first"
        )
    return texts
