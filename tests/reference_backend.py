"""A small, complete backend for tests: real in everything but the model.

It answers with the last user message, word by word. A message that begins with `!` is an order:
`!words N` answers N words, `!slow N` the same with 20 ms a word, `!crash` ends the process,
`!error` fails, `!stuck` ignores its cancellation for ever, `!call NAME` calls a tool, `!shape` tells
what else the request had.

A completion repeats its prompt. A text's vector is its number of words, of characters, and 1; a
document's score is the share of the query's words that it has; a label is `short` or `long`.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, ClassVar

from backends import vectors
from backends.contract import (
    Artifact,
    BackendError,
    Cancelled,
    ChatRequest,
    Classes,
    ClassifyRequest,
    CompleteRequest,
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
    RerankRequest,
    Scores,
    Task,
    TokenLogprob,
    ToolCall,
    Usage,
)

TASKS = tuple(task for task in Task if task is not Task.INFILL)


class ReferenceBackend:
    name: ClassVar[str] = "reference"
    formats: ClassVar[frozenset[str]] = frozenset({"gguf"})
    distribution: ClassVar[str] = ""
    options: ClassVar[dict[str, Option]] = {}
    slots = 2

    @classmethod
    def probe(cls) -> Probe:
        return Probe(backend=cls.name, available=True, version="1.0", devices=("CPU",))

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        return Fit(score=1, reason="for tests", tasks=TASKS)

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        return MemoryEstimate(
            context_length=options.context_length or 1024,
            slots=options.slots or cls.slots,
            parts={"weights": artifact.weights_bytes, "runtime": 20_000_000},
        )

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        order = str(spec.artifact.metadata.get("test.load", ""))
        if order == "fail":
            raise BackendError("load_failed", "this model was made to fail")
        if order == "crash":
            print("about to crash", flush=True)
            signal.raise_signal(signal.SIGSEGV)
        if order == "hang":
            time.sleep(3600)
        if order.startswith("slow"):
            for step in range(10):
                progress(step / 10)
                time.sleep(float(order.split()[1]) / 10)
        progress(1.0)
        return LoadedModel(
            tasks=TASKS,
            slots=spec.slots,
            context_length=spec.context_length,
            engine_version="1.0",
        )

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        content = request.messages[-1]["content"]
        order, _, argument = content.partition(" ")
        if order == "!error":
            raise BackendError("invalid_request", "this request was made to fail")
        if order == "!stuck":
            time.sleep(3600)
        if order == "!call":
            yield Delta(tool_calls=(ToolCall(index=0, id="call_1", name=argument),))
            for piece in ('{"city": ', '"Paris"}'):
                yield Delta(tool_calls=(ToolCall(index=0, arguments=piece),))
            return Done(finish_reason="tool_calls", usage=self._usage(request, 3))
        if order == "!shape":
            content = repr(
                (
                    [tool["function"]["name"] for tool in request.tools],
                    request.tool_choice,
                    request.tool_name,
                    request.sampling.json_schema,
                    request.sampling.grammar,
                    request.sampling.logit_bias,
                )
            )
        words = content.split()
        if order in ("!words", "!slow", "!crash"):
            words = [f"word{number}" for number in range(int(argument or 3))]
        sent = 0
        for word in words[: request.sampling.max_tokens]:
            if cancelled():
                return Done(finish_reason="cancelled", usage=self._usage(request, sent))
            text = word if sent == 0 else f" {word}"
            yield Delta(content=text, logprobs=logprobs(text, request.sampling.logprobs))
            sent += 1
            if order == "!slow":
                time.sleep(0.02)
        if order == "!crash":
            os.kill(os.getpid(), signal.SIGKILL)
        whole = sent == len(words)
        return Done(finish_reason="stop" if whole else "length", usage=self._usage(request, sent))

    def complete(self, request: CompleteRequest, cancelled: Cancelled) -> Generation:
        yield Delta(
            content=request.prompt, logprobs=logprobs(request.prompt, request.sampling.logprobs)
        )
        words = len(request.prompt.split())
        return Done(finish_reason="stop", usage=Usage(prompt_tokens=words, completion_tokens=words))

    def embed(self, request: EmbedRequest, cancelled: Cancelled) -> Embeddings:
        packed = [
            vectors.pack([len(text.split()), len(text), 1.0], request.dimensions)
            for text in request.inputs
        ]
        words = sum(len(text.split()) for text in request.inputs)
        return Embeddings(
            vectors=tuple(packed),
            dimensions=request.dimensions or 3,
            usage=Usage(prompt_tokens=words),
        )

    def rerank(self, request: RerankRequest, cancelled: Cancelled) -> Scores:
        wanted = set(request.query.split())
        return Scores(
            scores=tuple(len(wanted & set(d.split())) / len(wanted) for d in request.documents)
        )

    def classify(self, request: ClassifyRequest, cancelled: Cancelled) -> Classes:
        shares = [min(len(text), 100) / 100 for text in request.inputs]
        return Classes(labels=tuple({"short": 1 - share, "long": share} for share in shares))

    @staticmethod
    def _usage(request: ChatRequest, sent: int) -> Usage:
        prompt = sum(len(str(message["content"]).split()) for message in request.messages)
        return Usage(prompt_tokens=prompt, completion_tokens=sent)

    def close(self) -> None:
        pass


def logprobs(text: str, alternatives: int | None) -> tuple[TokenLogprob, ...]:
    """A made-up log-probability of a token, if the request wants them."""
    if alternatives is None:
        return ()
    token: dict[str, Any] = {"token": text, "logprob": -0.5, "bytes": tuple(text.encode())}
    top = tuple(TokenLogprob(**token) for _ in range(alternatives))
    return (TokenLogprob(**token, top=top),)


class MissingBackend(ReferenceBackend):
    """A backend whose engine is not installed."""

    name: ClassVar[str] = "missing"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(
            backend=cls.name,
            available=False,
            reason="its engine is not installed; install it with: pip install engine",
        )


class CrashingProbe(ReferenceBackend):
    """A backend whose engine takes its process down when it is imported."""

    name: ClassVar[str] = "crashing"

    @classmethod
    def probe(cls) -> Probe:
        signal.raise_signal(signal.SIGSEGV)
        raise AssertionError("not reached")


class FailingBackend(ReferenceBackend):
    """The one that is preferred, and cannot load a model whose header asks it to fail."""

    name: ClassVar[str] = "failing"

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        if artifact.metadata.get("test.fit") == "bug":
            raise KeyError("a bug of a plugin")
        return Fit(score=50, reason="comes first", tasks=TASKS)

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        if artifact.metadata.get("test.estimate") == "bug":
            raise TypeError("another bug of a plugin")
        estimate = super().estimate(artifact, options)
        if artifact.metadata.get("test.estimate") == "huge":
            return MemoryEstimate(context_length=1, slots=1, parts={"weights": 2**60})
        return estimate

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        raise BackendError("load_failed", "its first choice was made to fail")
