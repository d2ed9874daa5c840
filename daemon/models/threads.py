"""How many threads a model computes with. Pure.

Engines wait for each other's threads at every step of a token, so threads beyond the cores cost far
more than they bring: on 2 cores, two models of 2 threads each made 8 to 15 tokens a second
together, and of 1 thread each 66 to 91 (SmolLM2-135M, xllamacpp). An engine's threads are fixed
when a model is loaded. Only models that compute at that moment are counted: an idle one costs
nothing, and would halve the speed of one that works for as long as that stays loaded.
"""

from __future__ import annotations


def threads(physical_cores: int, models: int, *, background: bool = False) -> int:
    """Return the threads for one of `models` that compute at the same time.

    `physical_cores` is what this process may use. A model that is asked in the background only gets
    half of its share. Never less than 1, nor more than the cores.
    """
    share = max(1, physical_cores // max(1, models))
    return max(1, share // 2) if background else share
