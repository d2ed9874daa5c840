"""Whether a prompt and its answer fit the context."""

from __future__ import annotations

import pytest

from backends.contract import BackendError, Sampling
from backends.room import check_room, context_exceeded

WHOLE = Sampling(max_tokens=100, whole=True)


@pytest.mark.parametrize(
    ("tokens", "sampling"),
    [
        (511, Sampling()),
        (511, Sampling(max_tokens=100)),
        (511, Sampling(whole=True)),
        (412, WHOLE),
        (511, Sampling(max_tokens=0, whole=True)),
    ],
)
def test_what_fits_is_no_error(tokens, sampling):
    check_room(tokens, sampling, 512)


@pytest.mark.parametrize(
    ("tokens", "sampling", "told"), [(512, Sampling(), 512), (600, WHOLE, 600), (413, WHOLE, 413)]
)
def test_what_does_not_fit_tells_its_tokens(tokens, sampling, told):
    with pytest.raises(BackendError) as error:
        check_room(tokens, sampling, 512)
    assert error.value.code == "context_length_exceeded" and error.value.tokens == told
    assert str(tokens) in error.value.message and "512" in error.value.message


def test_both_numbers_are_told():
    error = context_exceeded(700, 512)
    assert error.tokens == 700 and "700 tokens" in error.message and "512" in error.message
