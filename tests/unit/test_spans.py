"""Sets of positions, against Python's own sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.downloads.spans import Spans

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=12)


@given(RANGES, st.integers(0, 60), st.tuples(st.integers(0, 40), st.integers(0, 10)))
def test_they_are_sets(ranges, size, asked):
    spans, positions = Spans(), set[int]()
    for start, length in ranges:
        spans.add(start, start + length)
        positions |= set(range(start, start + length))
    listed = list(spans)
    assert {at for start, end in listed for at in range(start, end)} == positions
    assert all(
        a_end < b_start for (_, a_end), (b_start, _) in zip(listed, listed[1:], strict=False)
    )
    assert spans.total == len(positions)
    missing = {at for start, end in spans.missing(size) for at in range(start, end)}
    assert missing == set(range(size)) - positions
    start, end = asked[0], sum(asked)
    assert spans.covers(start, end) == (set(range(start, end)) <= positions)
    assert set(range(spans.prefix())) <= positions and spans.prefix() not in positions
    assert Spans(listed) == spans == spans.copy()


def test_a_copy_is_one_s_own():
    one = Spans([(0, 5)])
    other = one.copy()
    other.add(5, 9)
    assert list(one) == [(0, 5)] and list(other) == [(0, 9)]


@pytest.mark.parametrize("wrong", [(-1, 3), (4, 3)])
def test_what_is_no_range_is_refused(wrong):
    with pytest.raises(ValueError, match="no range"):
        Spans().add(*wrong)
