"""Texts of requests that arrive together are computed together, those of one length at a time.

Owns what waits, and the one thread that computes. Knows neither engine nor task: a computation
takes texts and gives a row for each. A request that is alone does not wait, and one that is
cancelled or fails does not disturb those that were computed with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from backends.contract import BackendError, Cancelled
from backends.onnx.texts import Text

_POLL_S = 0.05  # how often a waiting request looks whether it was cancelled
_SLACK_TOKENS = 16  # computing these more costs no more than a batch of their own would


class Run(Protocol):
    """One computation; setting `terminate` ends it."""

    terminate: bool


Compute = Callable[[Sequence[Text], Run], Sequence[Any]]


@dataclass(slots=True, eq=False)
class _Job:
    """The texts of one request."""

    rows: list[Any]
    missing: int
    error: BackendError | None = None
    left: bool = False


@dataclass(slots=True, eq=False)
class _Item:
    job: _Job
    index: int
    text: Text


@dataclass(slots=True)
class _Batch:
    items: list[_Item] = field(default_factory=list)
    run: Run | None = None


def choose(lengths: Sequence[int], seed: int, budget: int) -> range:
    """Return which of the sorted `lengths` to compute together, `seed` among them.

    Neighbours join, the most alike first, while all of them, padded to the longest, have at most
    `budget` tokens, and none is much shorter than the longest.
    """
    low, high = seed, seed + 1
    while True:
        options = []
        if low > 0:
            options.append((lengths[low] - lengths[low - 1], low - 1, high))
        if high < len(lengths):
            options.append((lengths[high] - lengths[high - 1], low, high + 1))
        fitting = [
            (start, end)
            for _, start, end in sorted(options)
            if (end - start) * lengths[end - 1] <= budget
            and lengths[end - 1] - lengths[start] <= max(_SLACK_TOKENS, lengths[end - 1] // 4)
        ]
        if not fitting:
            return range(low, high)
        low, high = fitting[0]


class Batches:
    """Computes texts in batches of at most `budget` tokens. `close` ends its thread."""

    def __init__(self, compute: Compute, new_run: Callable[[], Run], budget: int) -> None:
        self._compute = compute
        self._new_run = new_run
        self._budget = budget
        self._changed = threading.Condition()
        self._waiting: list[_Item] = []  # in the order of arrival
        self._batch = _Batch()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="onnx-batches", daemon=True)
        self._thread.start()

    def run(self, texts: Sequence[Text], cancelled: Cancelled) -> list[Any]:
        """Return a row for each text, in their order. Raises BackendError."""
        job = _Job(rows=[None] * len(texts), missing=len(texts))
        with self._changed:
            if self._closed:
                raise _closed()
            self._waiting += [_Item(job, index, text) for index, text in enumerate(texts)]
            self._changed.notify_all()
            while job.missing and job.error is None:
                if cancelled():
                    self._leave(job)
                    raise BackendError("cancelled", "the request was cancelled")
                self._changed.wait(_POLL_S)
        if job.error is not None:
            raise job.error
        return job.rows

    def close(self) -> None:
        """Fail what waits and end the thread."""
        with self._changed:
            self._closed = True
            for item in self._waiting + self._batch.items:
                item.job.error = item.job.error or _closed()
                self._leave(item.job)
            self._changed.notify_all()
        self._thread.join()

    def _leave(self, job: _Job) -> None:
        """Forget a request; end the computation if nobody wants its results any more."""
        job.left = True
        self._waiting = [item for item in self._waiting if item.job is not job]
        if self._batch.run is not None and all(item.job.left for item in self._batch.items):
            self._batch.run.terminate = True

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                batch = self._batch = _Batch(self._take(), self._new_run())
            outcomes = self._outcomes(batch)
            with self._changed:
                self._batch = _Batch()
                for item, outcome in zip(batch.items, outcomes, strict=True):
                    self._settle(item, outcome)
                self._changed.notify_all()

    def _take(self) -> list[_Item]:
        """Take the next batch: around the longest text of the request that came first."""
        first = self._waiting[0].job
        ordered = sorted(self._waiting, key=lambda item: len(item.text.ids))
        seed = max(index for index, item in enumerate(ordered) if item.job is first)
        chosen = choose([len(item.text.ids) for item in ordered], seed, self._budget)
        batch = ordered[chosen.start : chosen.stop]
        taken = {id(item) for item in batch}
        self._waiting = [item for item in self._waiting if id(item) not in taken]
        return batch

    def _outcomes(self, batch: _Batch) -> list[Any]:
        """Return the row of each item, or the BackendError that it failed with."""
        assert batch.run is not None
        try:
            return list(self._compute([item.text for item in batch.items], batch.run))
        except Exception as error:  # noqa: BLE001  engines raise what they like
            if len(batch.items) == 1 or batch.run.terminate:
                return [_failed(error)] * len(batch.items)
        # One of them is to blame: each on its own, so that the others don't pay for it.
        return [self._outcome(item, batch.run) for item in batch.items]

    def _outcome(self, item: _Item, run: Run) -> Any:
        try:
            return self._compute([item.text], run)[0]
        except Exception as error:  # noqa: BLE001  engines raise what they like
            return _failed(error)

    def _settle(self, item: _Item, outcome: Any) -> None:
        if isinstance(outcome, BackendError):
            item.job.error = item.job.error or outcome
            self._leave(item.job)
            return
        item.job.rows[item.index] = outcome
        item.job.missing -= 1


def _closed() -> BackendError:
    return BackendError("engine_error", "the model was unloaded")


def _failed(error: Exception) -> BackendError:
    if isinstance(error, BackendError):
        return error
    return BackendError("engine_error", f"onnxruntime: {error}")
