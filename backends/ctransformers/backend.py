"""GGML models through ctransformers: one request at a time, on the CPU.

The engine is unmaintained and trusts its input. What it would crash on is kept from it: sizes that
overflow its buffers (`memory`), long words (`tokens`), a full context, odd sampling settings.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from backends import gguf, vectors
from backends.contract import (
    Artifact,
    BackendError,
    Cancelled,
    ChatRequest,
    CompleteRequest,
    Count,
    CountRequest,
    Delta,
    Done,
    Embeddings,
    EmbedRequest,
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
    Task,
    Timings,
    Usage,
    check_options,
)
from backends.ctransformers import memory
from backends.ctransformers.model import Model, build
from backends.ctransformers.templates import ChatTemplate
from backends.room import check_room, context_exceeded
from backends.text import StopScanner

_DISTRIBUTION = "ctransformers"
# Of Sampling, what this engine does not know, with the values that ask for nothing.
_UNKNOWN: Mapping[str, tuple[object, ...]] = {
    "min_p": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logprobs": (None,),
    "logit_bias": ({},),
    "json_schema": (None,),
    "grammar": ("",),
}


def _tasks(artifact: Artifact) -> tuple[Task, ...]:
    tasks = [Task.COMPLETE]
    if artifact.chat_template:
        tasks.insert(0, Task.CHAT)
    if artifact.architecture in ("llama", "falcon"):  # the others keep no embeddings
        tasks.append(Task.EMBED)
    return tuple(tasks)


def _refuse_unknown(sampling: Sampling) -> None:
    if sampling.repeat_penalty is not None and sampling.repeat_penalty <= 0:
        raise BackendError(
            "invalid_request",
            f"repeat_penalty is {sampling.repeat_penalty}, but must be above 0 (1: none)",
        )
    for name, nothing in _UNKNOWN.items():
        if getattr(sampling, name) not in nothing:
            raise BackendError(
                "invalid_request",
                f"ctransformers, which runs this GGML model, does not know {name}: leave it out, "
                "or use a GGUF model",
            )


class CTransformers:
    """See the module."""

    name: ClassVar[str] = "ctransformers"
    formats: ClassVar[frozenset[str]] = frozenset({"ggml"})
    distribution: ClassVar[str] = _DISTRIBUTION
    options: ClassVar[Mapping[str, Option]] = {}

    def __init__(self) -> None:
        self._model: Model | None = None
        self._template: ChatTemplate | None = None

    @classmethod
    def probe(cls) -> Probe:
        """See Backend.probe."""
        try:
            import ctransformers
            from ctransformers.llm import load_library

            kind = build(Path(ctransformers.__file__).parent)
            load_library(kind)
        except Exception as error:  # noqa: BLE001  a broken engine is a reason, not a crash
            return Probe(
                backend=cls.name,
                available=False,
                reason=f"ctransformers cannot be loaded ({error}); install it with: "
                "pip install ctransformers",
            )
        return Probe(
            backend=cls.name,
            available=True,
            version=version(_DISTRIBUTION),
            devices=("CPU",),
            features=(kind or "local",),
        )

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """See Backend.fit."""
        if artifact.architecture not in memory.ARCHITECTURES:
            known = ", ".join(memory.ARCHITECTURES)
            return Fit(score=0, reason=f"{artifact.architecture} is not one of {known}")
        if memory.settle_context_length(artifact, None) < 1:
            return Fit(score=0, reason="the model is too wide for the engine's fixed buffers")
        chat = "" if artifact.chat_template else "; no chat: GGML files carry no chat template"
        return Fit(
            score=50,
            tasks=_tasks(artifact),
            reason=f"ctransformers {probe.version}: one request at a time, on the CPU{chat}",
        )

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """See Backend.estimate."""
        check_options(cls.name, cls.options, options.engine)
        return memory.estimate(artifact, options)

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """See Backend.load."""
        check_options(self.name, self.options, spec.engine)
        if spec.artifact.chat_template:
            self._template = ChatTemplate(spec.artifact.chat_template)
        self._model = Model(spec)
        return LoadedModel(
            tasks=_tasks(spec.artifact),
            slots=1,
            context_length=self._model.context_length,
            engine_version=version(_DISTRIBUTION),
        )

    def close(self) -> None:
        """See Backend.close."""
        self._model = None  # which frees it

    def _loaded(self) -> Model:
        assert self._model is not None, "nothing is loaded"
        return self._model

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """See Chats.chat."""
        return (yield from self._generate(self._rendered(request), request.sampling, cancelled))

    def count(self, request: CountRequest, cancelled: Cancelled) -> Count:
        """See Counts.count."""
        return Count(tokens=len(self._tokens(self._rendered(request.chat))))

    def _rendered(self, request: ChatRequest) -> str:
        if self._template is None:
            raise BackendError(
                "invalid_request",
                "this model has no chat template, since GGML files carry none: ask for a "
                "completion, or use the GGUF version of the model",
            )
        if request.tools:
            raise BackendError(
                "invalid_request",
                "ctransformers, which runs this GGML model, does not know tools: leave them out",
            )
        gguf.refuse_hopeless(request, self._loaded().context_length)
        return self._template.render(request)

    def complete(self, request: CompleteRequest, cancelled: Cancelled) -> Generation:
        """See Completes.complete."""
        gguf.refuse_hopeless(request, self._loaded().context_length)
        return (yield from self._generate(request.prompt, request.sampling, cancelled))

    def embed(self, request: EmbedRequest, cancelled: Cancelled) -> Embeddings:
        """See Embeds.embed. A text's vector is the state of its last token."""
        model = self._loaded()
        packed, count = [], 0
        for text in request.inputs:
            tokens = self._embeddable(text, truncate=request.truncate)
            if model.read(tokens, cancelled) is None:
                raise BackendError("cancelled", "the request was cancelled")
            packed.append(vectors.pack(model.embedding, request.dimensions))
            count += len(tokens)
        return Embeddings(
            vectors=tuple(packed),
            dimensions=len(packed[0]) // 4 if packed else 0,
            usage=Usage(prompt_tokens=count),
        )

    def _embeddable(self, text: str, *, truncate: bool) -> list[int]:
        """Return the tokens of a text, which may fill the whole context."""
        limit = self._loaded().context_length
        if truncate:
            return self._tokens(text[: gguf.MAX_CHARS_PER_TOKEN * limit])[:limit]
        gguf.refuse_hopeless(CompleteRequest(prompt=text), limit)
        tokens = self._tokens(text)
        if len(tokens) > limit:
            raise context_exceeded(len(tokens), limit)
        return tokens

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens of a text. Raises BackendError for one that has none."""
        if "\0" in text:
            raise BackendError("invalid_request", "the text has a NUL character: take it out")
        tokens = self._loaded().tokenize(text)
        if not tokens:
            raise BackendError(
                "invalid_request",
                "the text is empty, or has nothing that this model has a token for: give it "
                "something to go on from",
            )
        return tokens

    def _generate(self, text: str, sampling: Sampling, cancelled: Cancelled) -> Generation:
        model = self._loaded()
        _refuse_unknown(sampling)
        prompt = self._tokens(text)
        check_room(len(prompt), sampling, model.context_length)
        started = time.monotonic()
        cached = model.read(prompt, cancelled)
        if cached is None:
            return Done(finish_reason="cancelled")
        read = time.monotonic()
        scanner = StopScanner(sampling.stop)
        draw = random.Random(sampling.seed)  # noqa: S311  not for secrets
        reason, count = "length", 0
        while count != sampling.max_tokens:
            if cancelled():
                reason = "cancelled"
                break
            token = model.sample(sampling, draw.getrandbits(31))
            if model.ends(token) and not sampling.ignore_eos:
                reason = "stop"
                break
            count += 1
            if said := scanner.feed(model.text(token)):
                yield Delta(content=said)
            if scanner.stopped:
                reason = "stop"
                break
            if count == sampling.max_tokens or len(prompt) + count >= model.context_length:
                break
            model.extend(token)
        if said := scanner.flush():
            yield Delta(content=said)
        return Done(
            finish_reason=reason,
            usage=Usage(prompt_tokens=len(prompt), completion_tokens=count, cached_tokens=cached),
            timings=Timings(
                prompt_ms=(read - started) * 1e3, predicted_ms=(time.monotonic() - read) * 1e3
            ),
            stopped_by=scanner.stopped_by,
        )
