"""The one error tree: a code for machines, an HTTP status, a message a person can act on.

Each API surface renders these in its own form; nothing else in the daemon knows HTTP.
"""

from __future__ import annotations

from typing import ClassVar


class ModeldError(Exception):
    """Base of all errors that a client may see.

    `retry_after_s` is set when the same request may succeed later without any change;
    `should_retry` is false when no retry can ever help; `param` names the field at fault.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry


class InvalidRequest(ModeldError):
    """The request is wrong and its sender can mend it."""

    code = "invalid_request"
    status = 400


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit the context that the model was loaded with.

    `tokens` is how many it has, or has at least; None if that is not known.
    """

    code = "context_length_exceeded"

    def __init__(self, message: str, *, tokens: int | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens


class Forbidden(ModeldError):
    """A Host or Origin that may not talk to this daemon."""

    code = "forbidden_origin"
    status = 403


class ModelNotFound(ModeldError):
    """No model has this id or name."""

    code = "model_not_found"
    status = 404


class ModelNotDownloaded(ModeldError):
    """The model is known, but its files are not on this machine."""

    code = "model_not_downloaded"
    status = 404


class RequestNotFound(ModeldError):
    """No request of this id waits or runs."""

    code = "request_not_found"
    status = 404


class BodyTimeout(ModeldError):
    """The request's body did not come in time."""

    code = "body_timeout"
    status = 408


class Conflict(ModeldError):
    """The model is in a state that does not allow this."""

    code = "conflict"
    status = 409


class ModelNotLoaded(Conflict):
    """The model is not in memory, and requests are not to load it."""

    code = "model_not_loaded"


class QueueFull(ModeldError):
    """Too many requests wait for this model already."""

    code = "queue_full"
    status = 429


class InternalError(ModeldError):
    """A fault of modeld itself; the log has the details."""


class BackendUnavailable(ModeldError):
    """No installed engine can run this model."""

    code = "backend_unavailable"
    status = 501


class NotSupported(ModeldError):
    """The API that is spoken has this, and modeld does not do it."""

    code = "not_supported"
    status = 501


class LoadFailed(ModeldError):
    """The engine could not load the model."""

    code = "load_failed"
    status = 502


class WorkerCrashed(ModeldError):
    """The process that held the model ended by itself."""

    code = "worker_crashed"
    status = 502


class EngineError(ModeldError):
    """The engine failed at this one request."""

    code = "engine_error"
    status = 502


class DownloadFailed(ModeldError):
    """The model's files could not be fetched or are not what they should be."""

    code = "download_failed"
    status = 502


class InsufficientMemory(ModeldError):
    """The model does not fit into the memory that it may use now."""

    code = "insufficient_memory"
    status = 503


class Stopping(ModeldError):
    """The daemon is about to end; one that is started after it can be asked."""

    code = "stopping"
    status = 503

    def __init__(self) -> None:
        super().__init__("modeld is stopping", retry_after_s=5)


class LoadTimeout(ModeldError):
    """The engine did not finish loading in time."""

    code = "load_timeout"
    status = 504


class RequestTimeout(ModeldError):
    """The request ran for longer than any may."""

    code = "request_timeout"
    status = 504


class InsufficientDisk(ModeldError):
    """The disk has no room for what is to be written."""

    code = "insufficient_disk"
    status = 507


class ConfigError(ModeldError):
    """A setting or a start-up condition that keeps the daemon from starting."""

    code = "invalid_config"
    status = 500
