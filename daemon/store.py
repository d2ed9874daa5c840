"""The content store: where model files are, and the only place that turns ids into paths.

    blobs/<sha256>          whole, verified files, each once
    models/<id>/<name>      hard links to blobs, under the names that engines want; a name may
                            have folders in it
    partial/<key>/          what is here of a file that is not whole: see `downloads.partial`
    work/<id>/              a download's own folder
    scratch/<random>/       a worker's private directory
    conversations/          what workers computed of conversations: see `models.conversations`

The fetcher writes blobs, links, partial files and its own folder; the daemon removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from backends.contract import Artifact
from daemon.errors import Conflict

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_KEY = re.compile(r"(u-)?[0-9a-f]{40,64}")
_FOLDERS = ("blobs", "models", "partial", "work", "scratch")


class Store:
    """The store under `root`, which is made if it is not there, for this user's eyes only."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._dropping = threading.Lock()
        for folder in _FOLDERS:
            (root / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        # No child of an earlier daemon lives on, so nobody uses what it left here any more.
        for folder in ("scratch", "work"):
            shutil.rmtree(root / folder, ignore_errors=True)
            (root / folder).mkdir(mode=0o700)

    @property
    def blobs(self) -> Path:
        """Where whole, verified files are, named by their SHA-256."""
        return self.root / "blobs"

    @property
    def conversations(self) -> Path:
        """Where the state of conversations is, on the same file system as workers' folders."""
        return self.root / "conversations"

    def _inside(self, folder: str, model_id: str) -> Path:
        if not _ID.fullmatch(model_id):
            raise ValueError(f"{model_id!r} is not a model id")
        return self.root / folder / model_id

    def model_dir(self, model_id: str) -> Path:
        """Return the folder of a model's links."""
        return self._inside("models", model_id)

    def work_dir(self, model_id: str) -> Path:
        """Return the folder of a model's download while it runs."""
        return self._inside("work", model_id)

    @property
    def partials(self) -> Path:
        """Where files are that are not whole."""
        return self.root / "partial"

    def unfinished(self) -> list[Path]:
        """Return the folders of files that are not whole; what else is there is not ours."""
        return [path for path in self.partials.iterdir() if _KEY.fullmatch(path.name)]

    def new_scratch(self) -> Path:
        """Make a private folder for one worker."""
        return Path(tempfile.mkdtemp(dir=self.root / "scratch"))

    def drop_scratch(self, path: Path) -> None:
        """Remove a worker's folder."""
        shutil.rmtree(path, ignore_errors=True)

    def drop_work(self, model_id: str) -> None:
        """Remove what a download staged."""
        shutil.rmtree(self.work_dir(model_id), ignore_errors=True)

    def drop_partial(self, key: str) -> bool:
        """Remove what is here of a file that is not whole, unless a fetcher works on it: say so."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of an unfinished file")
        return discard(self.partials / key, self.root / "scratch")

    def sweep(self, wanted: Collection[str]) -> None:
        """Remove what a kill left behind: links of models not in `wanted`, blobs without links.

        Called before any child is started.
        """
        for links in (self.root / "models").iterdir():
            if links.name not in wanted:
                shutil.rmtree(links, ignore_errors=True)
        linked = _inodes(self.root / "models")
        for blob in self.blobs.iterdir():
            if blob.stat().st_ino not in linked:
                blob.unlink()

    def copy(self, artifact: Artifact, model_id: str, copy_id: str) -> Artifact:
        """Give a new model the files of another, by hard links; return its artifact.

        Files that are not in the store stay where they are. All appear in one step.
        """
        there, folder = self.model_dir(model_id), self.work_dir(copy_id) / "model"
        files = []
        for file in artifact.files:
            path = Path(file.path)
            if path.is_relative_to(there):
                link = folder / path.relative_to(there)
                link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.link(path, link)
                path = self.model_dir(copy_id) / path.relative_to(there)
            files.append(replace(file, path=str(path)))
        if folder.is_dir():
            folder.rename(self.model_dir(copy_id))
        self.drop_work(copy_id)
        return replace(artifact, files=tuple(files))

    def drop_model(self, model_id: str) -> None:
        """Remove a model's links, and every blob that no model links to any more."""
        links = self.model_dir(model_id)
        with self._dropping:
            inodes = _inodes(links)
            shutil.rmtree(links, ignore_errors=True)
            linked = _inodes(self.root / "models")
            for blob in self.blobs.iterdir():
                if (inode := blob.stat().st_ino) in inodes and inode not in linked:
                    blob.unlink()


def discard(folder: Path, aside: Path) -> bool:
    """Remove the folder of an unfinished file, at one go: nobody finds a part of it.

    Who holds its `lock` goes on with it; then it stays, and the answer is False. `aside` is a
    folder of the same file system for what is being removed.
    """
    try:
        lock = (folder / "lock").open("r+b")  # a full disk has no room for one that is not there
    except FileNotFoundError:
        remove_at_once(folder, aside)
        return True
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        remove_at_once(folder, aside)
    return True


def remove_at_once(folder: Path, aside: Path) -> None:
    """Remove a folder that others may look into: it goes in one step."""
    gone = aside / f"{folder.name}-{secrets.token_hex(8)}"
    try:
        folder.rename(gone)
    except OSError:  # no room for another name, or no such folder
        gone = folder
    shutil.rmtree(gone, ignore_errors=True)


def _inodes(folder: Path) -> set[int]:
    """Return the inodes of the files below `folder`, without those that go meanwhile."""
    found = set()
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.add((Path(parent) / name).stat().st_ino)
    return found


def check_unchanged(artifact: Artifact) -> None:
    """Make sure that the files are those that were verified.

    Raises Conflict that names the file which is gone or was changed since.
    """
    for file in artifact.files:
        try:
            stat = Path(file.path).stat()
        except OSError as error:
            raise Conflict(
                f"the model's file {file.path} cannot be read ({error.strerror}): "
                "download or import the model again"
            ) from error
        if stat.st_size != file.size_bytes or stat.st_mtime_ns != file.mtime_ns:
            raise Conflict(
                f"the model's file {file.path} was changed after it was verified "
                f"({stat.st_size} bytes now, {file.size_bytes} then): download or import the "
                "model again"
            )
