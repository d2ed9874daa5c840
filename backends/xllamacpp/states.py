"""Saved conversations: the engine writes what a slot holds to a file, and reads it again.

It does so in one folder alone, the worker's own, from which links lead to the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from backends import conversations, gguf
from backends.contract import LoadSpec, SavedConversation
from backends.xllamacpp.listener import Listener


class States:
    """What the slots of the engine behind `listener` hold, which was loaded by `spec`."""

    def __init__(self, listener: Listener, spec: LoadSpec) -> None:
        self._listener = listener
        self._scratch = spec.scratch_dir
        self._slots = spec.slots
        # A text that is pooled leaves nothing, and the engine saves no slots that may hold images.
        self._has_any = not (gguf.pools(spec.artifact) or spec.artifact.paths("mmproj"))
        # With a sliding window a file has less, and checkpoints: that is not known beforehand.
        self._bytes_per_token = (
            0
            if gguf.window_length(spec.artifact)
            else gguf.kv_bytes_per_token(spec.artifact, spec.engine)
        )
        self._restored: dict[int, int] = {}  # tokens by slot

    def save(self, folder: str, limit_bytes: int) -> tuple[SavedConversation, ...]:
        """See Resumes.save_state."""
        if not self._has_any:
            return ()
        return conversations.save(folder, limit_bytes, self._held())

    def _held(self) -> Iterator[conversations.Held]:
        for entry in self._listener.get("/slots"):
            slot = entry["id"]
            # Of a slot that nothing has run on the engine does not tell this.
            tokens = entry.get("n_prompt_tokens", self._restored.get(slot, 0))
            yield conversations.Held(
                tokens=tokens,
                write=partial(self._write, slot),
                expected_bytes=tokens * self._bytes_per_token,
            )

    def _write(self, slot: int, path: Path) -> None:
        with conversations.linked(path, self._scratch) as name:
            self._listener.post(f"/slots/{slot}?action=save", {"filename": name})

    def restore(self, folder: str, wanted: Sequence[SavedConversation]) -> tuple[str, ...]:
        """See Resumes.restore_state.

        The slot of the first is the last that the engine would take for another conversation.
        """
        if not self._has_any:
            return ()
        return conversations.restore(folder, wanted, self._slots, self._read)

    def _read(self, slot: int, path: Path) -> None:
        with (
            gguf.refitted(path, self._scratch, self._slots) as fitting,
            conversations.linked(fitting, self._scratch) as name,
        ):
            done = self._listener.post(f"/slots/{slot}?action=restore", {"filename": name})
        self._restored[slot] = done["n_restored"]
