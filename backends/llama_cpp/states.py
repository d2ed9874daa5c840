"""Saved conversations: a sequence of the KV cache to a file, with its tokens, and back.

To be called on the thread that owns the model's context, while nothing is computed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from backends import conversations, gguf
from backends.contract import BackendError, SavedConversation
from backends.llama_cpp.model import Model
from backends.llama_cpp.slots import Slot


def save(
    model: Model, slots: Sequence[Slot], folder: str, limit_bytes: int
) -> tuple[SavedConversation, ...]:
    """See Resumes.save_state. What came after an image is not known, so it is left out."""
    held = [
        conversations.Held(
            tokens=len(slot.tokens),
            write=partial(_write, model, slot),
            expected_bytes=model.engine.llama_state_seq_get_size(model.context, slot.sequence),
        )
        for slot in slots
        if slot.saveable
    ]
    return conversations.save(folder, limit_bytes, held)


def _write(model: Model, slot: Slot, path: Path) -> None:
    tokens = (model.engine.llama_token * len(slot.tokens))(*slot.tokens)
    written = model.engine.llama_state_seq_save_file(
        model.context, os.fsencode(path), slot.sequence, tokens, len(tokens)
    )
    if written == 0 or written != path.stat().st_size:
        raise BackendError("engine_error", f"llama.cpp can't write {path}")


def restore(
    model: Model, slots: Sequence[Slot], folder: str, wanted: Sequence[SavedConversation]
) -> tuple[str, ...]:
    """See Resumes.restore_state. The first is the last to make room for another conversation."""

    def read(at: int, path: Path) -> None:
        slots[at].resume(_read(model, slots, at, path), last_used=len(slots) - at)

    return conversations.restore(folder, wanted, len(slots), read)


def _read(model: Model, slots: Sequence[Slot], at: int, path: Path) -> list[int]:
    """Fill the sequence of a slot from a file and return its tokens; or leave it empty."""
    sequence = slots[at].sequence
    with gguf.refitted(path, model.scratch_dir, len(slots)) as fitting:
        tokens = _load(model, sequence, fitting, room=model.context_length)
    last = model.engine.llama_memory_seq_pos_max(model.memory, sequence)
    known = all(0 <= token < model.vocabulary.size for token in tokens)
    if not tokens or not known or last + 1 != len(tokens):
        model.engine.llama_memory_seq_rm(model.memory, sequence, -1, -1)
        raise BackendError("engine_error", "llama.cpp refuses it")
    return tokens


def _load(model: Model, sequence: int, path: Path, *, room: int) -> list[int]:
    tokens = (model.engine.llama_token * room)()
    count = ctypes.c_size_t()
    read = model.engine.llama_state_seq_load_file(
        model.context, os.fsencode(path), sequence, tokens, room, ctypes.byref(count)
    )
    return tokens[: count.value] if read else []
