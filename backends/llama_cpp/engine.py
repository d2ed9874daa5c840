"""The thread that owns a model's context and generates: one batch after another, over all slots.

Each batch has a token for every answer and fills up with prompts. A request hands over a job and
takes what comes of it from a queue; a job that is cancelled ends between two batches. Knows no
messages and no templates.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from backends.contract import (
    BackendError,
    Cancelled,
    Delta,
    Done,
    Generation,
    Sampling,
)
from backends.llama_cpp.job import Job, Result
from backends.llama_cpp.model import Model
from backends.llama_cpp.sampler import Candidates, Sampler, logprob
from backends.llama_cpp.slots import Prompt, Share, Slot, choose, fill
from backends.room import check_room

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


class Engine:
    """Generates with `model` for up to `slots` requests at once, on a thread of its own.

    `close` it before the model.
    """

    def __init__(self, model: Model, *, slots: int, context_length: int) -> None:
        self._model = model
        self._engine = model.engine
        self._context_length = context_length
        self._slots = [Slot(sequence=sequence) for sequence in range(slots)]
        self._candidates = Candidates(model.vocabulary.size)
        self._batch = self._engine.llama_batch_init(model.batch_tokens, 0, 1)
        self._jobs: dict[int, Job] = {}  # by sequence, the longest running first
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], None], Callable[[BackendError], None]]] = deque()
        self._ended: BackendError | None = None
        self._thread = threading.Thread(target=self._run, name="llama_cpp", daemon=True)
        self._thread.start()

    def generate(self, prompt: Prompt, sampling: Sampling, cancelled: Cancelled) -> Generation:
        """Yield what follows `prompt` and return how it ended. Raises BackendError.

        Ends within one batch of `cancelled()`, also if the caller stops taking deltas.
        """
        check_room(prompt.tokens, sampling, self._context_length)
        sampler = Sampler(self._model.vocabulary, sampling)
        job = Job(prompt, sampling, sampler, cancelled)
        result: Result | None = None
        try:
            self._submit(job)
            while isinstance(result := job.results.get(), Delta):
                yield result
        finally:
            # The prompt and the sampler are in use until the engine says that the job has ended.
            job.abandoned.set()
            while result is None or isinstance(result, Delta):
                result = job.results.get()
            sampler.free()
        if isinstance(result, BackendError):
            raise result
        return result

    def _submit(self, job: Job) -> None:
        with self._changed:
            if self._ended is not None:
                job.results.put(self._ended)
            else:
                self._waiting.append(job)
                self._changed.notify()

    def call(self, work: Callable[[list[Slot]], T]) -> T:
        """Have the engine's thread do `work` on the slots, while no job runs, and wait for it.

        Returns what it returns and raises what it raises; BackendError once the engine has ended.
        """
        future: Future[T] = Future()

        def done_now() -> None:
            try:
                result = work(self._slots)
            except BaseException as error:  # noqa: BLE001  raised again on the caller's thread
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._changed:
            if self._ended is not None:
                raise self._ended
            self._calls.append((done_now, future.set_exception))
            self._changed.notify()
        return future.result()

    def close(self) -> None:
        """End all jobs and the thread. May be called twice."""
        self._end(BackendError("cancelled", "the model is being unloaded"))
        self._thread.join()
        if self._batch is not None:
            self._engine.llama_batch_free(self._batch)
            self._batch = None

    def _end(self, reason: BackendError) -> None:
        with self._changed:
            self._ended = self._ended or reason
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._has_work():
                self._drop_unwanted()
                if not self._read_image():
                    self._step()
        except BaseException:  # noqa: BLE001
            # Nobody knows the state of the engine now. The end of the process is what every request
            # hears of, and what has the model loaded anew.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        with self._changed:
            assert self._ended is not None
            for job in (*self._jobs.values(), *self._waiting):
                job.results.put(self._ended)
            self._waiting.clear()
            for _, fail in self._calls:
                fail(self._ended)
        self._jobs.clear()

    def _has_work(self) -> bool:
        """Wait until there is some and give it to free slots; False once the engine is to end.

        A call waits for the jobs that run, and jobs that wait for the call.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._jobs or self._calls or self._ended
            )
            if self._ended is not None:
                return False
            while self._waiting and len(self._jobs) < len(self._slots) and not self._calls:
                self._admit(self._waiting[0])
                self._waiting.popleft()
            call = self._calls.popleft()[0] if self._calls and not self._jobs else None
        if call is not None:
            call()
        return True

    def _admit(self, job: Job) -> None:
        free = [slot for slot in self._slots if slot.sequence not in self._jobs]
        slot, cached = choose(free, job.prompt)
        cached = self._cut(slot, cached)
        slot.begin(job.prompt, cached)
        slot.last_used = 1 + max(each.last_used for each in self._slots)
        job.begin(cached)
        last = job.prompt.parts[-1]
        assert isinstance(last, list)
        job.sampler.read(last)
        self._jobs[slot.sequence] = job

    def _cut(self, slot: Slot, length: int) -> int:
        """Leave the first `length` tokens of a sequence, or none; return how many are left.

        A recurrent model has one state for all of its past, of which no part can be removed.
        """
        engine, memory = self._engine, self._model.memory
        if not self._has_moved_on(slot, length) and engine.llama_memory_seq_rm(
            memory, slot.sequence, length, -1
        ):
            return length
        engine.llama_memory_seq_rm(memory, slot.sequence, -1, -1)
        return 0

    def _has_moved_on(self, slot: Slot, length: int) -> bool:
        """Say whether a sliding window no longer holds all that the token after `length` looks at.

        That is itself and what is less than the window before it. The engine does not say so: it
        would compute without what is missing.
        """
        window = self._model.window
        if not window or length >= slot.position:
            return False
        first = self._engine.llama_memory_seq_pos_min(self._model.memory, slot.sequence)
        return bool(first > max(0, length - window + 1))

    def _drop_unwanted(self) -> None:
        for sequence, job in list(self._jobs.items()):
            if job.unwanted:
                self._finish(sequence, job.done("cancelled"))

    def _finish(self, sequence: int, result: Done | BackendError) -> None:
        self._slots[sequence].unread.clear()
        self._jobs.pop(sequence).results.put(result)

    def _fail(self, sequence: int, message: str) -> None:
        """End a job that the engine could not compute; nothing is left of its sequence."""
        self._engine.llama_memory_seq_rm(self._model.memory, sequence, -1, -1)
        self._slots[sequence].clear()
        self._finish(sequence, BackendError("engine_error", message))

    def _read_image(self) -> bool:
        """Read the first image that is next in its prompt; say whether there was one."""
        for sequence in self._jobs:
            taken = self._slots[sequence].take_image()
            if taken is not None and self._model.vision is not None:
                image, position = taken
                status = self._model.vision.evaluate(
                    self._model.context,
                    image,
                    position=position,
                    sequence=sequence,
                    batch=self._engine.llama_n_batch(self._model.context),
                )
                if status:
                    self._fail(sequence, f"the engine can't read an image (status {status})")
                return True
        return False

    def _step(self) -> None:
        """Compute one batch and choose a token for every slot that has nothing left to read."""
        shares = fill((self._slots[s] for s in self._jobs), self._model.batch_tokens)
        if not shares:
            return
        answered = self._write_batch(shares)
        status = self._engine.llama_decode(self._model.context, self._batch)
        if status:
            for share in shares:
                self._fail(
                    share.slot.sequence, f"llama.cpp can't compute a batch (status {status})"
                )
            return
        for share, at in answered:
            self._answer(share.slot, self._logits(at))

    def _write_batch(self, shares: list[Share]) -> list[tuple[Share, int]]:
        """Put the shares into the engine's batch; return those that are answered, and where."""
        batch = self._batch
        tokens, positions, outputs = batch.token, batch.pos, batch.logits
        counts, sequences = batch.n_seq_id, batch.seq_id
        answered = []
        at = 0
        for share in shares:
            for offset, token in enumerate(share.tokens):
                tokens[at] = token
                positions[at] = share.position + offset
                counts[at] = 1
                sequences[at][0] = share.slot.sequence
                outputs[at] = 0
                at += 1
            if share.answered:
                outputs[at - 1] = 1
                answered.append((share, at - 1))
        batch.n_tokens = at
        return answered

    def _logits(self, at: int) -> NDArray[np.float32]:
        import numpy as np

        pointer = self._engine.llama_get_logits_ith(self._model.context, at)
        return np.ctypeslib.as_array(pointer, shape=(self._model.vocabulary.size,))

    def _answer(self, slot: Slot, logits: NDArray[np.float32]) -> None:
        """Choose the slot's next token, tell its text, and go on or end."""
        job = self._jobs[slot.sequence]
        vocabulary, sampling = self._model.vocabulary, job.sampling
        if job.count == 0:
            job.prompt_is_read()
        if sampling.max_tokens == 0:
            self._finish(slot.sequence, job.done("length"))
            return
        token = job.sampler.choose(self._candidates, logits)
        if token is None or vocabulary.ends(token):
            self._conclude(slot, job, "stop")
            return
        job.count += 1
        entry = None
        if sampling.logprobs is not None:
            entry = logprob(vocabulary, logits, token, sampling.logprobs)
        job.tell(job.text.feed(vocabulary.piece(token), entry))
        if job.text.stopped:
            self._conclude(slot, job, "stop")
        elif job.count == sampling.max_tokens or slot.used + 1 >= self._context_length:
            self._conclude(slot, job, "length")
        else:
            slot.unread.append([token])

    def _conclude(self, slot: Slot, job: Job, finish_reason: str) -> None:
        job.tell(job.text.flush())
        self._finish(slot.sequence, job.done(finish_reason))
