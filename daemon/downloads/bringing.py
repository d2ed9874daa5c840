"""A remote file into a download's staging: from the store, the hub's cache, or the network.

Owns the order in which these are tried, that one fetcher at a time works on a file, and that what
is staged is whole and verified.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon import sources
from daemon.downloads import publish
from daemon.downloads.journal import Identity
from daemon.downloads.pace import Bucket
from daemon.downloads.partial import Partial
from daemon.downloads.publish import Destination, VerificationFailed
from daemon.downloads.ranged import RemoteFile, Timeouts
from daemon.downloads.transfer import Listener, Transfer
from daemon.downloads.unfinished import locked, missing_bytes, note_model
from daemon.errors import InsufficientDisk
from daemon.store import remove_at_once

_FULL = (errno.ENOSPC, errno.EDQUOT)
_COPY_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """A staged file's SHA-256, and the key of its partial file, to be removed once published."""

    sha256: str
    partial: str


class _WrongTwice(VerificationFailed):
    """All of the file arrived, and is not what it should be; nor was it the time before."""


class Bringer:
    """Brings files for one download. `partials` is where unfinished ones are."""

    def __init__(self, to: Destination, partials: Path, timeouts: Timeouts, bucket: Bucket) -> None:
        self._to = to
        self._partials = partials
        self._timeouts = timeouts
        self._bucket = bucket

    def require_room(self, files: Sequence[RemoteFile], repo: str) -> None:
        """Raise InsufficientDisk unless what is missing of `files` fits on the disk."""
        publish.make_dir(self._partials)
        disk = self._partials.stat().st_dev
        missing = 0
        for remote in files:
            there = [self._to.blob(remote.sha256)] if remote.sha256 else []
            there += _in_hub_caches(remote, repo)
            if not any(path.exists() and path.stat().st_dev == disk for path in there):
                folder = self._partials / key_of(remote)
                missing += missing_bytes(folder, remote.size_bytes or 0)
        publish.require_room(self._partials, missing)

    async def bring(self, remote: RemoteFile, repo: str, listener: Listener) -> Brought:
        """Stage `remote`, which is in the hub's `repo`, or "".

        Raises DownloadFailed, VerificationFailed and InsufficientDisk; what is here of the file is
        kept for the next time, unless it is worth nothing.
        """
        folder = self._partials / key_of(remote)
        if remote.sha256 and (self._take(remote) or self._adopt(remote, repo, listener)):
            return self._taken(remote, folder, listener)

        def waiting() -> None:
            listener.waiting(f"{remote.name}: another download fetches it")

        with locked(folder, waiting):
            note_model(folder, self._to.model_dir.name)
            listener.waiting("")
            if remote.sha256 and self._take(remote):
                return self._taken(remote, folder, listener)
            return await self._fetch(remote, folder, listener)

    def _take(self, remote: RemoteFile) -> bool:
        return publish.take_blob(self._to, remote.sha256 or "", remote.name)

    def _adopt(self, remote: RemoteFile, repo: str, listener: Listener) -> bool:
        """Stage the file that the hub's own library has in its cache, if that is this one.

        A copy of it where there can be no hard link, as from another file system.
        """
        for path in _in_hub_caches(remote, repo):
            staged = publish.stage(self._to, remote.name)
            try:
                os.link(path, staged)
            except OSError:
                if not self._copied(path, remote, listener):
                    continue
            with staged.open("rb", buffering=0) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == remote.sha256:
                    return True
            staged.unlink()
        return False

    def _copied(self, path: Path, remote: RemoteFile, listener: Listener) -> bool:
        """Stage a copy; False if it can't be read, which is no reason not to fetch it."""
        try:
            original = path.open("rb", buffering=0)
        except OSError:
            return False
        with original, publish.open_staged(self._to, remote.name) as copy:
            size, done = os.fstat(original.fileno()).st_size, 0
            publish.require_room(self._to.work_dir, size)
            while chunk := original.read(_COPY_BYTES):
                publish.write_at(copy.fileno(), chunk, done)
                done += len(chunk)
                listener.landed(done, size)
        return True

    def _taken(self, remote: RemoteFile, folder: Path, listener: Listener) -> Brought:
        size = self._to.staged(remote.name).stat().st_size
        listener.landed(size, size)
        return Brought(sha256=remote.sha256 or "", partial=folder.name if folder.exists() else "")

    async def _fetch(self, remote: RemoteFile, folder: Path, listener: Listener) -> Brought:
        expected = Identity(
            address=sources.public(remote.url),
            size_bytes=remote.size_bytes,
            sha256=remote.sha256,
        )
        try:
            partial = Partial(folder, expected)
        except OSError as error:
            raise _explained(error, folder) from error
        listener.landed(partial.spans.total, partial.identity.size_bytes or 0)
        try:
            sha256 = await self._whole(remote, partial, listener)
        except BaseException as error:
            partial.close()
            if isinstance(error, _WrongTwice) or not partial.spans.total:
                remove_at_once(folder, self._to.work_dir)
            if isinstance(error, OSError):
                raise _explained(error, folder) from error
            raise
        partial.close()
        staged = publish.stage(self._to, remote.name)
        os.link(partial.data, staged)
        return Brought(sha256=sha256, partial=folder.name)

    async def _whole(self, remote: RemoteFile, partial: Partial, listener: Listener) -> str:
        """Fetch what is missing, once more from nothing if it comes out wrong."""
        for last in (False, True):
            await Transfer(remote, partial, self._timeouts, self._bucket, listener).run()
            problem, sha256 = await asyncio.to_thread(_check, remote, partial)
            if not problem:
                return sha256
            if last:
                raise _WrongTwice(
                    f"{problem}, also when it was fetched again; it was thrown away, and nothing "
                    "was added to the store"
                )
            # No server tells the hashes of parts: which of them is wrong can't be known.
            listener.noted(f"{problem}; all of it is fetched again")
            partial.clean()
        raise AssertionError


