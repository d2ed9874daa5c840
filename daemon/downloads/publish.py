"""The store's side of a download: room on the disk, staging, and the way into the store.

Owns the order in which files get their final names: bytes on the disk first, then the blobs, then
the model's folder in one step, so that whatever a crash leaves under a final name is whole. Knows
neither sources nor formats, no network and no channel.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from backends.contract import ModelFile
from daemon.artifacts.folder import relative_name
from daemon.errors import DownloadFailed, InsufficientDisk, InvalidRequest

Report = Callable[[int, int], None]
"""Takes (done_bytes, total_bytes); a total of 0 is not known."""

DISK_MARGIN_BYTES = 64 * 1024 * 1024  # what a download leaves free for everything else
_SHA256 = re.compile(r"[0-9a-f]{64}")


class VerificationFailed(DownloadFailed):
    """The bytes are not what they should be: what is here of them is worth nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The directories of one download; all three are on one filesystem."""

    work_dir: Path
    blobs_dir: Path
    model_dir: Path

    def blob(self, sha256: str) -> Path:
        """Return where the file of this hash is or will be. Raises ValueError if it is no hash."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256")
        return self.blobs_dir / sha256

    @property
    def staging_dir(self) -> Path:
        """Where files are whole before they enter the store, under their names in the model."""
        return self.work_dir / "files"

    def staged(self, name: str) -> Path:
        """Return where the file of this relative name is staged. Raises InvalidRequest."""
        return self.staging_dir / relative_name(name)

    def discard(self) -> None:
        """Remove what this download has staged."""
        shutil.rmtree(self.work_dir, ignore_errors=True)


def file_name(path: str) -> str:
    """Return the last part of `path`, safe as a file's name. Raises InvalidRequest."""
    try:
        return relative_name(PurePosixPath(path).name)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path!r} does not end in a usable file name") from error


def require_room(directory: Path, size_bytes: int) -> None:
    """Raise InsufficientDisk unless `size_bytes` and a margin fit on the disk of `directory`."""
    free = shutil.disk_usage(directory).free
    needed = size_bytes + DISK_MARGIN_BYTES
    if free < needed:
        raise InsufficientDisk(
            f"the disk of {directory} has {free:,} bytes free, and this download needs {needed:,} "
            f"({size_bytes:,} and a margin of {DISK_MARGIN_BYTES:,}): "
            f"free {needed - free:,} bytes and try again"
        )


def make_dir(path: Path) -> None:
    """Make `path` and its missing parents, for this user alone."""
    if not path.is_dir():
        make_dir(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync_dir(path.parent)


def stage(to: Destination, name: str) -> Path:
    """Return where the download's file `name` is to be made; what was there is removed."""
    staged = to.staged(name)
    make_dir(staged.parent)
    staged.unlink(missing_ok=True)
    return staged


def open_staged(to: Destination, name: str) -> BinaryIO:
    """Return an empty staged file. An earlier attempt's is dropped."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(stage(to, name), flags, 0o600), "r+b", buffering=0)


def take_blob(to: Destination, sha256: str, name: str) -> bool:
    """Stage the store's file of this hash as `name`; say whether there is one, by reading it.

    Its name alone proves nothing: a blob that was imported by hard link is the user's own file,
    and an editor that works in place changes both.
    """
    return _link_blob(to, sha256, stage(to, name))


def publish(
    to: Destination, hashes: Mapping[str, str], roles: Sequence[tuple[str, str]]
) -> tuple[ModelFile, ...]:
    """Move staged files, whole and verified, into the store: all of a model at once.

    `hashes` has their SHA-256 by name, `roles` the names and roles of those that the model
    consists of, in the order of the files that are returned. What the model had before goes.
    """
    folder = to.work_dir / "model"
    shutil.rmtree(folder, ignore_errors=True)
    for name, _ in roles:
        _keep(to, to.staged(name), hashes[name])
    for name, _ in roles:
        make_dir((folder / name).parent)
        to.staged(name).replace(folder / name)
    for parent in {(folder / name).parent for name, _ in roles}:
        sync_dir(parent)
    withdraw(to)
    _move_in(folder, to.model_dir)
    return tuple(
        model_file(to.model_dir / name, hashes[name], role, (to.model_dir / name).stat())
        for name, role in roles
    )


def withdraw(to: Destination) -> None:
    """Take the model's folder, if there is one, out of the store."""
    old = to.work_dir / "replaced"
    shutil.rmtree(old, ignore_errors=True)
    make_dir(to.work_dir)
    with contextlib.suppress(FileNotFoundError):
        to.model_dir.rename(old)


def model_file(path: Path, sha256: str, role: str, facts: os.stat_result) -> ModelFile:
    """Return the ModelFile of a file with these `facts`."""
    return ModelFile(
        path=str(path),
        size_bytes=facts.st_size,
        mtime_ns=facts.st_mtime_ns,
        sha256=sha256,
        role=role,
    )


def write_at(fd: int, chunk: bytes, offset: int) -> None:
    """Write all of `chunk` at `offset`; a plain pwrite may stop short of it."""
    view = memoryview(chunk)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _keep(to: Destination, staged: Path, sha256: str) -> None:
    """Let the store have the staged file, or the model the store's, if that holds the same."""
    blob = to.blob(sha256)
    if blob.exists() and blob.samefile(staged):
        return
    spare = to.work_dir / "spare"
    spare.unlink(missing_ok=True)
    if _link_blob(to, sha256, spare):
        spare.replace(staged)
        return
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    os.link(staged, spare)
    _move_in(spare, blob)


def _link_blob(to: Destination, sha256: str, target: Path) -> bool:
    try:
        os.link(to.blob(sha256), target)
    except FileNotFoundError:
        return False
    with target.open("rb", buffering=0) as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    if not whole:
        target.unlink()
    return whole


def _move_in(path: Path, target: Path) -> None:
    """Put `path`, complete and on the disk, at its final name, durably."""
    make_dir(target.parent)
    path.replace(target)
    sync_dir(target.parent)


def sync_dir(path: Path) -> None:
    """Have the names in a folder on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
