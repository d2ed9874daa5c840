"""What the daemon says to a fetcher or a peeker, and they to it. The codec is `backends.wire`.

One fetcher runs one download and then exits. It answers Fetch with Progress…, heeds any Limit
meanwhile, and ends with one of Fetched or `backends.wire.Error` (whose code is one of
`daemon.errors`: `download_failed`, `insufficient_disk`, `invalid_request`, `invalid_model_file`).
To cancel a download is to end the
fetcher. A peeker answers Peek with Peeked or such an Error, and exits.
"""

from __future__ import annotations

import msgspec

from backends import contract, wire


class Fetch(wire.Message):
    """Bring the files of `source` into the store.

    `work_dir` belongs to this download alone. What is here of files that are not whole is in
    `partials_dir`, and stays there. Whole and verified files go to `blobs_dir`, named by their
    SHA-256, and are then hard-linked under their own names into `model_dir`, which is where engines
    open them. `architecture` is what the catalog says of a file whose header cannot. An empty
    `hub_endpoint` is the public hub. `memory_bytes` is what models may take here, 0 if that is not
    known; `bytes_per_s` the bandwidth that this download may use, 0 for all there is. `began` is
    whether it got on before: then its address is none that never was right.
    """

    source: str
    work_dir: str
    partials_dir: str
    blobs_dir: str
    model_dir: str
    hub_endpoint: str
    offline: bool = False
    architecture: str = ""
    memory_bytes: int = 0
    bytes_per_s: int = 0
    began: bool = False


class Limit(wire.Message):
    """Use so much bandwidth from now on: bytes a second, 0 for all there is."""

    bytes_per_s: int


class FileProgress(msgspec.Struct, frozen=True):
    """How much of one file is on this machine; `total_bytes` 0 is not known yet.

    `key` is the name of its folder among the unfinished files, "" if it has none.
    """

    name: str
    done_bytes: int
    total_bytes: int
    key: str = ""


class Progress(wire.Message):
    """Bytes on this machine so far, of all files together; `total_bytes` 0 is not known yet.

    `verifying` is true once every byte is here and only checks are left. `waiting` says, for a
    person, what it waits for, `note` what has happened that they should know.
    """

    done_bytes: int
    total_bytes: int
    verifying: bool = False
    files: tuple[FileProgress, ...] = ()
    waiting: str = ""
    note: str = ""


class Fetched(wire.Message):
    """Every file is whole, verified and in place; `revision` is the commit for a hub's repo.

    `partials` are the keys of unfinished files that are finished now: they can be removed once this
    is recorded.
    """

    artifact: contract.Artifact
    revision: str = ""
    partials: tuple[str, ...] = ()


class Peek(wire.Message):
    """Say what is at `source`, and read as little of it as that takes. The rest is as in Fetch."""

    source: str
    hub_endpoint: str
    offline: bool = False
    architecture: str = ""
    memory_bytes: int = 0


class PeekedFile(msgspec.Struct, frozen=True):
    """A file of a model that is somewhere else; `name` is relative to the model.

    `key` is the name of its folder while it is unfinished, "" if it would have none.
    """

    name: str
    size_bytes: int
    key: str = ""


class Peeked(wire.Message):
    """What a download of the source would bring, as its headers say.

    The `artifact` describes files that are not here: their paths are their names, their `mtime_ns`
    is 0, and `sha256` is empty unless their place tells it. `size_bytes` is that of all `files`
    together. `revision` is the commit of a hub's repository and `license` what that says of itself,
    such as `apache-2.0`; both are empty where nothing says so.
    """

    artifact: contract.Artifact
    files: tuple[PeekedFile, ...]
    size_bytes: int
    revision: str = ""
    license: str = ""


ToFetcher = Fetch | Limit
FromFetcher = wire.Hello | wire.Error | Progress | Fetched
ToPeeker = Peek
FromPeeker = wire.Hello | wire.Error | Peeked
