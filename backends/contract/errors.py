"""The one error of backends."""

from __future__ import annotations


class BackendError(Exception):
    """An engine could not do what it was asked; `code` is for machines, the text for people.

    Codes: `invalid_request` (the caller can mend it), `context_length_exceeded` (the prompt, or
    the prompt with a `whole` answer, is longer than `context_length`), `queue_full` (what it
    depends on is busy: later may do), `load_failed`, `engine_error`, `cancelled`. `tokens` is how
    many such a prompt has without its answer: all of them, or so many at least; None if that is
    not known.
    """

    def __init__(self, code: str, message: str, *, tokens: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.tokens = tokens
