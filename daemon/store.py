"""The content store: where model files are, and the only place that turns ids into paths.

    blobs/<sha256>          whole, verified files, each once
    models/<id>/<name>      hard links to blobs, under the names that engines want; a name may
                            have folders in it
    partial/<id>/           what a download has so far
    scratch/<random>/       a worker's private directory

The fetcher writes blobs, links and partials; the daemon removes them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection
from pathlib import Path

from backends.contract import Artifact
from daemon.errors import Conflict

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_FOLDERS = ("blobs", "models", "partial", "scratch")


class Store:
    """The store under `root`, which is made if it is not there, for this user's eyes only."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._dropping = threading.Lock()
        for folder in _FOLDERS:
            (root / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        # No child of an earlier daemon lives on, so nobody uses what it left here any more.
        for folder in ("scratch", "partial"):
            shutil.rmtree(root / folder, ignore_errors=True)
            (root / folder).mkdir(mode=0o700)

    @property
    def blobs(self) -> Path:
        """Where whole, verified files are, named by their SHA-256."""
        return self.root / "blobs"

    def _inside(self, folder: str, model_id: str) -> Path:
        if not _ID.fullmatch(model_id):
            raise ValueError(f"{model_id!r} is not a model id")
        return self.root / folder / model_id

    def model_dir(self, model_id: str) -> Path:
        """Return the folder of a model's links."""
        return self._inside("models", model_id)

    def partial_dir(self, model_id: str) -> Path:
        """Return the folder of a model's unfinished download."""
        return self._inside("partial", model_id)

    def new_scratch(self) -> Path:
        """Make a private folder for one worker."""
        return Path(tempfile.mkdtemp(dir=self.root / "scratch"))

    def drop_scratch(self, path: Path) -> None:
        """Remove a worker's folder."""
        shutil.rmtree(path, ignore_errors=True)

    def drop_partial(self, model_id: str) -> None:
        """Remove what an unfinished download left."""
        shutil.rmtree(self.partial_dir(model_id), ignore_errors=True)

    def sweep(self, downloaded: Collection[str]) -> None:
        """Remove what a kill left behind: links of models not in `downloaded`, blobs without links.

        Called before any child is started.
        """
        for links in (self.root / "models").iterdir():
            if links.name not in downloaded:
                shutil.rmtree(links, ignore_errors=True)
        linked = _inodes(self.root / "models")
        for blob in self.blobs.iterdir():
            if blob.stat().st_ino not in linked:
                blob.unlink()

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
