"""A file that is not whole yet: its bytes on the disk, the journal of them, and their hash so far.

Owns that at most MAX_LOST_BYTES have to be fetched again, whenever and whatever ends the fetcher.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from daemon.downloads import publish
from daemon.downloads.hashing import Follower
from daemon.downloads.journal import Identity, Journal
from daemon.downloads.spans import Spans

MAX_LOST_BYTES = 8 * 1024 * 1024
# What is on its way in buffers of the system and of the client is lost as well.
_NOTE_BYTES = 1024 * 1024
_SYNC_BYTES = 4 * 1024 * 1024
_UNSYNCED_BYTES = 6 * 1024 * 1024


class Partial:
    """The unfinished file in `folder`, which the caller holds the lock of. Blocks.

    `spans` are the bytes that are here, `identity` is whose they are.
    """

    def __init__(self, folder: Path, expected: Identity) -> None:
        self._folder = folder
        self._journal = Journal(folder / "journal")
        self.identity = expected
        self.spans = Spans()
        self._noted_bytes = 0
        self._synced = Spans()
        self._error: OSError | None = None
        self._ending = False
        self._generation = 0
        self._state = threading.Condition()
        self._fd = -1
        kept = self._journal.read()
        if kept is not None and _is_same(kept[0], expected) and self._holds(kept[1]):
            self.identity, self.spans = kept
            self._synced = self.spans.copy()
            self._open()
        else:
            self._renew()
        self._follower = Follower(self.data)
        self._follower.advance(self.spans.prefix())
        self._syncing = threading.Thread(target=self._sync, name="sync", daemon=True)
        self._syncing.start()

    @property
    def data(self) -> Path:
        """Where the bytes are."""
        return self._folder / "data"

    def _holds(self, spans: Spans) -> bool:
        """Say whether the file is as long as it has to be; what is in it, its hash will tell."""
        try:
            size = self.data.stat().st_size
        except FileNotFoundError:
            return False
        return all(end <= size for _, end in spans)

    def clean(self) -> None:
        """Forget what is here, since it is worth nothing."""
        with self._state:
            os.close(self._fd)
            self._generation += 1
            self.spans, self._synced, self._noted_bytes = Spans(), Spans(), 0
            self._renew()
        self._follower.end()
        self._follower = Follower(self.data)

    def identify(self, identity: Identity) -> None:
        """Note what the server says of the file."""
        if identity != self.identity:
            with self._state:
                self.identity = identity
                self._note()

    def prepare(self, start: int, end: int) -> None:
        """Have room for bytes that are about to come. Raises OSError, for a full disk above all.

        Writing where blocks were allocated before was measured to be 6 times as fast (ext4).
        """
        try:
            os.posix_fallocate(self._fd, start, end - start)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def land(self, offset: int, chunk: bytes) -> bool:
        """Write bytes where they belong; say whether `settle` has to be called before more are.

        Raises OSError, for a full disk above all.
        """
        publish.write_at(self._fd, chunk, offset)
        with self._state:
            if self._error is not None:
                raise self._error
            self.spans.add(offset, offset + len(chunk))
            self._noted_bytes += len(chunk)
            if self._noted_bytes >= _NOTE_BYTES:
                self._note()
            unsynced = self.spans.total - self._synced.total
            if unsynced >= _SYNC_BYTES:
                self._state.notify_all()
        self._follower.advance(self.spans.prefix())
        return unsynced >= _UNSYNCED_BYTES

    def settle(self) -> None:
        """Wait until little would be lost. Raises OSError."""
        with self._state:
            while self._error is None and not self._ending:
                if self.spans.total - self._synced.total < _UNSYNCED_BYTES:
                    return
                self._state.notify_all()
                self._state.wait()
            if self._error is not None:
                raise self._error

    def digest(self) -> str:
        """Return the SHA-256 of the file, all of which is here. Waits for it. Raises OSError."""
        with self._state:
            self._note()
        return self._follower.digest(self.spans.prefix())

    def note(self) -> None:
        """Write down what is here."""
        with self._state:
            self._note()

    def close(self) -> None:
        """Write down what is here, and end the threads."""
        with self._state:
            self._ending = True
            self._state.notify_all()
        self._syncing.join()
        self._follower.end()
        with self._state:
            if self._error is None:
                self._note()
        self._journal.close()
        os.close(self._fd)

    def _renew(self) -> None:
        """Begin with an empty file. The one before may be in the store already: it is let be."""
        self.data.unlink(missing_ok=True)
        self._open()
        self._noted_bytes = 0
        self._journal.write(self.identity, self.spans, self._synced, lasting=True)
        self._journal.sync()
        publish.sync_dir(self._folder)

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.data, flags, 0o600)

    def _note(self) -> None:
        self._noted_bytes = 0
        self._journal.write(self.identity, self.spans, self._synced)

    def _sync(self) -> None:
        while True:
            with self._state:
                while not self._ending:
                    if self.spans.total - self._synced.total >= _SYNC_BYTES:
                        break
                    self._state.wait()
                if self._ending:
                    return
                fd, landed = os.dup(self._fd), self.spans.copy()
                generation = self._generation
            try:
                os.fdatasync(fd)
                with self._state:
                    if current := generation == self._generation:
                        self._journal.write(self.identity, self.spans, landed, lasting=True)
                if current:
                    self._journal.sync()
                with self._state:
                    if generation == self._generation:
                        self._synced = landed
            except OSError as error:
                self._error = error
            finally:
                os.close(fd)
            with self._state:
                self._state.notify_all()
                if self._error is not None:
                    return


def _is_same(kept: Identity, expected: Identity) -> bool:
    """Say whether bytes of `kept` are bytes of what is expected, as far as can be told now."""
    if kept.sha256 is not None or expected.sha256 is not None:
        return kept.sha256 == expected.sha256
    sizes = (kept.size_bytes, expected.size_bytes)
    return kept.version is not None and (None in sizes or sizes[0] == sizes[1])
