"""A small, complete backend for tests: real in everything but the model.

It answers with the last user message, word by word. A message that begins with `!` is an order:
`!words N` answers N words, `!slow N` the same with 20 ms a word, `!crash` ends the process,
`!error` fails, `!stuck` ignores its cancellation for ever.
"""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar

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
    Task,
    Usage,
)


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
        return Fit(score=1, reason="for tests", tasks=(Task.CHAT,))

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
            tasks=(Task.CHAT,),
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
        words = content.split()
        if order in ("!words", "!slow", "!crash"):
            words = [f"word{number}" for number in range(int(argument or 3))]
        sent = 0
        for word in words[: request.sampling.max_tokens]:
            if cancelled():
                return Done(finish_reason="cancelled", usage=self._usage(request, sent))
            yield Delta(content=word if sent == 0 else f" {word}")
            sent += 1
            if order == "!slow":
                time.sleep(0.02)
        if order == "!crash":
            os.kill(os.getpid(), signal.SIGKILL)
        whole = sent == len(words)
        return Done(finish_reason="stop" if whole else "length", usage=self._usage(request, sent))

    @staticmethod
    def _usage(request: ChatRequest, sent: int) -> Usage:
        prompt = sum(len(message["content"].split()) for message in request.messages)
        return Usage(prompt_tokens=prompt, completion_tokens=sent)

    def close(self) -> None:
        pass


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
