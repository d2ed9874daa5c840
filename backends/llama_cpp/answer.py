"""The text of one answer, token by token, with the log-probabilities of its tokens. Pure."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence

from backends.contract import Delta, TokenLogprob
from backends.text import StopScanner


class AnswerText:
    """Turns tokens into deltas; a log-probability goes with the text that its token completes.

    A character may be spread over tokens, and text that may begin a stop sequence is held back: the
    entries of those tokens wait for it. Entries of a stop sequence alone are left out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._scanner = StopScanner(stops)
        # Counts characters as the scanner sees them, to know where each token's text ends.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._seen_chars = 0
        self._sent_chars = 0
        self._split: list[TokenLogprob] = []
        self._waiting: deque[tuple[int, list[TokenLogprob]]] = deque()
        self._last_end = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence has appeared."""
        return self._scanner.stopped

    @property
    def stopped_by(self) -> str:
        """The stop sequence that has appeared, if one has."""
        return self._scanner.stopped_by

    def feed(self, piece: bytes, entry: TokenLogprob | None = None) -> Delta | None:
        """Take the next token; return what is now certain, or None if that is nothing."""
        if entry is not None:
            self._seen_chars += len(self._decoder.decode(piece))
            self._split.append(entry)
            if not self._decoder.getstate()[0]:
                self._waiting.append((self._seen_chars, self._split))
                self._split = []
        text = self._scanner.feed(piece)
        self._sent_chars += len(text)
        return self._delta(text, self._entries())

    def flush(self) -> Delta | None:
        """Return what was held back, at the end of an answer that no stop sequence ended."""
        if self.stopped:
            return None
        entries = [entry for _, group in self._waiting for entry in group] + self._split
        self._waiting.clear()
        self._split = []
        return self._delta(self._scanner.flush(), entries)

    def _entries(self) -> list[TokenLogprob]:
        """Take the entries whose text is out; at a stop sequence also that of a token it splits."""
        entries: list[TokenLogprob] = []
        while self._waiting:
            end, group = self._waiting[0]
            split_by_stop = self.stopped and self._last_end < self._sent_chars
            if end > self._sent_chars and not split_by_stop:
                break
            entries += group
            self._last_end = end
            self._waiting.popleft()
        if self.stopped and self._last_end < self._sent_chars:
            # The last of the text came with the first part of a character that goes on after it.
            entries += self._split
            self._split = []
        return entries

    @staticmethod
    def _delta(text: str, entries: list[TokenLogprob]) -> Delta | None:
        if not text and not entries:
            return None
        return Delta(content=text, logprobs=tuple(entries))
