"""The hash of a file that is being written, by a thread of its own."""

from __future__ import annotations

import errno
import hashlib
import threading
from pathlib import Path

_READ_BYTES = 1024 * 1024


class Follower:
    """Hashes a file behind those who write it, so that little is left to do after the last byte."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = threading.Condition()
        self._prefix = self._hashed = 0
        self._ending = False
        self._error: OSError | None = None
        self._digest = hashlib.sha256()
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
        self._thread.start()

    def advance(self, prefix: int) -> None:
        """Say up to where everything is written."""
        if prefix - self._prefix >= _READ_BYTES:
            with self._state:
                self._prefix = prefix
                self._state.notify_all()

    def digest(self, size: int) -> str:
        """Return the SHA-256 of the first `size` bytes, which are all that there are."""
        with self._state:
            self._prefix = size
            self._state.notify_all()
            while self._hashed < size and self._error is None:
                self._state.wait()
            if self._error is not None:
                raise self._error
            return self._digest.hexdigest()

    def end(self) -> None:
        """End the thread."""
        with self._state:
            self._ending = True
            self._state.notify_all()
        self._thread.join()

    def _run(self) -> None:
        block = bytearray(_READ_BYTES)
        try:
            with self._path.open("rb", buffering=0) as file:
                while self._next() and not self._ending:
                    view = memoryview(block)[: self._prefix - self._hashed]
                    read = file.readinto(view)
                    if not read:
                        self._fail(OSError(errno.EIO, "the file is shorter than what was written"))
                        return
                    self._digest.update(view[:read])
                    with self._state:
                        self._hashed += read
                        if self._hashed == self._prefix:
                            self._state.notify_all()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        with self._state:
            self._error = error
            self._state.notify_all()

    def _next(self) -> bool:
        with self._state:
            while self._hashed >= self._prefix and not self._ending:
                self._state.wait()
            return not self._ending
