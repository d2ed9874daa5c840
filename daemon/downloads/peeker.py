"""The process that looks at one model where it is: `python -P -m daemon.downloads.peeker`.

Owns what is read to answer a Peek: headers alone, from wherever a download would take the files.
Nothing is written. Everything heavy is imported after the process is tied to its parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from backends.contract import ModelFile
from daemon import sources
from daemon.artifacts import folder
from daemon.downloads import errand, local
from daemon.downloads.messages import Peek, Peeked, PeekedFile, ToPeeker

if TYPE_CHECKING:
    from daemon.downloads.ranged import Timeouts


def look(peek: Peek, timeouts: Timeouts, token: str) -> Peeked:
    """Return what is at the source. Raises ModeldError as a download of it would."""
    match sources.parse(peek.source):
        case sources.PathSource(path=path):
            root, seen = local.find(Path(path))
            model = folder.read(root, list(seen), peek.architecture)
            return _answer(model, {n: _file(n, facts.st_size) for n, facts in seen.items()})
        case sources.PackageSource() as source:
            package = local.find_in_package(source)
            model = folder.read(package.root, list(package.files), peek.architecture)
            files = package.files.items()
            return _answer(model, {n: _file(n, file.size_bytes, file.sha256) for n, file in files})
        case sources.UrlSource() | sources.HubSource() as source:
            network = errand.Network(
                hub_endpoint=peek.hub_endpoint,
                offline=peek.offline,
                timeouts=timeouts,
                token=token,
                memory_bytes=peek.memory_bytes,
            )
            return _look_afar(peek, source, network)


def _look_afar(
    peek: Peek, source: sources.UrlSource | sources.HubSource, network: errand.Network
) -> Peeked:
    located = network.locate(source)
    from daemon.downloads.bringing import key_of
    from daemon.downloads.reading import RemoteFiles

    hashes = {remote.name: remote.sha256 or "" for remote in located.files}
    with RemoteFiles(network.timeouts) as remote_files:
        readers = {remote.name: remote_files.open(remote) for remote in located.files}
        model = folder.read_from(readers, peek.architecture)
    files = {n: _file(n, reader.size_bytes, hashes[n]) for n, reader in readers.items()}
    keys = {remote.name: key_of(remote) for remote in located.files}
    return _answer(model, files, keys, revision=located.commit, license_name=located.license)


def _file(name: str, size_bytes: int, sha256: str = "") -> ModelFile:
    return ModelFile(path=name, size_bytes=size_bytes, mtime_ns=0, sha256=sha256)


def _answer(
    model: folder.FolderModel,
    files: Mapping[str, ModelFile],
    keys: Mapping[str, str] | None = None,
    *,
    revision: str = "",
    license_name: str = "",
) -> Peeked:
    keys = keys or {}
    used = tuple(replace(files[name], role=role) for name, role in model.roles)
    return Peeked(
        artifact=model.describe(used),
        files=tuple(PeekedFile(f.path, f.size_bytes, keys.get(f.path, "")) for f in used),
        size_bytes=sum(file.size_bytes for file in used),
        revision=revision,
        license=license_name,
    )


def main() -> None:
    """Look at the one model that the daemon asks about."""

    def work(order: errand.Order[Peek]) -> Peeked:
        return look(order.first, order.timeouts, order.token)

    errand.run(ToPeeker, work, what="looking at the model")


if __name__ == "__main__":
    main()
