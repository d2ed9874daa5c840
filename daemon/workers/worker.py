"""The parent's handle on one loaded model: load, requests by id, crash or stop.

Owns what is in flight on the channel. Knows nothing of models' states or of memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from backends import contract, wire
from daemon import errors
from daemon.workers.child import Child, describe_exit

_CANCEL_GRACE_S = 20.0  # a prefill batch takes at most 1 s; a worker that needs this is stuck
_STOP_GRACE_S = 2.0
_EXIT_GRACE_S = 5.0  # between the end of its channel and the end of a process
log = logging.getLogger(__name__)

Answer = contract.Answer
Saved = tuple[contract.SavedConversation, ...]
_MESSAGES: dict[type[contract.Request], type[wire.Ask]] = {
    contract.ChatRequest: wire.Chat,
    contract.CompleteRequest: wire.Complete,
    contract.EmbedRequest: wire.Embed,
    contract.RerankRequest: wire.Rerank,
    contract.ClassifyRequest: wire.Classify,
    contract.CountRequest: wire.Count,
}


def error_from(code: str, message: str, tokens: int | None = None) -> errors.ModeldError:
    """Return the daemon's error for what a backend reported; `tokens` is a prompt's length."""
    kinds: dict[str, type[errors.ModeldError]] = {
        cls.code: cls
        for cls in (
            errors.InvalidRequest,
            errors.ContextLengthExceeded,
            errors.LoadFailed,
            errors.QueueFull,
            errors.EngineError,
        )
    }
    kind = kinds.get(code, errors.EngineError)
    if kind is errors.ContextLengthExceeded:
        return errors.ContextLengthExceeded(message, tokens=tokens)
    return kind(message, retry_after_s=5 if kind is errors.QueueFull else None)


class Request:
    """One request in flight. `finished` is done once the worker's slot is free again."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Answer | errors.ModeldError] = asyncio.Queue()
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish(self, last: Answer | errors.ModeldError) -> None:
        """Deliver the last answer. Whoever takes it finds the slot free already."""
        if not self.finished.done():
            self.finished.set_result(None)
        self.answers.put_nowait(last)


