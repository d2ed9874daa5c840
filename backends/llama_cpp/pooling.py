"""Texts to vectors or scores, for models that pool: whole texts in batches, over all requests.

Whichever request's thread has its turn computes a batch for all who wait. Knows no texts, only
their tokens.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Sequence

from backends.contract import BackendError, Cancelled
from backends.llama_cpp.model import MAX_TEXTS, Model

_ABORTED = 2  # llama.h: what llama_decode returns when its abort callback said so


class _Job:
    """The texts of one request, and what has become of them."""

    def __init__(self, texts: Sequence[list[int]], cancelled: Cancelled) -> None:
        self.texts = texts
        self.cancelled = cancelled
        self.outputs: dict[int, list[float]] = {}
        self.error: BackendError | None = None

    @property
    def over(self) -> bool:
        return self.error is not None or len(self.outputs) == len(self.texts)


class Pooler:
    """Computes with `model`, whose context nothing else may use. Thread-safe.

    `outputs` is how many numbers there are for a text.
    """

    def __init__(self, model: Model, outputs: int) -> None:
        self._model = model
        self._engine = model.engine
        self._outputs = outputs
        self._batch = self._engine.llama_batch_init(model.batch_tokens, 0, 1)
        self._mutex = threading.Lock()
        self._turn = threading.Lock()
        self._waiting: deque[tuple[_Job, int]] = deque()
        self._computing: list[tuple[_Job, int]] = []
        self._closed = False
        # Called for every node of a graph: little beside what a node of a batch costs.
        self._abort = self._engine.ggml_abort_callback(self._is_unwanted)
        self._engine.llama_set_abort_callback(model.context, self._abort, None)

    def _is_unwanted(self, _: object) -> bool:
        return all(job.cancelled() for job, _ in self._computing)

    def pool(self, texts: Sequence[list[int]], cancelled: Cancelled) -> list[list[float]]:
        """Return the model's numbers for each of `texts`, which must all fit a batch.

        Raises BackendError, with code `cancelled` soon after `cancelled()` is true.
        """
        job = _Job(texts, cancelled)
        with self._mutex:
            self._waiting += ((job, at) for at in range(len(texts)))
        while not job.over:
            with self._turn:
                if job.over:
                    break
                if self._closed or cancelled():
                    self._fail([job], BackendError("cancelled", "the request was cancelled"))
                else:
                    self._compute()
        if job.error is not None:
            raise job.error
        return [job.outputs[at] for at in range(len(texts))]

    def _fail(self, jobs: list[_Job], error: BackendError) -> None:
        with self._mutex:
            for job in jobs:
                job.error = error
            self._waiting = deque(item for item in self._waiting if item[0].error is None)

    def _compute(self) -> None:
        """Compute the texts that have waited longest and fit a batch; all hear if that fails."""
        self._computing = self._take()
        try:
            self._compute_batch()
        except Exception as error:  # noqa: BLE001  each of them is owed an end
            traceback.print_exc()
            jobs = [job for job, _ in self._computing]
            self._fail(jobs, BackendError("engine_error", f"llama_cpp: {error!r}"))

    def _compute_batch(self) -> None:
        self._write_batch()
        status = self._engine.llama_decode(self._model.context, self._batch)
        if self._model.memory:
            self._engine.llama_memory_clear(self._model.memory, False)
        jobs = [job for job, _ in self._computing]
        if status == _ABORTED:
            self._fail(jobs, BackendError("cancelled", "the request was cancelled"))
        elif status:
            message = f"llama.cpp can't compute a batch (status {status})"
            self._fail(jobs, BackendError("engine_error", message))
        else:
            for sequence, (job, at) in enumerate(self._computing):
                found = self._engine.llama_get_embeddings_seq(self._model.context, sequence)
                job.outputs[at] = found[: self._outputs]

    def _take(self) -> list[tuple[_Job, int]]:
        taken: list[tuple[_Job, int]] = []
        room = self._model.batch_tokens
        with self._mutex:
            while self._waiting and len(taken) < MAX_TEXTS:
                job, at = self._waiting[0]
                room -= len(job.texts[at])
                if room < 0:
                    break
                taken.append(self._waiting.popleft())
        return taken

    def _write_batch(self) -> None:
        batch = self._batch
        tokens, positions, outputs = batch.token, batch.pos, batch.logits
        counts, sequences = batch.n_seq_id, batch.seq_id
        at = 0
        for sequence, (job, index) in enumerate(self._computing):
            for position, token in enumerate(job.texts[index]):
                tokens[at] = token
                positions[at] = position
                counts[at] = 1
                sequences[at][0] = sequence
                outputs[at] = 1
                at += 1
        batch.n_tokens = at

    def close(self) -> None:
        """End what waits. May be called twice."""
        with self._turn:
            self._closed = True
            if self._batch is not None:
                self._engine.llama_batch_free(self._batch)
                self._batch = None
