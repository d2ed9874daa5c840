"""From text to tokens, without the ways in which the engine's own tokenizer fails.

Owns the algorithm for GPT-like vocabularies, and how other text is handed to the engine. The engine
(0.2.27) matches words with `std::regex`, whose recursion ends the process at 40,000 letters in a
row, and takes time that grows with the cube of their number: 45 s for 20,000. Its binding makes
room for a token a character, and a character may be four.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ctypes import c_int
from typing import Any

# The words that vocabularies of this kind are made of; letters, digits and spaces of ASCII.
_WORDS = re.compile(
    rb"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
)
# What these engines look for before they split words, where the vocabulary has it.
SPECIAL_TOKENS: Mapping[str, tuple[bytes, ...]] = {
    "dolly-v2": (b"### End", b"### Instruction:", b"### Response:"),
    "starcoder": (
        *(b"<|system|>", b"<|user|>", b"<|assistant|>", b"<|end|>"),
        *(b"<fim-prefix>", b"<fim-middle>", b"<fim-suffix>", b"<fim-pad>", b"<|end_of_turn|>"),
    ),
}
# Replit's tokenizer compares every part of a text with its vocabulary, and gives up on a whole text
# for one character that it lacks: it gets no more than this at once, cut before spaces.
_REPLIT_PIECES = re.compile(r".{1,100}(?=\s|\Z)|.{1,100}", re.DOTALL)

Tokenize = Callable[[str], list[int]]


def tokenizer(llm: Any, architecture: str) -> Tokenize:
    """Return a function from text, which has no NUL, to the tokens of the loaded model `llm`."""
    if architecture in ("llama", "falcon"):
        return lambda text: _by_engine(llm, text, begin=architecture == "llama")
    if architecture == "replit":
        return lambda text: [
            token
            for piece in _REPLIT_PIECES.findall(text)
            for token in _by_engine(llm, piece, begin=False)
        ]
    pieces = [llm.ctransformers_llm_detokenize(token) for token in range(llm.vocab_size)]
    return LongestMatch(pieces, SPECIAL_TOKENS.get(architecture, ())).tokenize


def _by_engine(llm: Any, text: str, *, begin: bool) -> list[int]:
    raw = text.encode()
    found = (c_int * (2 * len(raw) + 16))()
    count = llm.ctransformers_llm_tokenize(raw, begin, found)
    return list(found[:count])


class LongestMatch:
    """Splits text into words and each word into the longest tokens there are, from its beginning.

    `pieces` are the vocabulary's tokens; of equal ones the last counts. `special` are those that
    are words of their own wherever they stand. Bytes that no token has are left out.
    """

    def __init__(self, pieces: Iterable[bytes], special: Sequence[bytes]) -> None:
        self._ids = {piece: token for token, piece in enumerate(pieces) if piece}
        self._longest: dict[int, int] = {}  # by first byte
        for piece in self._ids:
            self._longest[piece[0]] = max(self._longest.get(piece[0], 0), len(piece))
        known = [re.escape(text) for text in special if text in self._ids]
        self._special = re.compile(b"(" + b"|".join(known) + b")") if known else None

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of `text`."""
        return [token for word in self._words(text.encode()) for token in self._match(word)]

    def _words(self, text: bytes) -> Iterator[bytes]:
        parts = self._special.split(text) if self._special else [text]
        for number, part in enumerate(parts):
            if number % 2:
                yield part
            else:
                yield from _WORDS.findall(part)

    def _match(self, word: bytes) -> Iterator[int]:
        at = 0
        while at < len(word):
            for length in range(min(self._longest.get(word[at], 1), len(word) - at), 0, -1):
                token = self._ids.get(word[at : at + length])
                if token is not None:
                    yield token
                    break
            at += length
