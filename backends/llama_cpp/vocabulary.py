"""A loaded model's tokens: from text and back. Thread-safe; knows no context and no sampling."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

from backends.contract import BackendError


class Vocabulary:
    """The vocabulary of `model`, a pointer that must outlive it."""

    def __init__(self, model: Any) -> None:
        import llama_cpp

        self._engine = llama_cpp
        self.pointer = llama_cpp.llama_model_get_vocab(model)
        self.size: int = llama_cpp.llama_vocab_n_tokens(self.pointer)
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the tokens of `text`.

        `add_special` puts the marks around it that the vocabulary asks for; `parse_special` reads
        the names of special tokens as such.
        """
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 16
        while True:
            tokens = (self._engine.llama_token * room)()
            count: int = self._engine.llama_tokenize(
                self.pointer, raw, len(raw), tokens, room, add_special, parse_special
            )
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return what `token` adds to a text; nothing for a control token unless `special`."""
        known = self._pieces.get((token, special))
        if known is None:
            known = self._pieces[token, special] = self._read_piece(token, special)
        return known

    def _read_piece(self, token: int, special: bool) -> bytes:  # noqa: FBT001
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length: int = self._engine.llama_token_to_piece(
                self.pointer, token, buffer, room, 0, special
            )
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def special_text(self, token: int) -> str:
        """Return the name of a special token; "" if the vocabulary has none (-1)."""
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        """Say whether `token` ends a generation."""
        return bool(self._engine.llama_vocab_is_eog(self.pointer, token))

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """All tokens that end a generation."""
        return tuple(token for token in range(self.size) if self.ends(token))

    @cached_property
    def suppressed_tokens(self) -> tuple[int, ...]:
        """Tokens that the model's own header forbids in answers."""
        count = ctypes.c_int32(0)
        found = self._engine.llama_vocab_get_suppress_tokens(self.pointer, ctypes.byref(count))
        return tuple(found[: count.value]) if found else ()

    @property
    def bos(self) -> int:
        """The token that begins a text, or -1."""
        return int(self._engine.llama_vocab_bos(self.pointer))

    @property
    def eos(self) -> int:
        """The token that ends a text, or -1."""
        return int(self._engine.llama_vocab_eos(self.pointer))

    @property
    def begins_with_bos(self) -> bool:
        """Whether the model expects `bos` before every text."""
        return bool(self._engine.llama_vocab_get_add_bos(self.pointer))

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt, which are never none. Raises BackendError."""
        tokens = self.tokenize(text) or [self.bos]
        if tokens == [-1]:
            raise BackendError(
                "invalid_request",
                "the prompt is empty, and this model has no token to begin a text with",
            )
        return tokens

    def infill(self, prefix: str, suffix: str, marks: tuple[int, int, int]) -> list[int]:
        """Return the prompt for what stands between `prefix` and `suffix`.

        `marks` are the tokens that announce the prefix, the suffix and the middle.
        """
        begin = [self.bos] if self.begins_with_bos and self.bos >= 0 else []
        before = self.tokenize(prefix, add_special=False)
        after = self.tokenize(suffix, add_special=False)
        return [*begin, marks[0], *before, marks[1], *after, marks[2]]

    def pair(self, query: str) -> tuple[list[int], list[int]]:
        """Return what a reranker reads before and after a document that is to answer `query`.

        The order is that of llama.cpp's server: [BOS] query [EOS] [SEP] document [EOS].
        """
        engine = self._engine
        sep: int = engine.llama_vocab_sep(self.pointer)
        eos = self.eos if self.eos >= 0 else sep
        ends = [eos] if engine.llama_vocab_get_add_eos(self.pointer) and eos >= 0 else []
        separates = [sep] if engine.llama_vocab_get_add_sep(self.pointer) and sep >= 0 else []
        begins = [self.bos] if self.begins_with_bos and self.bos >= 0 else []
        asked = self.tokenize(query, add_special=False, parse_special=False)
        return [*begins, *asked, *ends, *separates], ends
