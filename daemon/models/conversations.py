"""Where the KV state of conversations is kept between an unload and the next load of a model.

    <root>/<key>/index.json     which files there are, and what is known of them
    <root>/<key>/<name>.kv      the state of one conversation, written and read by a worker

A key stands for the exact files of a model, its engine's version, and the settings that its state
depends on: what is restored was computed by the same engine from the same weights. The engine then
uses as much of it as a prompt begins with.

Prompts can be read out of such files: they are for this user alone, and gone with the daemon unless
the settings say otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from backends.contract import Artifact, LoadOptions, MemoryEstimate, SavedConversation
from daemon.config import Resume
from daemon.models.choice import files_key

_INDEX = "index.json"
_LEFT_FREE_BYTES = 1024**3  # of the disk
# Kinds of scaling with which the positions of a model that is loaded with more than its original
# context are computed in another way.
_SCALED = ("longrope", "yarn", "dynamic")


class _Entry(msgspec.Struct, frozen=True):
    file: SavedConversation
    used_at: float


class Shelf:
    """The conversations of one key. Blocking, but short, where it does not say otherwise."""

    def __init__(self, folder: Path, everything: Conversations) -> None:
        self.folder = folder
        self._everything = everything

    def _entries(self) -> list[_Entry]:
        try:
            text = (self.folder / _INDEX).read_bytes()
            return msgspec.json.decode(text, type=list[_Entry])
        except (OSError, msgspec.DecodeError):
            return []

    def files(self) -> tuple[SavedConversation, ...]:
        """Return what there is, the most recently used first."""
        entries = sorted(self._entries(), key=lambda entry: -entry.used_at)
        return tuple(entry.file for entry in entries)

    def used(self, names: Collection[str]) -> None:
        """Take note that these were restored."""
        now = time.time()
        entries = [
            msgspec.structs.replace(entry, used_at=now) if entry.file.name in names else entry
            for entry in self._entries()
        ]
        with contextlib.suppress(OSError):  # a full disk: then they seem older than they are
            if names:
                self._write(entries)

    def room(self) -> int:
        """Return how many bytes may be written now."""
        free = shutil.disk_usage(self.folder).free - _LEFT_FREE_BYTES
        return min(self._everything.limit_bytes, free)

    @contextlib.contextmanager
    def saving(self) -> Iterator[Path]:
        """Give a folder of its own for files that are being written; what is left of it goes."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="saving-", dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def replace(self, old: Collection[str], new: Sequence[SavedConversation], folder: Path) -> None:
        """Take files out of `folder`, which follow the `old` ones, and keep the bound.

        May take its time. Not for a save of nothing: then the old ones are still good.
        """
        for file in new:
            os.replace(folder / file.name, self.folder / file.name)
        now = time.time()
        entries = [entry for entry in self._entries() if entry.file.name not in old]
        # The first is the one that the worker would miss the most.
        ages = [_Entry(file, now - place * 1e-3) for place, file in enumerate(new)]
        self._write(entries + ages)
        self._remove(old)
        self._everything.keep_within_limit()

    def drop(self, name: str) -> None:
        """Remove one conversation."""
        self._write([entry for entry in self._entries() if entry.file.name != name])
        self._remove([name])

    def _write(self, entries: Sequence[_Entry]) -> None:
        temporary = self.folder / f"{_INDEX}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(entries))
        os.replace(temporary, self.folder / _INDEX)

    def _remove(self, names: Collection[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what is in no index. Only while no worker runs."""
        known = {entry.file.name for entry in self._entries()}
        if not known:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in known | {_INDEX}:
                path.unlink(missing_ok=True)

    def ages(self) -> list[tuple[float, int, str]]:
        """Return when each conversation was used last, its bytes, and its name."""
        return [(e.used_at, e.file.size_bytes, e.file.name) for e in self._entries()]


class Conversations:
    """All that is kept, below `root`: at most `limit_bytes`, and twice that during a save."""

    def __init__(self, root: Path, *, resume: Resume, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._root = root
        self._resume = resume
        if not self.outlive:
            self.wipe()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in root.iterdir():
            Shelf(folder, self).sweep()

    @property
    def outlive(self) -> bool:
        """Whether what is kept outlives the daemon."""
        return self._resume is Resume.KEEP

    def open(
        self,
        artifact: Artifact,
        backend: str,
        engine_version: str,
        estimate: MemoryEstimate,
        options: LoadOptions,
    ) -> Shelf | None:
        """Return what is kept for a load; None if nothing is to be."""
        if self._resume is Resume.OFF or not engine_version or artifact.format == "remote":
            return None
        key = state_key(artifact, backend, engine_version, estimate, options)
        return Shelf(self._root / key, self)

    def keep_within_limit(self) -> None:
        """Remove what was used the longest ago until the rest is within the bound."""
        found = []
        for folder in self._root.iterdir():
            shelf = Shelf(folder, self)
            found += [(*age, shelf) for age in shelf.ages()]
        found.sort(key=lambda each: each[0])
        size = sum(size_bytes for _, size_bytes, _, _ in found)
        for _, size_bytes, name, shelf in found:
            if size <= self.limit_bytes:
                return
            shelf.drop(name)
            size -= size_bytes

    def forget(self, artifact: Artifact) -> None:
        """Remove what was kept for these files, whatever the settings were. May take its time."""
        for folder in self._root.glob(f"{files_key(artifact)}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def size_bytes(self) -> int:
        """Return how much is kept."""
        return sum(
            size_bytes
            for folder in self._root.iterdir()
            for _, size_bytes, _ in Shelf(folder, self).ages()
        )

    def close(self) -> None:
        """Wipe what is not to outlive the daemon."""
        if not self.outlive:
            self.wipe()

    def wipe(self) -> None:
        """Remove everything."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._root)


def state_key(
    artifact: Artifact,
    backend: str,
    engine_version: str,
    estimate: MemoryEstimate,
    options: LoadOptions,
) -> str:
    """Return the name of the folder for what a load computes. Pure.

    Two loads have the same one if each can go on from the other's state: the same weights, adapters
    and engine, and the same settings. Slots and threads do not matter; the context does for models
    whose positions depend on it.
    """
    facts = {
        "backend": backend,
        "version": engine_version,
        "engine": sorted(options.engine.items()),
        "layers": estimate.placement.layers,
        "positions": _positions(artifact, estimate.context_length),
    }
    settings = hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:32]
    return f"{files_key(artifact)}-{settings}"


def _positions(artifact: Artifact, context_length: int) -> int:
    """Return a number that is the same for contexts in which positions are computed alike.

    llama.cpp has two sets of factors for some models (LongRoPE), and takes the second one for a
    context that is longer than the original (`llama_model::get_rope_factors`); headers of such
    models have the original length, but need not name the kind of scaling.
    """
    told = artifact.metadata
    prefix = f"{artifact.architecture}.rope.scaling"
    original = told.get(f"{prefix}.original_context_length")
    if isinstance(original, int) and original > 0:
        return int(context_length > original)
    return context_length if told.get(f"{prefix}.type") in _SCALED else 0
