"""GGUF models through llama-cpp-python, the binding with the widest choice of GPU builds.

One request at a time: the binding is not thread-safe. Its token generator and its sandboxed chat
template are used; prompts are read in batches that an abort callback can end.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, ClassVar

from backends import gguf
from backends.contract import (
    Artifact,
    BackendError,
    Cancelled,
    ChatRequest,
    Delta,
    Done,
    Fit,
    Generation,
    Hardware,
    LoadedModel,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
    Option,
    Probe,
    Progress,
    Sampling,
    Timings,
    Usage,
)
from backends.text import StopScanner

_INSTALL = "pip install llama-cpp-python (it compiles for some minutes)"
_ABORTED = "llama_decode returned 2"  # what llama.cpp answers when the abort callback said so


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Return `Llama.generate`'s arguments for `sampling`, leaving its defaults alone."""
    names = {
        "temp": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repeat_penalty,
    }
    return {name: value for name, value in names.items() if value is not None}


def _common_prefix(cached: list[int], prompt: list[int]) -> int:
    """Return how many tokens of `prompt` need not be read; its last one always is."""
    length = 0
    for a, b in zip(cached, prompt[:-1], strict=False):
        if a != b:
            break
        length += 1
    return length


class LlamaCpp:
    """See the module."""

    name: ClassVar[str] = "llama_cpp"
    formats: ClassVar[frozenset[str]] = frozenset({"gguf"})
    options: ClassVar[Mapping[str, Option]] = {}
    distribution: ClassVar[str] = "llama-cpp-python"

    def __init__(self) -> None:
        self._llama: Any = None
        self._format: Any = None

    @classmethod
    def probe(cls) -> Probe:
        """See Backend.probe."""
        try:
            import llama_cpp
        except Exception as error:  # noqa: BLE001  a broken engine is a reason, not a crash
            return Probe(
                backend=cls.name,
                available=False,
                reason=f"llama-cpp-python cannot be imported ({error}); install it with: "
                f"{_INSTALL}",
            )
        offload = bool(llama_cpp.llama_supports_gpu_offload())
        return Probe(
            backend=cls.name,
            available=True,
            version=version("llama-cpp-python"),
            devices=("CPU", "GPU") if offload else ("CPU",),
            features=("chat", "prompt_cache"),
        )

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """See Backend.fit."""
        tasks = gguf.tasks(artifact)
        if not tasks:
            return Fit(score=0, reason=f"{artifact.architecture} is an embedding model")
        return Fit(
            score=70,
            tasks=tasks,
            reason=f"llama-cpp-python {probe.version}: one request at a time",
        )

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """See Backend.estimate."""
        return gguf.estimate(artifact, options, max_slots=1, batch=gguf.MAX_BATCH)

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """See Backend.load."""
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            llama = llama_cpp.Llama(
                spec.artifact.path,
                n_ctx=spec.context_length,
                n_batch=gguf.MAX_BATCH,
                n_ubatch=gguf.MAX_BATCH,
                n_threads=spec.threads,
                n_threads_batch=spec.threads,
                n_gpu_layers=0,
                verbose=True,  # to the log, where it explains a load that fails
            )
        except Exception as error:
            raise BackendError("load_failed", str(error)) from error
        llama.verbose = False
        self._llama = llama
        if spec.artifact.chat_template:
            self._format = Jinja2ChatFormatter(
                template=spec.artifact.chat_template,
                eos_token=self._special_text(llama.token_eos()),
                bos_token=self._special_text(llama.token_bos()),
            )
        return LoadedModel(
            tasks=gguf.tasks(spec.artifact),
            slots=1,
            context_length=spec.context_length,
            engine_version=version("llama-cpp-python"),
        )

    def _special_text(self, token: int) -> str:
        if token < 0:
            return ""
        text: bytes = self._llama.detokenize([token], special=True)
        return text.decode("utf-8", "replace")

    def _prompt(self, request: ChatRequest) -> list[int]:
        """Render and tokenize the messages. Raises BackendError for what does not fit."""
        if self._format is None:
            raise BackendError("invalid_request", "this model has no chat template")
        gguf.refuse_hopeless(request, self._llama.n_ctx())
        try:
            rendered = self._format(messages=list(request.messages))
        except Exception as error:
            raise BackendError("invalid_request", f"the chat template refused: {error}") from error
        tokens: list[int] = self._llama.tokenize(
            rendered.prompt.encode(), add_bos=not rendered.added_special, special=True
        )
        limit = self._llama.n_ctx()
        if len(tokens) >= limit:
            raise BackendError(
                "context_length_exceeded",
                f"the prompt has {len(tokens)} tokens, but the model was loaded with a "
                f"context_length of {limit}: shorten the prompt or load the model with a larger "
                "context_length",
            )
        return tokens

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """See Backend.chat."""
        prompt = self._prompt(request)
        started = time.monotonic()
        cached = self._keep_common_prefix(prompt)
        try:
            self._read_prompt(prompt, cached, cancelled)
        except RuntimeError as error:
            if cancelled() and _ABORTED in str(error):
                return Done(finish_reason="cancelled")
            raise BackendError("engine_error", f"llama-cpp-python: {error}") from error
        read = time.monotonic()
        scanner = StopScanner(request.sampling.stop)
        finish_reason, count = "length", 0
        for token in self._tokens(prompt, request.sampling):
            if cancelled():
                finish_reason = "cancelled"
                break
            if self._ends(token) and not request.sampling.ignore_eos:
                finish_reason = "stop"
                break
            count += 1
            if text := scanner.feed(self._llama.detokenize([token])):
                yield Delta(content=text)
            if scanner.stopped:
                finish_reason = "stop"
                break
            if count == request.sampling.max_tokens:
                break
        if text := scanner.flush():
            yield Delta(content=text)
        return Done(
            finish_reason=finish_reason,
            usage=Usage(prompt_tokens=len(prompt), completion_tokens=count, cached_tokens=cached),
            timings=Timings(
                prompt_ms=(read - started) * 1e3, predicted_ms=(time.monotonic() - read) * 1e3
            ),
        )

    def _keep_common_prefix(self, prompt: list[int]) -> int:
        """Cut the KV cache back to what `prompt` begins with; return the length of that."""
        import llama_cpp

        llama = self._llama
        cached = _common_prefix(llama.input_ids[: llama.n_tokens].tolist(), prompt)
        # A recurrent model has one state for all of its past, of which no part can be removed.
        memory = llama_cpp.llama_get_memory(llama.ctx)
        if not llama_cpp.llama_memory_seq_rm(memory, -1, cached, -1):
            llama.reset()
            return 0
        llama.n_tokens = cached
        return cached

    def _read_prompt(self, prompt: list[int], cached: int, cancelled: Cancelled) -> None:
        """Bring all of the prompt but its last token into the KV cache.

        The abort callback is set for this part alone: it is called once a graph node, which costs
        little in a batch of tokens and much in a single one.
        """
        import llama_cpp

        llama = self._llama
        abort = llama_cpp.ggml_abort_callback(lambda _: cancelled())
        llama_cpp.llama_set_abort_callback(llama.ctx, abort, None)
        try:
            llama.eval(prompt[cached:-1])
        finally:
            llama_cpp.llama_set_abort_callback(llama.ctx, llama_cpp.ggml_abort_callback(0), None)

    def _tokens(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """Yield generated tokens until the context is full."""
        llama = self._llama
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(31)
        llama.set_seed(seed)
        generation = llama.generate(prompt, **_sampling(sampling))
        for position, token in enumerate(generation, start=len(prompt) + 1):
            yield token
            if position >= llama.n_ctx():
                return

    def _ends(self, token: int) -> bool:
        import llama_cpp

        vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        return bool(llama_cpp.llama_vocab_is_eog(vocabulary, token))

    def close(self) -> None:
        """See Backend.close."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None
