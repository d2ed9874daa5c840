"""How the next token of an answer is chosen: the samplers, the grammar, log-probabilities.

The chain, its order and its defaults are those of llama.cpp's own programs (common/sampling.cpp,
common/common.h). A `Sampler` is used by one thread at a time and knows no context.
"""

from __future__ import annotations

import ctypes
import json
import math
from typing import TYPE_CHECKING, Any

from backends import grammars
from backends.contract import BackendError, Sampling, TokenLogprob
from backends.llama_cpp import log
from backends.llama_cpp.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TOP_K = 40
_TOP_P = 0.95
_MIN_P = 0.05
_TEMPERATURE = 0.8
_PENALTY_TOKENS = 64
_RANDOM_SEED = 0xFFFFFFFF

# The binding's converter nests a bracket for each repetition that may be missing, and the engine's
# parser calls itself for each.
_MAX_REPEATS = 1000
_MAX_NESTING = 1200


class Candidates:
    """The tokens to choose from, in the engine's form: one buffer for all samplers of a thread."""

    def __init__(self, vocabulary_size: int) -> None:
        import llama_cpp
        import numpy as np

        layout = [("id", np.int32), ("logit", np.float32), ("p", np.float32)]
        fresh = np.zeros(vocabulary_size, dtype=layout)
        fresh["id"] = np.arange(vocabulary_size, dtype=np.int32)
        self._data = np.empty_like(fresh)
        # numpy copies records field by field, which takes twenty times as long as their bytes
        self._fresh_bytes, self._bytes = fresh.view(np.uint8), self._data.view(np.uint8)
        self._first = self._data.ctypes.data_as(llama_cpp.llama_token_data_p)
        self._array = llama_cpp.llama_token_data_array()
        self.reference = ctypes.byref(self._array)

    def reset(self, logits: NDArray[np.float32]) -> None:
        """Start with all tokens and their logits."""
        self._bytes[:] = self._fresh_bytes
        self._data["logit"] = logits
        # Samplers drop and sort candidates in place, and may even put other memory here.
        self._array.data = self._first
        self._array.size = len(self._data)
        self._array.selected = -1
        self._array.sorted = False

    @property
    def chosen(self) -> int | None:
        """The token that a sampler chose; None if it had nothing to choose from."""
        at = self._array.selected
        return int(self._array.data[at].id) if at >= 0 else None


