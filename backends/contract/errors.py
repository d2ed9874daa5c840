"""The one error of backends."""

from __future__ import annotations


class BackendError(Exception):
    """An engine could not do what it was asked; `code` is for machines, the text for people.

    Codes: `invalid_request` (the caller can mend it), `context_length_exceeded` (the prompt is
    longer than `context_length`), `queue_full` (what it depends on is busy: later may do),
    `load_failed`, `engine_error`, `cancelled`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
