"""What a load that gets no memory is told: what is missing, who has it, what would help. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from backends.contract import MemoryEstimate
from daemon.errors import InsufficientMemory
from daemon.memory.ledger import Book
from daemon.memory.plan import Occupant, Standing
from daemon.units import size

_RETRY_AFTER_S = 10
_SHORTEST_CONTEXT = 1024  # what a context that nobody fixed may shrink to
_WORDS = {
    Standing.FIXED: " (pinned)",
    Standing.BUSY: " (busy)",
    Standing.COMING: " (loading)",
    Standing.GOING: " (leaving)",
    Standing.IDLE: "",
}


def refusal(
    unique: str,
    ladder: Sequence[MemoryEstimate],
    files: Collection[str],
    book: Book,
    occupants: Collection[Occupant],
    *,
    rule: str,
    waited_s: float,
) -> InsufficientMemory:
    """Return the error for a load that could do with any step of `ladder` and gets none.

    `rule` is where the budget comes from.
    """
    least = min(ladder, key=lambda step: step.total_bytes)
    needs = f"{unique} needs {size(least.total_bytes)}"
    if least.total_bytes > book.budget_bytes:
        return InsufficientMemory(
            f"{needs}, but all models together may take {size(book.budget_bytes)} ({rule}): "
            f"{_with_less(least)}",
            should_retry=False,
        )
    free = book.room((), files)
    waited = f" after {waited_s:.0f} s of waiting" if waited_s >= 1 else ""
    left = size(max(0, free))
    if free >= least.total_bytes:
        why = f"others wait for it too, and come first{waited}"
        help_ = "try again soon"
    elif book.unbooked_bytes() <= book.free_bytes():
        why = f"only {left} is left of the {size(book.budget_bytes)} for models ({rule}){waited}"
        help_ = " or ".join(_unload(book, occupants)) or _with_less(least)
    else:
        why = f"only {left} of RAM is free{waited}"
        if book.watermark_bytes:
            why += f", besides {size(book.watermark_bytes)} that are left alone"
        help_ = " or ".join([*_unload(book, occupants), "close other programs"])
    return InsufficientMemory(
        f"{needs}, but {why}; {_holders(book, occupants)}: {help_}", retry_after_s=_RETRY_AFTER_S
    )


def _with_less(least: MemoryEstimate) -> str:
    text = "use a smaller model or quantization"
    if least.context_length > _SHORTEST_CONTEXT:
        text += f", or a context_length of less than {least.context_length}"
    return text


def _holders(book: Book, occupants: Collection[Occupant]) -> str:
    if not book.reservations:
        return "no model is loaded"
    standings = {occupant.model_id: occupant.standing for occupant in occupants}
    parts = [
        f"{entry.unique} has {size(entry.reserved_bytes)}{_WORDS[standings[model_id]]}"
        for model_id, entry in book.reservations.items()
    ]
    return ", ".join(parts)


def _unload(book: Book, occupants: Collection[Occupant]) -> list[str]:
    """Return what can be done about models that hold memory."""
    pinned = [o.model_id for o in occupants if o.standing is Standing.FIXED]
    ways = []
    if len(pinned) < len(occupants):
        ways.append("unload a model")
    if pinned:
        ways.append(f"unpin one (`modeld unpin {book.reservations[pinned[0]].unique}`)")
    return ways
