"""How many connections, how often, and how long: decisions on a clock of their own."""

from __future__ import annotations

import asyncio
import time

import pytest

from daemon.downloads.pace import MAX_CONNECTIONS, Bucket, Climb, Patience, backoff_s


def settle(rate_of, looks=60) -> Climb:
    climb = Climb()
    for _ in range(looks):
        climb.look(rate_of(climb.wanted))
    return climb


@pytest.mark.parametrize(
    ("rate_of", "expected"),
    [
        (lambda n: 50 * n, {MAX_CONNECTIONS}),  # each connection is limited
        (lambda n: 100, {1, 2}),  # the line is full with one
        (lambda n: min(50 * n, 200), {4, 5}),  # it is full with four
    ],
)
def test_so_many_connections_as_help(rate_of, expected):
    assert settle(rate_of).wanted in expected


def test_a_server_that_asks_for_less_gets_half():
    climb = settle(lambda n: 50 * n)
    climb.less()
    assert climb.wanted == MAX_CONNECTIONS // 2
    climb.look(100)
    assert climb.wanted == MAX_CONNECTIONS // 2, "not more at once"


def test_waits_grow_and_differ():
    assert backoff_s(1, lambda: 1.0) == 0.5
    assert backoff_s(4, lambda: 1.0) == 4.0
    assert backoff_s(100, lambda: 1.0) == 30.0
    assert backoff_s(4, lambda: 0.0) == pytest.approx(0.4)
    assert len({backoff_s(4) for _ in range(20)}) > 10


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_patience_ends_without_a_byte_and_begins_anew_with_one():
    clock = Clock()
    patience = Patience(300, 20, began=True, clock=clock)
    clock.now = 299
    assert patience.wait_s(None) is not None
    patience.progress()
    clock.now = 598
    assert patience.wait_s(None) is not None
    clock.now = 600
    assert patience.wait_s(None) is None


def test_who_never_got_a_byte_is_told_soon():
    clock = Clock()
    patience = Patience(300, 20, began=False, clock=clock)
    assert patience.wait_s(None) is not None
    clock.now = 21
    assert patience.wait_s(None) is None


def test_a_server_s_own_word_is_heeded_and_costs_no_patience():
    clock = Clock()
    patience = Patience(300, 20, began=True, clock=clock)
    clock.now = 250
    assert patience.wait_s(120) == 120
    clock.now = 371
    assert patience.wait_s(None) is not None
    assert patience.wait_s(10**9) == 3600


async def test_a_bucket_lets_through_so_much_a_second():
    bucket = Bucket(1_000_000)
    began = time.monotonic()
    for _ in range(10):
        await bucket.take(20_000)
    assert time.monotonic() - began >= 0.19


async def test_a_limit_can_change_while_somebody_waits():
    bucket = Bucket(10)
    taking = asyncio.create_task(bucket.take(10_000_000))
    await asyncio.sleep(0)
    bucket.limit(0)
    await asyncio.wait_for(taking, 5)
    bucket.limit(10)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bucket.take(1000), 0.05)
