"""What models that pool read: texts, and pairs of a query and a document, as tokens that fit."""

from __future__ import annotations

from backends import gguf
from backends.contract import BackendError
from backends.llama_cpp.model import Model
from backends.room import context_exceeded

_RERANK_TEMPLATE = b"rerank"


class Texts:
    """Tokenizes for `model`, which reads at most `limit` tokens at once. Thread-safe.

    With `truncate`, what is too long is cut before the marks at its end. Raises BackendError for
    what is empty or too long.
    """

    def __init__(self, model: Model, limit: int) -> None:
        self._vocabulary = model.vocabulary
        self._limit = limit
        template = model.engine.llama_model_chat_template(model.pointer, _RERANK_TEMPLATE)
        self._template = None if template is None else template.decode("utf-8", "replace")

    def single(self, text: str, *, truncate: bool) -> list[int]:
        """Return the tokens of a text."""
        tokens = self._vocabulary.tokenize(self._bounded(text))
        return self._fitting([], tokens[:-1], tokens[-1:], truncate=truncate)

    def pair(self, query: str, document: str, *, truncate: bool) -> list[int]:
        """Return the tokens of a query and a document; it is the document that may be cut.

        A template of the model's own comes first; else it is the order of llama.cpp's server.
        """
        tokenize = self._vocabulary.tokenize
        asked = self._bounded(query)
        if self._template is None:
            head, tail = self._vocabulary.pair(asked)
        else:
            parts = self._template.partition("{document}")
            before, _, after = (part.replace("{query}", asked) for part in parts)
            head, tail = tokenize(before, add_special=False), tokenize(after, add_special=False)
        body = tokenize(self._bounded(document), add_special=False, parse_special=False)
        return self._fitting(head, body, tail, truncate=truncate)

    def _bounded(self, text: str) -> str:
        """Return no more of `text` than can matter: tokenizing can't be interrupted."""
        if not text:
            raise BackendError("invalid_request", "one of the texts is empty")
        return text[: gguf.MAX_CHARS_PER_TOKEN * (self._limit + 1)]

    def _fitting(
        self, head: list[int], body: list[int], tail: list[int], *, truncate: bool
    ) -> list[int]:
        room = self._limit - len(head) - len(tail)
        if len(body) > room and (not truncate or room < 1):
            raise context_exceeded(len(head) + len(body) + len(tail), self._limit)
        return head + body[:room] + tail
