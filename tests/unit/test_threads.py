"""How many threads a model computes with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.models.threads import threads


@pytest.mark.parametrize(
    ("cores", "models", "alone", "behind"),
    [(8, 1, 8, 4), (8, 2, 4, 2), (8, 3, 2, 1), (2, 1, 2, 1), (2, 2, 1, 1), (1, 1, 1, 1),
     (4, 9, 1, 1)],
)  # fmt: skip
def test_models_that_run_at_once_share_the_cores(cores, models, alone, behind):
    assert threads(cores, models) == alone
    assert threads(cores, models, background=True) == behind


@given(st.integers(1, 256), st.integers(0, 300), st.booleans())
def test_never_more_than_the_cores_and_never_none(cores, models, background):
    found = threads(cores, models, background=background)
    assert 1 <= found <= cores
    assert models > cores or found * models <= cores
    assert found <= threads(cores, models)
