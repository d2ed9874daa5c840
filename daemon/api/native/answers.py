"""What the native surface answers. Sizes are in bytes, `…_s` in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from backends.contract import Hardware, Option, Probe, Task
from daemon.downloads.job import JobState, Paused, Priority
from daemon.downloads.messages import PeekedFile
from daemon.downloads.orphans import Leftover
from daemon.models import ModelState
from daemon.models.manager import RequestStatus


class ModelView(TypedDict):
    """A model: what the catalog knows of it, and its state.

    `unloads_in_s` is how long it stays if nobody asks it anything; null: until it has to make room.
    `reduced` says what it was loaded with less of than it should be, for want of memory.
    """

    id: str
    unique: str
    name: str
    description: str
    source: str
    custom: bool
    cloud: bool
    format: str
    parameters: int
    quantization: str
    size_bytes: int
    license: str
    downloaded: bool
    downloading: bool
    state: ModelState
    backend: str
    worker_pid: int | None
    in_flight: int
    waiting: int
    load_progress: float
    estimate_bytes: int
    reserved_bytes: int
    measured_bytes: int
    context_length: int
    slots: int
    unloads_in_s: float | None
    waits_for: str | None
    reduced: str | None
    last_error: str | None
    passed_over: list[str]
    pinned: bool
    keep_alive: str | None
    fixed_backend: str | None
    options: dict[str, Any]
    background: bool
    files: list[str]


class Models(TypedDict):
    """All models of the catalog."""

    models: list[ModelView]


class Candidate(TypedDict):
    """What one backend makes of a model: a `score` of 0 means that it can't run it."""

    backend: str
    score: int
    reason: str
    tasks: list[Task]


class Explanation(TypedDict):
    """Which backend a model gets, and why; `fixed` says who settled that, if anybody did."""

    model: str
    chosen: str | None
    fixed: str | None
    last_error: str | None
    passed_over: list[str]
    candidates: list[Candidate]


class PromptUsage(TypedDict):
    """What a request cost that has no text for an answer."""

    prompt_tokens: int


class Labels(TypedDict):
    """For each text the score of every label, from 0 to 1."""

    model: str
    labels: list[dict[str, float]]
    usage: PromptUsage


class FileView(TypedDict):
    """One file of a download."""

    name: str
    done_bytes: int
    total_bytes: int


class JobError(TypedDict):
    """Why a download failed, or what one that is paused waits for."""

    code: str
    message: str


class JobView(TypedDict):
    """A download. `percentage` is below 100 until the model can be loaded.

    `created` is in seconds since the epoch.
    """

    model: str
    unique: str
    state: JobState
    paused: Paused | None
    priority: Priority
    done_bytes: int
    total_bytes: int
    percentage: float
    bytes_per_s: int
    eta_s: float | None
    files: list[FileView]
    waiting: str | None
    note: str | None
    error: JobError | None
    created: float


class Jobs(TypedDict):
    """The last download of every model that had one, and unfinished files."""

    downloads: list[JobView]
    bandwidth_limit: int
    partials: list[Leftover]


class Bandwidth(TypedDict):
    """What all downloads together may use, in bytes a second; 0 is all there is."""

    bandwidth_limit: int


class Freed(TypedDict):
    """How much was removed."""

    freed_bytes: int


class DownloadView(TypedDict):
    """What a download would bring."""

    size_bytes: int
    files: list[PeekedFile]
    license: str | None
    revision: str | None
    disk_free_bytes: int
    fits_disk: bool


class Smaller(TypedDict):
    """A load with less context or fewer slots, which fits."""

    context_length: int
    slots: int
    estimate_bytes: int


class EstimateView(TypedDict):
    """What a load would take, and whether it fits: `now`, `no`, or on what terms."""

    model: str
    downloaded: bool
    download: DownloadView | None
    backend: str
    context_length: int
    slots: int
    estimate_bytes: int
    parts: dict[str, int]
    gpu_parts: dict[str, dict[str, int]]
    placement: str
    measured: bool
    fits: str
    smaller: Smaller | None
    budget_bytes: int
    available_bytes: int


class Booked(TypedDict):
    """What is booked for one model."""

    id: str
    unique: str
    state: ModelState
    estimate_bytes: int
    reserved_bytes: int
    measured_bytes: int
    in_use_bytes: int
    gpu_bytes: dict[str, int]


class Memory(TypedDict):
    """Who holds the memory: see GET /modeld/v1/memory."""

    budget_bytes: int
    reserved_bytes: int
    shared_bytes: int
    unreserved_bytes: int
    available_bytes: int
    watermark_bytes: int
    ram_bytes: int
    models_bytes: int
    daemon_bytes: int
    others_bytes: int
    spare_bytes: int
    conversations_bytes: int
    critical: bool
    models: list[Booked]


class MemoryNow(TypedDict):
    """What models take of the memory that they may take."""

    budget_bytes: int
    reserved_bytes: int
    unreserved_bytes: int
    critical: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend(Probe):
    """What a backend can do here, and the options that it takes."""

    options: dict[str, Option] = field(default_factory=dict, hash=False)


class Backends(TypedDict):
    """All backends."""

    backends: list[Backend]


class Requests(TypedDict):
    """All requests that wait or run, the oldest first."""

    requests: list[RequestStatus]


class DoctorMemory(TypedDict):
    """What models may take; `pressure_percent` is the time that programs wait for memory."""

    budget_bytes: int
    available_bytes: int
    pressure_percent: float | None


class DoctorModel(TypedDict):
    """A downloaded model: what a load would be, and what is wrong with it, if anything is."""

    unique: str
    state: str
    problem: str
    backend: str
    reason: str
    placement: str
    gpu_layers: int
    threads: int
    context_length: int
    slots: int
    parts: dict[str, int]
    gpu_parts: dict[str, dict[str, int]]
    need_bytes: int
    fits: str


class Report(TypedDict):
    """The doctor's report. `ok`: something can run here."""

    ok: bool
    version: str
    running: bool
    hardware: Hardware
    memory: DoctorMemory
    engines: list[Probe]
    models: list[DoctorModel]
    advice: list[str]


class Event(TypedDict):
    """One event: `type` says which of the others it has.

    `snapshot`: models, downloads, requests and memory; `model`, `download`, `request`, `memory`:
    the one of that name; `model_deleted` and `request_ended`: the `id` of what is gone.
    """

    type: str
    models: NotRequired[list[ModelView]]
    downloads: NotRequired[list[JobView]]
    requests: NotRequired[list[RequestStatus]]
    model: NotRequired[ModelView]
    download: NotRequired[JobView]
    request: NotRequired[RequestStatus]
    memory: NotRequired[MemoryNow]
    id: NotRequired[str]
