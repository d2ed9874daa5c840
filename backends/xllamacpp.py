"""GGUF models through xllamacpp: llama.cpp's own server engine, in this process.

Continuous batching over slots with a prompt cache. The engine insists on an HTTP listener of its
own: it gets a unix socket in the worker's private directory and a random key that nobody knows.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
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

_SAMPLING_FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
)
_SOCKET = "engine.sock"  # relative to the worker's own directory: such paths have a short limit


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Return the engine's fields for `sampling`, leaving its defaults alone."""
    fields = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS}
    chosen = {name: value for name, value in fields.items() if value is not None}
    if sampling.stop:
        chosen["stop"] = list(sampling.stop)
    if sampling.ignore_eos:
        chosen["ignore_eos"] = True
    return chosen


def _error(error: dict[str, Any]) -> BackendError:
    """Translate the engine's error object."""
    message = str(error.get("message", "the engine gave no reason"))
    if error.get("type") == "exceed_context_size_error":
        return BackendError(
            "context_length_exceeded",
            f"the prompt has {error.get('n_prompt_tokens')} tokens, but the model was loaded with "
            f"a context_length of {error.get('n_ctx')}: shorten the prompt or load the model with "
            "a larger context_length",
        )
    code = "invalid_request" if error.get("code") == 400 else "engine_error"
    return BackendError(code, message)


def _done(finish_reason: str, final: dict[str, Any]) -> Done:
    usage, timings = final.get("usage") or {}, final.get("timings") or {}
    details = usage.get("prompt_tokens_details") or {}
    return Done(
        finish_reason=finish_reason,
        usage=Usage(
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            cached_tokens=details.get("cached_tokens", 0),
        ),
        timings=Timings(
            prompt_ms=timings.get("prompt_ms", 0.0), predicted_ms=timings.get("predicted_ms", 0.0)
        ),
    )


class Xllamacpp:
    """See the module. Thread-safe: the engine batches what its slots ask for."""

    name: ClassVar[str] = "xllamacpp"
    formats: ClassVar[frozenset[str]] = frozenset({"gguf"})
    options: ClassVar[Mapping[str, Option]] = {}
    distribution: ClassVar[str] = "xllamacpp"
    max_slots: ClassVar[int] = 64

    def __init__(self) -> None:
        self._server: Any = None
        self._context_length = 0

    @classmethod
    def probe(cls) -> Probe:
        """See Backend.probe."""
        try:
            import xllamacpp
        except Exception as error:  # noqa: BLE001  a broken engine is a reason, not a crash
            return Probe(
                backend=cls.name,
                available=False,
                reason=f"xllamacpp cannot be imported ({error}); install it with: "
                "pip install xllamacpp",
            )
        devices = tuple(device["name"] for device in xllamacpp.get_device_info())
        return Probe(
            backend=cls.name,
            available=True,
            version=version("xllamacpp"),
            devices=devices,
            features=("chat", "slots", "prompt_cache"),
        )

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """See Backend.fit: preferred for GGUF, since it serves several requests at once."""
        tasks = gguf.tasks(artifact)
        if not tasks:
            return Fit(score=0, reason=f"{artifact.architecture} is an embedding model")
        return Fit(
            score=90,
            tasks=tasks,
            reason=f"xllamacpp {probe.version}: batches concurrent requests, prompt cache",
        )

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """See Backend.estimate."""
        return gguf.estimate(
            artifact,
            options,
            max_slots=cls.max_slots,
            batch=gguf.prefill_batch(artifact, options.threads),
        )

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """See Backend.load."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = spec.artifact.path
        batch = max(spec.slots, gguf.prefill_batch(spec.artifact, spec.threads))
        params.n_batch = params.n_ubatch = batch
        # The engine's own defaults would take the model's longest context, offload what fits, keep
        # a prompt cache of 8 GiB, and let one slot's overflow fail the others.
        params.fit_params = False
        params.n_ctx = spec.context_length * spec.slots
        params.n_parallel = spec.slots
        params.kv_unified = False
        params.n_gpu_layers = 0
        params.cache_ram_mib = 0
        params.warmup = False
        params.verbosity = 1
        params.ui = False
        params.endpoint_slots = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
        params.hostnames = [_SOCKET]
        params.api_keys = [secrets.token_hex(32)]
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:
            raise BackendError("load_failed", str(error)) from error
        finally:
            Path(_SOCKET).unlink(missing_ok=True)  # nobody shall connect, not even the user
        self._context_length = spec.context_length
        return LoadedModel(
            tasks=gguf.tasks(spec.artifact),
            slots=spec.slots,
            context_length=spec.context_length,
            engine_version=version("xllamacpp"),
        )

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """See Backend.chat.

        The engine calls back once a token and, since `return_progress` is set, once a batch of the
        prompt: those are the moments at which a cancelled request ends.
        """
        gguf.refuse_hopeless(request, self._context_length)
        body = {
            "messages": list(request.messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
            **_sampling(request.sampling),
        }
        final: dict[str, Any] = {}
        finish_reason = ""
        for chunk in self._stream(body, cancelled):
            if "error" in chunk:
                raise _error(chunk["error"])
            final = chunk if "usage" in chunk else final
            for choice in chunk.get("choices", ()):
                finish_reason = choice.get("finish_reason") or finish_reason
                if content := choice["delta"].get("content"):
                    yield Delta(content=content)
        if cancelled() and not final:
            return Done(finish_reason="cancelled")
        if not finish_reason:
            raise BackendError("engine_error", "xllamacpp ended the answer without a reason")
        return _done(finish_reason, final)

    def _stream(self, body: dict[str, Any], cancelled: Cancelled) -> Any:
        """Yield the engine's chunks, which it hands to a callback on a thread that it blocks."""
        chunks: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
        abandoned = threading.Event()

        def on_chunk(chunk: dict[str, Any]) -> bool:
            chunks.put(chunk)
            return abandoned.is_set() or cancelled()

        def run() -> None:
            try:
                self._server.handle_chat_completions(body, on_chunk)
                chunks.put(None)
            except BaseException as error:  # noqa: BLE001  raised again on the caller's thread
                chunks.put(error)

        yield from _drain(run, chunks, abandoned)

    def close(self) -> None:
        """See Backend.close."""
        self._server = None


def _drain(
    run: Callable[[], None],
    chunks: queue.SimpleQueue[dict[str, Any] | BaseException | None],
    abandoned: threading.Event,
) -> Any:
    """Run `run` on a thread and yield what it puts; never leave before the thread has ended."""
    thread = threading.Thread(target=run, name="xllamacpp-request")
    thread.start()
    try:
        while (chunk := chunks.get()) is not None:
            if isinstance(chunk, ValueError):  # how the engine refuses a message it can't read
                raise BackendError("invalid_request", str(chunk)) from chunk
            if isinstance(chunk, BaseException):
                raise BackendError("engine_error", f"xllamacpp: {chunk}") from chunk
            yield chunk
    finally:
        abandoned.set()
        thread.join()