class Worker:
    """One model in one process. Make it with `start`, then `load` once.

    `ended` gives None for a stop that was asked for, and the error for a crash.
    """

    def __init__(self, child: Child, name: str) -> None:
        self._child = child
        self.name = name
        self.pid = child.pid
        self._requests: dict[int, Request] = {}
        self._saves: dict[int, asyncio.Future[Saved]] = {}
        self._ids = itertools.count(1)
        self._loaded: asyncio.Future[contract.LoadedModel] = (
            asyncio.get_running_loop().create_future()
        )
        self._progress: Callable[[float], None] = lambda _: None
        self._stop_reason = ""
        self._listen_task = asyncio.create_task(self._listen())
        self.ended: asyncio.Task[errors.ModeldError | None] = asyncio.create_task(self._end())

    @classmethod
    async def start(cls, backend_path: str, *, name: str, scratch: Path) -> Worker:
        """Start a worker for the backend at `module:Class`. Raises OSError."""
        arguments = ["-m", "backends.worker", f"--backend={backend_path}"]
        child = await Child.start(arguments, union=wire.FromWorker, name=name, cwd=scratch)
        return cls(child, name)

    async def load(
        self, spec: contract.LoadSpec, *, timeout_s: float, progress: Callable[[float], None]
    ) -> contract.LoadedModel:
        """Load the model.

        Raises LoadFailed, LoadTimeout, WorkerCrashed, and Conflict if the worker was stopped. The
        caller stops a worker that did not load.
        """
        self._progress = progress
        self._child.send(wire.Load(spec=spec))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._loaded)
        except TimeoutError:
            raise errors.LoadTimeout(
                f"{self.name} was not loaded within {timeout_s:.0f} s ([models] load_timeout_s)"
            ) from None

    def first_complaint(self) -> str:
        """Return the first line of the engine's output that speaks of an error, once it is over."""
        return self._child.first_complaint()

    def submit(self, request: contract.Request) -> tuple[int, Request]:
        """Send a request. The caller keeps within the model's slots."""
        request_id = next(self._ids)
        entry = self._requests[request_id] = Request()
        message = _MESSAGES[type(request)]
        self._child.send(message(id=request_id, request=request))  # type: ignore[arg-type]
        if self._child.exited.done():
            self._fail(request_id, self._ending())
        return request_id, entry

    @staticmethod
    async def answers(request: Request) -> AsyncIterator[Answer]:
        """Yield the request's deltas, then its result. Raises ModeldError.

        Whoever stops iterating early must call `cancel`.
        """
        while True:
            answer = await request.answers.get()
            if isinstance(answer, errors.ModeldError):
                raise answer
            yield answer
            if not isinstance(answer, contract.Delta):
                return

    async def cancel(self, request_id: int) -> None:
        """End a request and wait until its slot is free. A worker that ignores it is killed."""
        request = self._requests.get(request_id)
        if request is None:
            return
        self._child.send(wire.Cancel(id=request_id))
        done, _ = await asyncio.wait([request.finished], timeout=_CANCEL_GRACE_S)
        if not done:
            log.error("model=%s pid=%d ignores a cancel, killed", self.name, self.pid)
            self._child.kill()
            await asyncio.wait([self.ended])

    async def save_state(self, folder: Path, *, limit_bytes: int, timeout_s: float) -> Saved:
        """Have the conversations written into `folder`, at most `limit_bytes` together.

        To be called when no request is in flight. Raises EngineError, also after `timeout_s`, and
        WorkerCrashed or Conflict if the worker ends.
        """
        save_id = next(self._ids)
        saved: asyncio.Future[Saved] = asyncio.get_running_loop().create_future()
        self._saves[save_id] = saved
        try:
            self._child.send(
                wire.SaveState(id=save_id, folder=str(folder), limit_bytes=limit_bytes)
            )
            if self._child.exited.done():
                raise self._ending()
            async with asyncio.timeout(timeout_s):
                return await saved
        except TimeoutError:
            raise errors.EngineError(
                f"{self.name} did not save its conversations within {timeout_s:g} s"
            ) from None
        finally:
            del self._saves[save_id]

    async def stop(self, reason: str) -> None:
        """End the process. Requests in flight fail with a Conflict that gives `reason`."""
        self._stop_reason = self._stop_reason or reason
        await self._child.stop(wire.Shutdown(), grace_s=_STOP_GRACE_S)
        await asyncio.shield(self.ended)

    def kill(self, reason: str) -> None:
        """End the process at once, for a load that nobody wants any more."""
        self._stop_reason = self._stop_reason or reason
        self._child.kill()

    async def _listen(self) -> None:
        async for message in self._child.messages():
            match message:
                case wire.Progress():
                    self._progress(message.fraction)
                case wire.Loaded() if not self._loaded.done():
                    self._loaded.set_result(message.model)
                case wire.Error(id=None) if not self._loaded.done():
                    self._loaded.set_exception(error_from(message.code, message.message))
                case _:
                    self._hear(message)
        # Its channel has ended, so it can't be asked anything any more.
        done, _ = await asyncio.wait([self._child.exited], timeout=_EXIT_GRACE_S)
        if not done:
            self._child.kill()

    def _hear(self, message: wire.FromWorker) -> None:
        """Take what belongs to one request; what nobody waits for any more is let go."""
        match message:
            case wire.Delta() if message.id in self._requests:
                self._requests[message.id].answers.put_nowait(message.delta)
            case (
                wire.Done() | wire.Embedded() | wire.Reranked() | wire.Classified() | wire.Counted()
            ) if message.id in self._requests:
                self._requests.pop(message.id).finish(message.result)
            case wire.StateSaved() if message.id in self._saves:
                saving = self._saves[message.id]
                if not saving.done():  # it may have been given up this moment
                    saving.set_result(message.conversations)
            case wire.Error(id=int() as request_id):
                self._fail(request_id, error_from(message.code, message.message, message.tokens))
            case _:
                log.debug("model=%s said %r", self.name, message)

    def _fail(self, request_id: int, error: errors.ModeldError) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.finish(error)
        saving = self._saves.get(request_id)
        if saving is not None and not saving.done():
            saving.set_exception(error)

    def _ending(self) -> errors.ModeldError:
        """Return what requests are told that the worker's end cut short."""
        status = self._child.exited.result()
        if self._stop_reason:
            return errors.Conflict(f"{self.name}: {self._stop_reason}")
        words = self._child.last_line()
        said = f"; its last words: {words}" if words else ""
        return errors.WorkerCrashed(
            f"the worker that held {self.name} crashed ({describe_exit(status)}){said}"
        )

    async def _end(self) -> errors.ModeldError | None:
        """Wait for the end; fail what is in flight; return the error if it was a crash."""
        await asyncio.shield(self._child.exited)
        await asyncio.wait([self._listen_task])
        if broken := self._listen_task.exception():
            log.error("model=%s %s", self.name, broken)
        error = self._ending()
        if not self._loaded.done():
            self._loaded.set_exception(error)
            self._loaded.exception()  # `load` may have given up: then nobody asks
        for request_id in [*self._requests, *self._saves]:
            self._fail(request_id, error)
        return None if self._stop_reason else error
