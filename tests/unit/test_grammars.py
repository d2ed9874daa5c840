"""Bounds for grammars and schemas."""

from __future__ import annotations

import pytest

from backends import grammars
from backends.contract import BackendError


@pytest.mark.parametrize(
    ("grammar", "depth"),
    [("root ::= x", 0), ("root ::= (a) (b)", 1), ("((a) (b (c)))", 3), (")(", 0)],
)
def test_the_depth_of_brackets(grammar, depth):
    assert grammars.nesting(grammar) == depth


def test_repetitions_are_bounded_wherever_they_stand():
    fine = {"properties": {"a": {"type": "string", "maxLength": 10}}, "maxItems": 10}
    grammars.check_repeats(fine, 10)
    grammars.check_repeats({"properties": {"maxLength": {"type": "string"}}}, 10)
    for schema in (
        {"maxItems": 11},
        {"anyOf": [{"type": "null"}, {"properties": {"a": {"minLength": 1e9}}}]},
    ):
        with pytest.raises(BackendError, match="at most 10") as refused:
            grammars.check_repeats(schema, 10)
        assert refused.value.code == "invalid_request"
