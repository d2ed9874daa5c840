"""What is known of one model. Knows neither SQLite nor any API's spelling of these facts."""

from __future__ import annotations

from typing import Any

import msgspec

from backends.contract import Artifact


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A catalog record. `artifact` is there once the files are whole, verified and in place.

    `created` is an ISO 8601 time in UTC; `size_bytes` and `context_length` are what the catalog
    promises before the download, and `parameters` counts weights. `foundation`, `provider`,
    `usage` and `kind` hold the values that the Pieces API defines for them. `backend` is the one
    that this model is to run on; empty leaves the choice to modeld. `options` are settings for its
    engine, by the names that its backend gives them. A `cloud` model runs on another computer.

    A `pinned` model never has to make room for another. `keep_alive` is how long it stays in memory
    after its last request, as in the settings; empty is what these say.

    `ram_bytes` is what a load was estimated to take before the download, 0 if it was not.
    `architecture` says what the headers of older formats cannot; a header that does goes before it.
    `chat_template` replaces the file's own, if it has one. A `background` model leaves half of its
    share of the cores to others.
    """

    id: str
    unique: str
    name: str
    created: str
    source: str = ""
    version: str = "1"
    description: str = ""
    custom: bool = False
    format: str = "gguf"
    size_bytes: int = 0
    context_length: int = 0
    parameters: int = 0
    quantization: str = ""
    license: str = ""
    capabilities: tuple[str, ...] = ()
    foundation: str = ""
    provider: str = ""
    usage: str = "CODE_CONVERSATION"
    kind: str = "BALANCED"
    uses: int = 0
    artifact: Artifact | None = None
    revision: str = ""
    backend: str = ""
    options: dict[str, Any] = {}
    cloud: bool = False
    architecture: str = ""
    chat_template: str = ""
    background: bool = False
    pinned: bool = False
    keep_alive: str = ""
    ram_bytes: int = 0

    @property
    def downloaded(self) -> bool:
        """Whether the files are on this machine."""
        return self.artifact is not None


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What a load was seen to use of RAM. Texts tell it from other loads: see `models.choice`.

    `estimate_bytes` is what was computed for it, `peak_bytes` the most that was measured. `served`:
    it was asked something. `load_s` is how long the load took; `seen_at` is an ISO 8601 time.
    """

    files: str
    backend: str
    version: str
    settings: str
    estimate_bytes: int
    peak_bytes: int
    served: bool
    load_s: float
    seen_at: str


class KeptDownload(msgspec.Struct, frozen=True, kw_only=True):
    """A download that is not over, for the next daemon; `created` is in seconds since the epoch.

    The bytes are what was here at least, and in all (0 is not known).
    """

    model_id: str
    priority: str
    created: float
    paused: str
    error: str
    done_bytes: int = 0
    total_bytes: int = 0


class SeedRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `configs/models.toml`: the fields of a ModelRecord that a person writes."""

    unique: str
    name: str
    source: str
    description: str = ""
    format: str = "gguf"
    size_bytes: int
    context_length: int
    parameters: int
    quantization: str
    license: str
    ram_bytes: int = 0
    foundation: str = ""
    provider: str = "HUGGING_FACE"
    usage: str = "CODE_CONVERSATION"
    kind: str = "BALANCED"
    capabilities: tuple[str, ...] = ()
    architecture: str = ""
    chat_template: str = ""
