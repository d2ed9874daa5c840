"""What the engine says of its work: to stderr, and to whoever listens on the thread it says it on.

The engine knows one callback for the whole process; these two are never freed, so that it can call
them at any time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# ggml.h, enum ggml_log_level. Level 5 continues the line before.
_DEBUG, _INFO, _WARNING, _ERROR = 1, 2, 3, 4
_CALLBACK: Any = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_listener: ContextVar[list[str] | None] = ContextVar("listener", default=None)


def _writer(lowest: int) -> Callable[[int, bytes, object], None]:
    def write(level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace")
        heard = _listener.get()
        if level == _ERROR and heard is not None:
            heard.append(line.strip())
        if level >= lowest:
            sys.stderr.write(line)
            sys.stderr.flush()

    return write


_EVERYTHING = _CALLBACK(_writer(_INFO))
_WARNINGS = _CALLBACK(_writer(_WARNING))


@contextmanager
def everything() -> Iterator[None]:
    """Log all but debugging lines inside, and warnings from then on: loads explain themselves."""
    _set(_EVERYTHING)
    try:
        yield
    finally:
        _set(_WARNINGS)


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Collect the errors that the engine reports inside, on this thread."""
    heard: list[str] = []
    token = _listener.set(heard)
    try:
        yield heard
    finally:
        _listener.reset(token)


def warnings_of(set_callback: Callable[[Any, None], None]) -> None:
    """Log the warnings of another library, which takes its callback by `set_callback`."""
    set_callback(_WARNINGS, None)


def _set(callback: Any) -> None:
    import llama_cpp

    llama_cpp.llama_log_set(callback, None)
