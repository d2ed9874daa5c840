"""One loaded model: its tokens, its KV cache, and how the next token is drawn.

Owns every call of the engine after its import. Knows no request. Single-threaded.
"""

from __future__ import annotations

from ctypes import c_int
from pathlib import Path
from typing import Any, TypeVar

from backends.contract import BackendError, Cancelled, LoadSpec, Sampling
from backends.ctransformers import memory
from backends.ctransformers.tokens import tokenizer

_T = TypeVar("_T")
_END = b"<|endoftext|>"
_GREEDY = 1e-4  # a temperature below takes the likeliest token: the engine would divide by it


def build(root: Path) -> str | None:
    """Return which of the engine's builds below `root` suits this CPU; None: let it choose.

    Its own way of finding out takes a second and another process.
    """
    builds = root / "lib"
    if (builds / "local").is_dir() or not (builds / "avx2").is_dir():
        return None
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return None
    if "avx2" in flags:
        return "avx2"
    return "avx" if {"avx", "f16c"} <= flags else "basic"


class Model:
    """A model in memory. `context_length` and `batch` are settled when it is loaded.

    Raises BackendError("load_failed").
    """

    def __init__(self, spec: LoadSpec) -> None:
        import ctransformers
        from ctransformers.llm import LLM, Config

        artifact = spec.artifact
        length = memory.settle_context_length(artifact, spec.context_length)
        try:
            _check_size(spec)
            self._llm: Any = LLM(
                _path(spec),
                artifact.architecture,
                config=Config(context_length=length),
                lib=build(Path(ctransformers.__file__).parent),
            )
        except Exception as error:
            raise BackendError(
                "load_failed",
                f"ctransformers could not load {artifact.path} as a {artifact.architecture} "
                f"model: {error}; what is wrong with the file is in the log",
            ) from error
        self.context_length = min(length, self._llm.context_length)
        self.batch = memory.batch_size(artifact, spec.threads, self.context_length)
        self.tokenize = tokenizer(self._llm, artifact.architecture)
        self._threads = spec.threads
        # The engine lays out falcon's cache by its length, so that it can only be gone on from.
        self._rewinds = artifact.architecture != "falcon"
        self._evaluated: list[int] = []  # the tokens that the KV cache holds
        self._enlarge_buffer(spec)

    def _enlarge_buffer(self, spec: LoadSpec) -> None:
        """Make the engine's buffer large enough for a full context, where it has one for all.

        The first computation tells the engine what a token takes, and it makes room for so much
        times the tokens of a batch; it does not reckon with a longer context. So let the first one
        be of a single token with much context, and then compute a batch that is large enough.
        """
        artifact = spec.artifact
        if not memory.grows(artifact):
            return
        needed = memory.computing_bytes(artifact, self.batch, self.context_length)
        if needed <= memory.BUFFER_BYTES:
            return
        past = self.context_length - 1
        while past and memory.computing_bytes(artifact, 1, past + 1) > memory.BUFFER_BYTES:
            past //= 2
        self.evaluate([0], past)
        known = memory.computing_bytes(artifact, 1, past + 1) * 3 // 4  # at least
        self.evaluate([0] * (needed // known + 1), 0)
        self._evaluated.clear()

    @property
    def embedding(self) -> list[float]:
        """The state of the last token that was evaluated, for llama and falcon."""
        return list(self._llm.embeddings)

    def text(self, token: int) -> bytes:
        """Return the bytes of a token; a token that ends a text has none."""
        raw: bytes = self._llm.ctransformers_llm_detokenize(token)
        return b"" if self.ends(token) else raw

    def ends(self, token: int) -> bool:
        """Say whether this token ends a text."""
        return bool(
            self._llm.is_eos_token(token) or self._llm.ctransformers_llm_detokenize(token) == _END
        )

    def read(self, tokens: list[int], cancelled: Cancelled) -> int | None:
        """Bring all tokens of a prompt into the KV cache, the last one anew.

        Returns how many were there already, or None if that was cancelled.
        """
        cached = 0
        for have, want in zip(self._evaluated, tokens[:-1], strict=False):
            if have != want:
                break
            cached += 1
        if not self._rewinds and cached < len(self._evaluated):
            cached = 0
        for start in range(cached, len(tokens), self.batch):
            if cancelled():
                return None
            self.evaluate(tokens[start : start + self.batch], start)
        return cached

    def extend(self, token: int) -> None:
        """Bring one more token into the KV cache. The caller keeps within the context."""
        self.evaluate([token], len(self._evaluated))

    def evaluate(self, tokens: list[int], past: int) -> None:
        """Compute `tokens`, before which there are `past` others in the KV cache."""
        del self._evaluated[past:]
        count = len(tokens)
        done = self._llm.ctransformers_llm_batch_eval(
            (c_int * count)(*tokens), count, past, count, self._threads
        )
        if not done:
            raise BackendError("engine_error", "ctransformers could not compute the next tokens")
        self._evaluated += tokens

    def sample(self, sampling: Sampling, seed: int) -> int:
        """Draw a token. The engine begins anew with its seed each time, so each gets its own."""
        default = self._llm.config
        temperature = _given(sampling.temperature, default.temperature)
        vocabulary = self._llm.vocab_size
        top_k = min(_given(sampling.top_k, default.top_k), vocabulary)
        if top_k <= 0:
            top_k = vocabulary
        if temperature < _GREEDY:
            temperature, top_k = 1.0, 1
        last = self._evaluated[-default.last_n_tokens :]
        token: int = self._llm.ctransformers_llm_sample(
            (c_int * len(last))(*last),
            len(last),
            top_k,
            _given(sampling.top_p, default.top_p),
            temperature,
            _given(sampling.repeat_penalty, default.repetition_penalty),
            seed,
        )
        return token


def _check_size(spec: LoadSpec) -> None:
    """Raise ValueError for a file that has become shorter: the engine would not notice."""
    for file in spec.artifact.files[:1]:
        if (size_bytes := Path(file.path).stat().st_size) != file.size_bytes:
            raise ValueError(f"it has {size_bytes} bytes, and had {file.size_bytes}")


def _path(spec: LoadSpec) -> str:
    """Return the path to give to the engine, which looks for `70b` in it to read a llama model.

    That is how it tells that the heads of a layer share keys and values, eight to one.
    """
    artifact = spec.artifact
    if artifact.architecture != "llama":
        return artifact.path
    shared = memory.number(artifact, "attention_rows") < memory.number(artifact, "embedding")
    link = Path(spec.scratch_dir) / ("70b.bin" if shared else "model.bin")
    link.unlink(missing_ok=True)
    link.symlink_to(artifact.path)
    return str(link)


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value
