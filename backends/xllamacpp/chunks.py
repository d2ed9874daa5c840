"""The engine's answers as an iterator: it calls back on a thread that it blocks.

Owns that thread, and how a request is cancelled.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from backends.contract import BackendError, Cancelled
from backends.xllamacpp import bodies

_Chunks = queue.SimpleQueue[dict[str, Any] | BaseException | None]


def chunks(
    handle: Callable[[dict[str, Any], Callable[[dict[str, Any]], bool]], None],
    body: dict[str, Any],
    cancelled: Cancelled,
) -> Iterator[dict[str, Any]]:
    """Yield the engine's chunks, which it hands to a callback on a thread that it blocks.

    Never leaves before that thread has ended. Raises BackendError.
    """
    arrived: _Chunks = queue.SimpleQueue()
    abandoned = threading.Event()

    def on_chunk(chunk: dict[str, Any]) -> bool:
        arrived.put(chunk)
        return abandoned.is_set() or cancelled()

    def run() -> None:
        try:
            handle(body, on_chunk)
            arrived.put(None)
        except BaseException as error:  # noqa: BLE001  raised again on the caller's thread
            arrived.put(error)

    thread = threading.Thread(target=run, name="xllamacpp-request")
    thread.start()
    try:
        while (chunk := arrived.get()) is not None:
            if isinstance(
                chunk, ValueError | RecursionError
            ):  # how the engine refuses a message it can't read
                raise bodies.error({"code": 400, "message": str(chunk)}) from chunk
            if isinstance(chunk, BaseException):
                raise BackendError("engine_error", f"xllamacpp: {chunk}") from chunk
            yield chunk
    finally:
        abandoned.set()
        thread.join()
