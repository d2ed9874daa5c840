"""Batching: which texts are computed together, and that requests do not disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from backends.contract import BackendError
from backends.onnx.batches import Batches, choose
from backends.onnx.texts import Text

PATIENCE_S = 10.0


@pytest.mark.parametrize(
    ("lengths", "seed", "budget", "expected"),
    [
        ([5], 0, 0, range(1)),  # a single text is computed, whatever its length
        ([5, 5, 5], 1, 0, range(1, 2)),
        ([5, 5, 5, 5], 3, 15, range(1, 4)),
        ([5, 6, 7, 8], 0, 1000, range(4)),
        ([5, 6, 7, 100], 0, 1000, range(3)),  # padding 5 to 100 is a waste
        ([5, 6, 7, 100], 3, 1000, range(3, 4)),
        ([80, 90, 100], 2, 1000, range(3)),
        ([80, 90, 100], 2, 250, range(1, 3)),
        ([10, 10, 10, 11], 1, 30, range(3)),  # the most alike first
    ],
)
def test_neighbours_join_while_they_fit(lengths, seed, budget, expected):
    assert choose(lengths, seed, budget) == expected


class Engine:
    """Computes the sum of a text's tokens; holds each batch back until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.runs: list[Any] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def new_run(self) -> Any:
        run = SimpleNamespace(terminate=False)
        self.runs.append(run)
        return run

    def compute(self, texts, run) -> list[int]:
        self.batches.append([len(text.ids) for text in texts])
        self.started.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        if any(-1 in text.ids for text in texts):
            raise RuntimeError("a token of -1")
        return [sum(text.ids) for text in texts]


def text(*ids: int) -> Text:
    return Text(list(ids), [0] * len(ids))


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def batches(engine):
    made = Batches(engine.compute, engine.new_run, 64)
    yield made
    for _ in range(100):
        engine.gate.release()
    made.close()


@pytest.fixture
def ask(batches, engine):
    """`ask(texts)` runs a request on a thread and returns once its texts are there."""
    with ThreadPoolExecutor(16) as threads:

        def start(*texts: Text, cancelled: Callable[[], bool] = lambda: False):
            before = len(batches._waiting) + len(batches._batch.items)
            future = threads.submit(batches.run, texts, cancelled)
            with batches._changed:
                assert batches._changed.wait_for(
                    lambda: (
                        len(batches._waiting) + len(batches._batch.items) > before or future.done()
                    ),
                    PATIENCE_S,
                )
            return future

        yield start
        for _ in range(100):
            engine.gate.release()


def started(engine) -> None:
    assert engine.started.acquire(timeout=PATIENCE_S)


def test_a_request_alone_is_computed_at_once(engine, ask):
    future = ask(text(1, 2))
    started(engine)
    engine.gate.release()
    assert future.result(PATIENCE_S) == [3]


def test_what_arrives_meanwhile_is_computed_together_in_order(engine, ask):
    first = ask(text(1))
    started(engine)
    others = [ask(text(n), text(n, n, n)) for n in range(2, 6)]
    for _ in range(3):
        engine.gate.release()
    assert first.result(PATIENCE_S) == [1]
    assert [other.result(PATIENCE_S) for other in others] == [[n, 3 * n] for n in range(2, 6)]
    assert engine.batches == [[1], [1, 1, 1, 1, 3, 3, 3, 3]]


def test_the_first_to_come_is_in_the_next_batch(engine, ask):
    ask(text(1))
    started(engine)
    long = ask(text(*[1] * 60))
    short = ask(*[text(1)] * 40)
    engine.gate.release()
    started(engine)
    assert engine.batches[1] == [60]
    engine.gate.release()
    assert long.result(PATIENCE_S) == [60]
    engine.gate.release()
    assert short.result(PATIENCE_S) == [1] * 40


def test_one_that_fails_does_not_take_the_others_with_it(engine, ask):
    ask(text(1))
    started(engine)
    good, bad, fine = ask(text(2)), ask(text(3), text(-1)), ask(text(4))
    for _ in range(9):
        engine.gate.release()
    assert good.result(PATIENCE_S) == [2] and fine.result(PATIENCE_S) == [4]
    with pytest.raises(BackendError, match="a token of -1") as error:
        bad.result(PATIENCE_S)
    assert error.value.code == "engine_error"


def test_a_cancelled_request_ends_at_once_and_the_others_go_on(engine, ask):
    cancel = threading.Event()
    first = ask(text(1))
    started(engine)
    gone = ask(text(2), cancelled=cancel.is_set)
    stays = ask(text(3))
    cancel.set()
    with pytest.raises(BackendError) as error:
        gone.result(PATIENCE_S)
    assert error.value.code == "cancelled"
    for _ in range(2):
        engine.gate.release()
    assert first.result(PATIENCE_S) == [1] and stays.result(PATIENCE_S) == [3]
    assert engine.batches == [[1], [1]]  # what was cancelled was not computed


def test_a_computation_that_nobody_waits_for_is_ended(engine, ask):
    one, two = threading.Event(), threading.Event()
    ask(text(0))
    started(engine)
    a, b = ask(text(1), cancelled=one.is_set), ask(text(2), cancelled=two.is_set)
    engine.gate.release()
    started(engine)
    one.set()
    assert isinstance(a.exception(PATIENCE_S), BackendError)
    assert engine.runs[1].terminate is False
    two.set()
    assert isinstance(b.exception(PATIENCE_S), BackendError)
    assert engine.runs[1].terminate is True


def test_closing_fails_what_waits(engine, batches, ask):
    running = ask(text(1))
    started(engine)
    waiting = ask(text(2))
    closing = threading.Thread(target=batches.close)
    closing.start()
    for future in (running, waiting):
        error = future.exception(PATIENCE_S)
        assert isinstance(error, BackendError) and "unloaded" in error.message
    engine.gate.release()
    closing.join(PATIENCE_S)
    with pytest.raises(BackendError, match="unloaded"):
        batches.run([text(3)], lambda: False)
