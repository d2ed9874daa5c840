"""Vectors as bytes."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import vectors
from backends.contract import BackendError


def unpack(packed: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(packed) // 4}f", packed)


def test_a_vector_is_little_endian_float32_of_length_1():
    assert unpack(vectors.pack([3.0, 4.0])) == pytest.approx((0.6, 0.8))


def test_what_is_left_of_a_shortened_vector_has_length_1_again():
    assert unpack(vectors.pack([3.0, 4.0, 12.0], 2)) == pytest.approx((0.6, 0.8))


def test_more_dimensions_than_there_are_is_refused_with_both_numbers():
    with pytest.raises(BackendError, match="dimensions is 3, .* have 2") as refused:
        vectors.pack([1.0, 0.0], 3)
    assert refused.value.code == "invalid_request"


def test_a_vector_of_zeros_stays_one():
    assert unpack(vectors.pack([0.0, 0.0])) == (0.0, 0.0)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50).filter(
        lambda v: any(abs(x) > 1e-3 for x in v)
    )
)
def test_every_vector_has_length_1(values):
    assert math.hypot(*unpack(vectors.pack(values))) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_is_an_error_of_the_engine(number):
    with pytest.raises(BackendError, match="none") as failed:
        vectors.pack([1.0, number])
    assert failed.value.code == "engine_error"
