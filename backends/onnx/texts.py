"""From texts to tokens: what fits into the context, what is cut, what is refused.

Owns the tokenizer. Thread-safe: the tokenizer's own state is set once and never again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from backends.contract import BackendError, Sampling
from backends.room import check_room

MAX_CHARS_PER_TOKEN = 128  # of any real tokenizer; 64 were seen, for runs of spaces


class Text(NamedTuple):
    """A text, or a pair of them, as tokens. `types` says which of a pair each is of."""

    ids: list[int]
    types: list[int]


class Texts:
    """The tokenizer in a tokenizer.json, for texts of at most `context_length` tokens."""

    def __init__(self, path: str, context_length: int) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(path)
        except Exception as error:
            raise BackendError(
                "load_failed", f"{path} cannot be read by tokenizers: {error}"
            ) from error
        # What the file says of these is how the model was trained: all texts of one length.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._context_length = context_length

    def padding_id(self, default: int) -> int:
        """Return the id of the token that fills batches up."""
        for name in ("[PAD]", "<pad>", "<|endoftext|>"):
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return int(token)
        return default

    def one(self, text: str, what: str, *, truncate: bool) -> Text:
        """Return a text's tokens; messages call it `what`. Raises BackendError."""
        if not text:
            raise BackendError("invalid_request", f"{what} is empty")
        room = self._context_length
        encoded = self._tokenizer.encode(self._bounded(text, what, truncate=truncate))
        if len(encoded.ids) > room:
            if not truncate:
                raise self._too_long(what, len(encoded.ids))
            plain = self._plain(text)
            plain.truncate(max(0, room - self._tokenizer.num_special_tokens_to_add(False)))
            encoded = self._tokenizer.post_process(plain)
        return Text(encoded.ids, encoded.type_ids)

    def pair(self, first: str, second: str, what: str, *, truncate: bool) -> Text:
        """Return the tokens of two texts together; `truncate` cuts the second. See `one`."""
        if not first or not second:
            missing = "the query" if not first else what
            raise BackendError("invalid_request", f"{missing} is empty")
        room = self._context_length
        head = self._bounded(first, "the query", truncate=False)
        encoded = self._tokenizer.encode(head, self._bounded(second, what, truncate=truncate))
        if len(encoded.ids) > room:
            if not truncate:
                raise self._too_long(f"{what} with the query", len(encoded.ids))
            query = self._plain(head)
            left = room - self._tokenizer.num_special_tokens_to_add(True) - len(query.ids)
            if left < 1:
                raise self._too_long("the query", len(query.ids))
            plain = self._plain(second)
            plain.truncate(left)
            encoded = self._tokenizer.post_process(query, plain)
        return Text(encoded.ids, encoded.type_ids)

    def prompt(self, text: str, sampling: Sampling, *, special: bool) -> list[int]:
        """Return the tokens of a prompt, which leave room for its answer: see check_room."""
        ids = self.ids(text, special=special)
        check_room(len(ids), sampling, self._context_length)
        if not ids:
            raise BackendError("invalid_request", "the prompt is empty")
        return ids

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a prompt, which may be longer than the context, but not hopelessly.

        `special` adds the tokens that the tokenizer puts around a text: chat templates do it too.
        """
        if len(text) > MAX_CHARS_PER_TOKEN * self._context_length:
            raise BackendError(
                "context_length_exceeded",
                f"the prompt has {len(text)} characters, which cannot fit a context_length of "
                f"{self._context_length} tokens: shorten it",
                tokens=-(-len(text) // MAX_CHARS_PER_TOKEN),
            )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decoder(self) -> Callable[[int], str]:
        """Return what turns one token after the other into text: whole characters, or nothing."""
        from tokenizers.decoders import DecodeStream

        stream: Any = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def _plain(self, text: str) -> Any:
        kept = text[: MAX_CHARS_PER_TOKEN * self._context_length]
        return self._tokenizer.encode(kept, add_special_tokens=False)

    def _bounded(self, text: str, what: str, *, truncate: bool) -> str:
        """Cut or refuse a hopeless text before it is tokenized, which can't be interrupted."""
        most = MAX_CHARS_PER_TOKEN * self._context_length
        if len(text) > most and not truncate:
            raise BackendError(
                "context_length_exceeded",
                f"{what} has {len(text)} characters, which cannot fit a context_length of "
                f"{self._context_length} tokens: shorten it, or ask for it to be cut (truncate)",
                tokens=-(-len(text) // MAX_CHARS_PER_TOKEN),
            )
        return text[:most]

    def _too_long(self, what: str, tokens: int) -> BackendError:
        return BackendError(
            "context_length_exceeded",
            f"{what} has {tokens} tokens, but the model was loaded with a context_length of "
            f"{self._context_length}: shorten it, or ask for it to be cut (truncate)",
            tokens=tokens,
        )
