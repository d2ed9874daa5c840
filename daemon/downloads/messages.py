"""What the daemon and a fetcher say to each other. The codec is `backends.wire`.

One fetcher runs one download and then exits. It answers Fetch with Progress…, then one of Fetched
or `backends.wire.Error` (whose code is one of `daemon.errors`: `download_failed`,
`insufficient_disk`, `invalid_request`). To cancel a download is to end the fetcher.
"""

from __future__ import annotations

from backends import contract, wire


class Fetch(wire.Message):
    """Bring the files of `source` into the store.

    `partial_dir` belongs to this download alone and may hold the leavings of an earlier attempt.
    Whole and verified files go to `blobs_dir`, named by their SHA-256, and are then hard-linked
    under their own names into `model_dir`, which is where engines open them. `architecture` is what
    the catalog says of a file whose header cannot.
    """

    source: str
    partial_dir: str
    blobs_dir: str
    model_dir: str
    hub_endpoint: str
    offline: bool = False
    architecture: str = ""


class Progress(wire.Message):
    """Bytes on this machine so far, of all files together; `total_bytes` 0 is not known yet.

    `verifying` is true once every byte is here and only checks are left.
    """

    done_bytes: int
    total_bytes: int
    verifying: bool = False


class Fetched(wire.Message):
    """Every file is whole, verified and in place; `revision` is the commit for a hub's repo."""

    artifact: contract.Artifact
    revision: str = ""


ToFetcher = Fetch
FromFetcher = wire.Hello | wire.Error | Progress | Fetched
