"""Child main: one loaded model behind one channel.

Owns the threads that run requests, and has no queue: the daemon never sends more requests than the
model has slots, and a surplus is an error. Knows no engine, only the Backend contract.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from backends import wire
from backends.child import Channel, attach
from backends.contract import (
    Backend,
    BackendError,
    Classes,
    Delta,
    LoadSpec,
    Scores,
    Task,
    TokenLogprob,
    needed_task,
)
from backends.registry import load_class

_LARGEST = 3.4e38  # about that of a float32
_RESULTS: dict[type[wire.Message], type[wire.Message]] = {
    wire.Chat: wire.Done,
    wire.Complete: wire.Done,
    wire.Embed: wire.Embedded,
    wire.Rerank: wire.Reranked,
    wire.Classify: wire.Classified,
    wire.Count: wire.Counted,
}


def sayable(text: str) -> str:
    """Return text that JSON can carry: what is half of a character is replaced."""
    return text.encode("utf-8", "replace").decode()


def _sendable(delta: Delta) -> Delta:
    """Return the delta with a number for impossible tokens: JSON has no infinity."""
    if not delta.logprobs:
        return delta

    def finite(entry: TokenLogprob) -> TokenLogprob:
        value = entry.logprob if math.isfinite(entry.logprob) else -_LARGEST
        return replace(entry, logprob=value, top=tuple(finite(other) for other in entry.top))

    return replace(delta, logprobs=tuple(finite(entry) for entry in delta.logprobs))


def _check_numbers(result: object) -> None:
    """Raise BackendError for scores that are not numbers, which JSON has no word for."""
    match result:
        case Scores():
            numbers = list(result.scores)
        case Classes():
            numbers = [score for labels in result.labels for score in labels.values()]
        case _:
            return
    if not all(map(math.isfinite, numbers)):
        raise BackendError("engine_error", "the model computed numbers that are none (NaN)")


def _failure(request_id: int, error: BaseException) -> wire.Error:
    """Return what the daemon hears of a request that failed. To be called where it is caught."""
    if isinstance(error, BackendError):
        return wire.Error(
            id=request_id,
            code=error.code,
            message=sayable(error.message),
            tokens=error.tokens,
        )
    traceback.print_exc()
    return wire.Error(id=request_id, code="engine_error", message=ascii(error))


class Worker:
    """Turns messages into calls of one Backend instance."""

    def __init__(self, channel: Channel, backend: Backend) -> None:
        self._channel = channel
        self._backend = backend
        self._slots = 0
        self._tasks: tuple[Task, ...] = ()
        self._running: dict[int, threading.Event] = {}
        self._saving = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Serve until told to shut down or the parent is gone."""
        for message in self._channel.receive():
            match message:
                case wire.Load():
                    self._start(self._load, message)
                case wire.Cancel():
                    self._cancel(message.id)
                case wire.SaveState():
                    self._admit_save(message)
                case wire.Ping():
                    self._channel.send(wire.Pong(id=message.id))
                case wire.Shutdown():
                    return
                case _:
                    self._admit(message)

    def _start(self, target: Callable[[Any], None], message: wire.Message) -> None:
        # Every call into an engine is on a thread of its own, so that this one always reads on.
        threading.Thread(target=target, args=(message,), daemon=True).start()

    def _load(self, message: wire.Load) -> None:
        try:
            model = self._backend.load(
                message.spec, lambda fraction: self._channel.send(wire.Progress(fraction=fraction))
            )
        except BackendError as error:
            self._channel.send(wire.Error(code=error.code, message=sayable(error.message)))
        except BaseException as error:  # noqa: BLE001  the daemon has to hear of it, whatever it is
            traceback.print_exc()
            self._channel.send(wire.Error(code="load_failed", message=ascii(error)))
        else:
            model = replace(model, restored=self._restore(message.spec))
            self._slots, self._tasks = model.slots, model.tasks
            self._channel.send(wire.Loaded(model=model))

    def _restore(self, spec: LoadSpec) -> tuple[str, ...]:
        """Restore the load's conversations. The model is there without them: nothing fails here."""
        restore = getattr(self._backend, "restore_state", None)
        if restore is None or not spec.conversations:
            return ()
        try:
            return tuple(restore(spec.state_dir, spec.conversations))
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            return ()

    def _admit(self, message: wire.Ask) -> None:
        with self._lock:
            refusal = ""
            if self._saving:
                refusal = "the conversations are being saved"
            elif len(self._running) >= self._slots:
                refusal = f"all {self._slots} slots are taken"
            else:
                self._running[message.id] = threading.Event()
        if refusal:
            self._refuse(message.id, refusal)
        else:
            self._start(self._answer, message)

    def _refuse(self, request_id: int, why: str) -> None:
        self._channel.send(wire.Error(id=request_id, code="engine_error", message=why))

    def _admit_save(self, message: wire.SaveState) -> None:
        with self._lock:
            refusal = ""
            if not hasattr(self._backend, "save_state"):
                refusal = "this backend can't save conversations"
            elif not self._slots:
                refusal = "no model is loaded"
            elif self._running or self._saving:
                refusal = "conversations can't be saved while requests or another save run"
            else:
                self._saving = True
        if refusal:
            self._refuse(message.id, refusal)
        else:
            self._start(self._save, message)

    def _save(self, message: wire.SaveState) -> None:
        answer: wire.Message
        try:
            backend: Any = self._backend
            saved = backend.save_state(message.folder, message.limit_bytes)
            answer = wire.StateSaved(id=message.id, conversations=tuple(saved))
        except BaseException as error:  # noqa: BLE001  the daemon has to hear of it, whatever it is
            answer = _failure(message.id, error)
        with self._lock:
            self._saving = False
        self._send_last(message.id, answer)

    def _cancel(self, request_id: int) -> None:
        with self._lock:
            event = self._running.get(request_id)
        if event is not None:
            event.set()

    def _answer(self, message: wire.Ask) -> None:
        try:
            result = self._result(message, self._running[message.id].is_set)
            answer = _RESULTS[type(message)](id=message.id, result=result)
        except BaseException as error:  # noqa: BLE001  the daemon has to hear of it, whatever it is
            answer = _failure(message.id, error)
        # The slot is free before the daemon hears of it, or its next request would find none.
        with self._lock:
            del self._running[message.id]
        self._send_last(message.id, answer)

    def _result(self, message: wire.Ask, cancelled: Callable[[], bool]) -> Any:
        """Have the backend do it; send its deltas, if there are any, and return the result."""
        task = needed_task(message.request)
        if task not in self._tasks:
            can = ", ".join(self._tasks)
            why = ""
            if task is Task.CHAT and Task.COMPLETE in self._tasks:
                why = ": it has no chat template (`chat_template` of the model may bring one)"
            raise BackendError("invalid_request", f"this model can't do {task}, only {can}{why}")
        if isinstance(message, wire.Count) and not hasattr(self._backend, "count"):
            raise BackendError("invalid_request", "the engine of this model can't count tokens")
        method = getattr(self._backend, type(message).__name__.lower())
        working = method(message.request, cancelled)
        if not isinstance(working, Generator):
            _check_numbers(working)
            return working
        while True:
            try:
                delta: Delta = next(working)
            except StopIteration as end:
                return end.value
            self._channel.send(wire.Delta(id=message.id, delta=_sendable(delta)))

    def _send_last(self, request_id: int, answer: wire.Message) -> None:
        try:
            self._channel.send(answer)
        except wire.ProtocolError as error:  # no line can carry it: the request is owed an end
            self._channel.send(wire.Error(id=request_id, code="engine_error", message=str(error)))


def main() -> None:
    """Run a worker for the backend named by `--backend module:Class`."""
    channel, rest = attach(wire.ToWorker)
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    backend = load_class(parser.parse_args(rest).backend)()
    try:
        Worker(channel, backend).run()
    except (OSError, wire.ProtocolError) as error:
        print(f"worker: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines leave threads behind, some of which abort the process at an ordinary exit; the kernel
    # takes everything back.
    os._exit(0)


if __name__ == "__main__":
    main()