def key_of(remote: RemoteFile) -> str:
    """Return the name of the folder in which this file is while it is not whole."""
    if remote.sha256:
        return remote.sha256
    return "u-" + hashlib.sha256(remote.url.encode()).hexdigest()[:40]


def _check(remote: RemoteFile, partial: Partial) -> tuple[str, str]:
    """Return what is wrong with the file, "" if nothing is, and its SHA-256."""
    sha256 = partial.digest()
    if remote.sha256 and sha256 != remote.sha256:
        problem = f"the SHA-256 of what arrived is {sha256}, but it should be {remote.sha256}"
        return f"{remote.name}: {problem}", sha256
    if remote.git_sha1:
        git_sha1 = _git_sha1(partial.data)
        if git_sha1 != remote.git_sha1:
            problem = f"the Git id of what arrived is {git_sha1}, but it should be "
            return f"{remote.name}: {problem}{remote.git_sha1}", sha256
    return "", sha256


def _git_sha1(path: Path) -> str:
    """Return the id that Git gives a file's content (https://git-scm.com/book/en/v2, 10.2)."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1024 * 1024):
            digest.update(block)
    return digest.hexdigest()


def _in_hub_caches(remote: RemoteFile, repo: str) -> list[Path]:
    """Return where the hub's own library has kept this file of `repo` for this user."""
    if not repo or not remote.sha256:
        return []
    roots = []
    if hub_cache := os.environ.get("HF_HUB_CACHE"):
        roots.append(Path(hub_cache))
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    roots.append(Path(os.environ.get("HF_HOME") or Path(caches) / "huggingface") / "hub")
    folders = [root / f"models--{repo.replace('/', '--')}" for root in roots]
    found = [folder / "blobs" / remote.sha256 for folder in folders]
    return [path.resolve() for path in found if path.is_file()]


def _explained(error: OSError, folder: Path) -> Exception:
    if error.errno not in _FULL:
        return error
    free = shutil.disk_usage(folder.parent).free
    return InsufficientDisk(
        f"the disk of {folder.parent} is full ({free:,} bytes are free): free some, and the "
        "download goes on; what is here of it is kept"
    )
