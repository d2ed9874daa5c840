"""How long a model that crashes is left alone before it is loaded again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.models.resident import crash_delay


@pytest.mark.parametrize("crashes", [[], [100.0], [99.0, 100.0], [100.0, 100.0]])
def test_two_crashes_a_minute_cost_nothing(crashes):
    assert crash_delay(crashes, 100.0) == 0


@pytest.mark.parametrize(
    ("count", "delay"), [(3, 1), (4, 2), (5, 4), (6, 8), (7, 16), (8, 30), (9, 30), (16, 30)]
)
def test_from_the_third_the_delay_doubles_up_to_30_s(count, delay):
    assert crash_delay([100.0] * count, 100.0) == delay


def test_the_delay_runs_from_the_last_crash():
    crashes = [90.0, 95.0, 99.0, 100.0]
    assert crash_delay(crashes, 100.0) == 2.0
    assert crash_delay(crashes, 101.5) == 0.5
    assert crash_delay(crashes, 102.0) == 0.0
    assert crash_delay(crashes, 110.0) == 0.0


def test_crashes_of_more_than_a_minute_ago_are_forgotten():
    assert crash_delay([0.0, 1.0, 100.0], 100.0) == 0
    assert crash_delay([40.0, 70.0, 100.0], 100.0) == 0  # 40 is a whole minute ago
    assert crash_delay([40.1, 70.0, 100.0], 100.0) == 1
    assert crash_delay([100.0] * 9, 160.0) == 0


@given(st.lists(st.floats(0, 200), max_size=16).map(sorted), st.floats(0, 60))
def test_the_delay_is_never_negative_and_never_over_30_s(crashes, later):
    now = (crashes[-1] if crashes else 0) + later
    assert 0 <= crash_delay(crashes, now) <= 30
