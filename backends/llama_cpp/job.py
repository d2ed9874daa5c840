"""One generation on its way between the request that asked for it and the engine's thread."""

from __future__ import annotations

import queue
import threading
import time

from backends.contract import (
    BackendError,
    Cancelled,
    Delta,
    Done,
    Sampling,
    Timings,
    Usage,
)
from backends.llama_cpp.answer import AnswerText
from backends.llama_cpp.sampler import Sampler
from backends.llama_cpp.slots import Prompt

Result = Delta | Done | BackendError


class Job:
    """One generation, from its prompt to its end.

    The engine's thread alone changes it; `results` and `abandoned` are what it has in common with
    the request's. The last of the results is a Done or a BackendError.
    """

    def __init__(
        self, prompt: Prompt, sampling: Sampling, sampler: Sampler, cancelled: Cancelled
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.sampler = sampler
        self.cancelled = cancelled
        self.abandoned = threading.Event()
        self.results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self.text = AnswerText(sampling.stop)
        self.cached = 0
        self.count = 0
        self._started_s = self._read_s = 0.0

    def begin(self, cached: int) -> None:
        """Start the clock; so many tokens of the prompt need not be read."""
        self.cached = cached
        self._started_s = time.monotonic()

    def prompt_is_read(self) -> None:
        """Tell the time of reading from that of writing."""
        self._read_s = time.monotonic()

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for the rest any more."""
        return self.abandoned.is_set() or self.cancelled()

    def tell(self, delta: Delta | None) -> None:
        """Hand over a piece of the answer, if it is one."""
        if delta is not None:
            self.results.put(delta)

    def done(self, finish_reason: str) -> Done:
        """Return the end of the answer as it is now, and what it cost."""
        now_s = time.monotonic()
        read_s = self._read_s or now_s
        return Done(
            finish_reason=finish_reason,
            usage=Usage(
                prompt_tokens=self.prompt.tokens,
                completion_tokens=self.count,
                cached_tokens=self.cached,
            ),
            timings=Timings(
                prompt_ms=(read_s - self._started_s) * 1e3, predicted_ms=(now_s - read_s) * 1e3
            ),
            stopped_by=self.text.stopped_by,
        )