class Sampler:
    """The samplers of one request. `free` it; raises BackendError for what it can't follow."""

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling) -> None:
        import llama_cpp

        self._engine = llama_cpp
        self._vocabulary = vocabulary
        self._grammar: Any = _grammar(vocabulary, sampling)
        self._chain: Any = None
        self._penalizes = False
        try:
            biases = _biases(vocabulary, sampling, grammar=bool(self._grammar))
            self._chain = self._build(sampling, biases)
        except BackendError:
            self.free()
            raise

    def _build(self, sampling: Sampling, biases: dict[int, float]) -> Any:
        engine, size = self._engine, self._vocabulary.size
        chain = engine.llama_sampler_chain_init(engine.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            engine.llama_sampler_chain_add(chain, sampler)

        if biases:
            table = (engine.llama_logit_bias * len(biases))(*biases.items())
            add(engine.llama_sampler_init_logit_bias(size, len(biases), table))
        penalties = (
            _or(sampling.repeat_penalty, 1.0),
            _or(sampling.frequency_penalty, 0.0),
            _or(sampling.presence_penalty, 0.0),
        )
        if penalties[0] <= 0:
            raise BackendError(
                "invalid_request", f"repeat_penalty is {penalties[0]}, but must be over 0"
            )
        if penalties != (1.0, 0.0, 0.0):
            self._penalizes = True
            add(engine.llama_sampler_init_penalties(size, _PENALTY_TOKENS, *penalties))
        temperature = _or(sampling.temperature, _TEMPERATURE)
        if temperature <= 0:
            add(engine.llama_sampler_init_greedy())
            return chain
        add(engine.llama_sampler_init_top_k(int(_or(sampling.top_k, _TOP_K))))
        add(engine.llama_sampler_init_top_p(_or(sampling.top_p, _TOP_P), 1))
        add(engine.llama_sampler_init_min_p(_or(sampling.min_p, _MIN_P), 1))
        add(engine.llama_sampler_init_temp(temperature))
        seed = _RANDOM_SEED if sampling.seed is None else sampling.seed & 0xFFFFFFFF
        add(engine.llama_sampler_init_dist(seed))
        return chain

    def read(self, prompt: list[int]) -> None:
        """Take the prompt's last tokens into account: penalties count them too."""
        if self._penalizes:
            for token in prompt[-_PENALTY_TOKENS:]:
                self._engine.llama_sampler_accept(self._chain, token)

    def choose(self, candidates: Candidates, logits: NDArray[np.float32]) -> int | None:
        """Return the next token, or None if the grammar and the biases leave none.

        Checking one token against a grammar is cheap and filtering all of them is not, so that is
        done only if the grammar refuses what was chosen without it.
        """
        token = self._sample(candidates, logits, grammar=False)
        if self._grammar:
            if token is None or not self._fits(token):
                token = self._sample(candidates, logits, grammar=True)
            # The engine ends the process when its grammar is given a token that it does not allow.
            if token is None or not self._fits(token):
                return None
            self._engine.llama_sampler_accept(self._grammar, token)
        if token is not None:
            self._engine.llama_sampler_accept(self._chain, token)
        return token

    def _sample(
        self, candidates: Candidates, logits: NDArray[np.float32], *, grammar: bool
    ) -> int | None:
        candidates.reset(logits)
        if grammar:
            self._engine.llama_sampler_apply(self._grammar, candidates.reference)
        self._engine.llama_sampler_apply(self._chain, candidates.reference)
        return candidates.chosen

    def _fits(self, token: int) -> bool:
        engine = self._engine
        single = engine.llama_token_data(token, 1.0, 0.0)
        array = engine.llama_token_data_array(ctypes.pointer(single), 1, -1, False)
        engine.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(array.data[0].logit > -math.inf)

    def free(self) -> None:
        """Give the engine's memory back. May be called twice."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                self._engine.llama_sampler_free(sampler)
        self._chain = self._grammar = None


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _biases(vocabulary: Vocabulary, sampling: Sampling, *, grammar: bool) -> dict[int, float]:
    """Return what is added to the logits of tokens. Raises BackendError for unknown tokens."""
    for token in sampling.logit_bias:
        if not 0 <= token < vocabulary.size:
            raise BackendError(
                "invalid_request",
                f"logit_bias names token {token}, but this model's tokens are 0 to "
                f"{vocabulary.size - 1}",
            )
    biases = dict(sampling.logit_bias)
    biases |= dict.fromkeys(vocabulary.suppressed_tokens, -math.inf)
    if sampling.ignore_eos and not grammar:  # an answer that is complete leaves nothing else
        biases |= dict.fromkeys(vocabulary.end_tokens, -math.inf)
    return biases


def _grammar(vocabulary: Vocabulary, sampling: Sampling) -> Any:
    """Return the engine's sampler for the request's grammar or schema; None if it has neither."""
    import llama_cpp

    if sampling.json_schema is not None:
        source, named = _gbnf(sampling.json_schema), "the grammar made from the json_schema"
    elif sampling.grammar:
        source, named = sampling.grammar, "the grammar"
    else:
        return None
    if grammars.nesting(source) > _MAX_NESTING:
        raise BackendError("invalid_request", f"{named} is nested too deep for this engine")
    with log.overheard() as errors:
        grammar = llama_cpp.llama_sampler_init_grammar(
            vocabulary.pointer, source.encode("utf-8", "replace"), b"root"
        )
    if not grammar:
        said = errors[0] if errors else "it cannot be parsed"
        raise BackendError(
            "invalid_request", f"{named} is refused: {said} (the model's log may say where)"
        )
    return grammar


def _gbnf(schema: dict[str, Any]) -> str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    grammars.check_repeats(schema, _MAX_REPEATS)
    try:
        return str(json_schema_to_gbnf(json.dumps(schema or {"type": "object"})))
    except Exception as error:
        raise BackendError(
            "invalid_request",
            f"the json_schema is refused: {error or type(error).__name__}",
        ) from error


def logprob(
    vocabulary: Vocabulary, logits: NDArray[np.float32], token: int, alternatives: int
) -> TokenLogprob:
    """Return the log-probability of `token` before any sampler, with so many of the likeliest."""
    import numpy as np

    shifted = logits - logits.max()
    logs = shifted - math.log(float(np.exp(shifted).sum(dtype=np.float64)))
    count = min(alternatives, len(logs))
    likeliest = np.argpartition(logs, -count)[-count:] if count else np.empty(0, dtype=np.intp)
    likeliest = likeliest[np.argsort(-logs[likeliest], kind="stable")]

    def entry(token: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        piece = vocabulary.piece(token, special=True)
        return TokenLogprob(
            token=piece.decode("utf-8", "replace"),
            logprob=float(logs[token]),
            bytes=tuple(piece),
            top=top,
        )

    return entry(token, tuple(entry(int(other)) for other in likeliest))
