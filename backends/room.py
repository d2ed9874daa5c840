"""Whether a prompt fits the context, and the answer that is to follow it. Pure."""

from __future__ import annotations

from backends.contract import BackendError, Sampling


def context_exceeded(tokens: int, context_length: int) -> BackendError:
    """Return the error for a prompt of so many tokens, which does not fit."""
    return BackendError(
        "context_length_exceeded",
        # clients know a prompt of which this is said by its first words
        f"the prompt is too long: it has {tokens} tokens, but the model was loaded with a "
        f"context_length of {context_length}; shorten it or load the model with a larger "
        "context_length",
        tokens=tokens,
    )


def check_room(tokens: int, sampling: Sampling, context_length: int) -> None:
    """Raise BackendError for a prompt of so many tokens that leaves its answer too little room.

    That is one token, and as many as it may have if `sampling` wants it whole.
    """
    if tokens >= context_length:
        raise context_exceeded(tokens, context_length)
    wanted = sampling.max_tokens or 0
    if sampling.whole and tokens + wanted > context_length:
        raise BackendError(
            "context_length_exceeded",
            f"the prompt has {tokens} tokens and its answer may have {wanted}, but the model was "
            f"loaded with a context_length of {context_length}: ask for a shorter answer or load "
            "the model with a larger context_length",
            tokens=tokens,
        )
