"""A small, complete backend for tests: real in everything but the model.

It answers with the last user message, word by word. A message that begins with `!` is an order:
`!words N` answers N words, `!slow N` the same with 20 ms a word, `!crash` ends the process,
`!error` fails, `!stuck` ignores its cancellation for ever, `!call NAME` calls a tool, `!think …`
thinks first, `!fill` goes on until the context is full, `!shape` tells what else the request had,
`!before` all that was said.

Its KV cache is the texts of its last conversations, one a slot: a chat that begins with one of them
counts its words as cached. They are saved and restored as text, except by a model whose header asks
it to `fail`, to `hang` or to have a `bug` (`test.save`, `test.restore`).

A completion repeats its prompt, unless that is `!slow N`. A text's vector is its number of words,
of characters, and 1, which takes that time for `!slow N`; a document's score is the share of the
query's words that it has; a label is `short` or `long`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from backends import conversations, vectors
from backends.contract import (
    Artifact,
    BackendError,
    Cancelled,
    ChatRequest,
    Classes,
    ClassifyRequest,
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
    RerankRequest,
    SavedConversation,
    Scores,
    Task,
    TokenLogprob,
    ToolCall,
    Usage,
)
from backends.room import check_room
from backends.text import StopScanner

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
        slots = options.slots or cls.slots
        parts = {
            "weights": artifact.weights_bytes,
            "kv_cache": slots * int(artifact.metadata.get("test.slot_bytes", 0)),
            "runtime": 20_000_000,
        }
        return MemoryEstimate(
            context_length=options.context_length or 1024, slots=slots, parts=parts
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
        self.slot_count, self.header = spec.slots, spec.artifact.metadata
        self.context_length = spec.context_length
        self.held: list[list[str]] = []  # the words of conversations, the last used first
        self.changing = threading.Lock()
        return LoadedModel(
            tasks=TASKS,
            slots=spec.slots,
            context_length=spec.context_length,
            engine_version="1.0",
        )

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        said = [word for message in request.messages for word in str(message["content"]).split()]
        known = [each for each in self.held if each == said[: len(each)]]
        cached = max(map(len, known), default=0)
        usage = partial(Usage, prompt_tokens=len(said), cached_tokens=cached)
        content = request.messages[-1]["content"]
        order, _, argument = content.partition(" ")
        if order == "!error":
            raise BackendError("invalid_request", "this request was made to fail")
        if order == "!stuck":
            time.sleep(3600)
        if order == "!think":
            for thought in ("Let me ", "see."):
                yield Delta(reasoning=thought)
            content = argument
        if order == "!call":
            yield Delta(tool_calls=(ToolCall(index=0, id="call_1", name=argument),))
            for piece in ('{"city": ', '"Paris"}'):
                yield Delta(tool_calls=(ToolCall(index=0, arguments=piece),))
            return Done(finish_reason="tool_calls", usage=usage(completion_tokens=3))
        if order == "!before":
            content = "; ".join(f"{said['role']}: {said['content']}" for said in request.messages)
        if order == "!shape":
            content = repr(
                (
                    [tool["function"]["name"] for tool in request.tools],
                    request.tool_choice,
                    request.tool_name,
                    request.sampling.json_schema,
                    request.sampling.grammar,
                    request.sampling.logit_bias,
                    request.reasoning_effort,
                )
            )
        words = content.split()
        if order in ("!words", "!slow", "!crash"):
            words = [f"word{number}" for number in range(int(argument or 3))]
        most = request.sampling.max_tokens
        if order == "!fill":
            check_room(len(said), request.sampling, self.context_length)
            room = self.context_length - len(said)
            most, words = min(room, most or room), ["word"] * (room + 1)
        sent = 0
        scanner = StopScanner(request.sampling.stop)
        for word in words[:most]:
            if cancelled():
                return Done(finish_reason="cancelled", usage=usage(completion_tokens=sent))
            text = word if sent == 0 else f" {word}"
            sent += 1
            if request.sampling.stop:
                text = scanner.feed(text.encode())
            if text:
                yield Delta(content=text, logprobs=logprobs(text, request.sampling.logprobs))
            if scanner.stopped:
                break
            if order == "!slow":
                time.sleep(0.02)
        if order == "!crash":
            os.kill(os.getpid(), signal.SIGKILL)
        with self.changing:
            rest = [each for each in self.held if each not in known]
            self.held = [said + words[:sent], *rest][: self.slot_count]
        if text := scanner.flush():
            yield Delta(content=text)
        whole = scanner.stopped or sent == len(words)
        return Done(
            finish_reason="stop" if whole else "length",
            usage=usage(completion_tokens=sent),
            stopped_by=scanner.stopped_by,
        )

    def count(self, request: CountRequest, cancelled: Cancelled) -> Count:
        said = [str(message["content"]).split() for message in request.chat.messages]
        return Count(tokens=sum(map(len, said)))

    def complete(self, request: CompleteRequest, cancelled: Cancelled) -> Generation:
        for word in slowly(request.prompt, cancelled):
            yield Delta(content=word)
        if cancelled():
            return Done(finish_reason="cancelled")
        yield Delta(
            content=request.prompt, logprobs=logprobs(request.prompt, request.sampling.logprobs)
        )
        words = len(request.prompt.split())
        return Done(finish_reason="stop", usage=Usage(prompt_tokens=words, completion_tokens=words))

    def embed(self, request: EmbedRequest, cancelled: Cancelled) -> Embeddings:
        for _ in (word for text in request.inputs for word in slowly(text, cancelled)):
            pass
        if cancelled():
            raise BackendError("cancelled", "the request was cancelled")
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

    def save_state(self, folder: str, limit_bytes: int) -> tuple[SavedConversation, ...]:
        self._obey("test.save")
        held = [
            conversations.Held(tokens=len(words), write=partial(write, words))
            for words in self.held
        ]
        return conversations.save(folder, limit_bytes, held)

    def restore_state(self, folder: str, wanted: Sequence[SavedConversation]) -> tuple[str, ...]:
        self._obey("test.restore")

        def read(slot: int, path: Path) -> None:
            self.held.append(path.read_text(encoding="utf-8").split())

        return conversations.restore(folder, wanted, self.slot_count, read)

    def _obey(self, key: str) -> None:
        order = self.header.get(key)
        if order == "fail":
            raise BackendError("engine_error", "this model was made to fail")
        if order == "hang":
            print("it hangs", flush=True)
            time.sleep(3600)
        if order == "bug":
            raise KeyError("a bug of a backend")

    def close(self) -> None:
        pass


def slowly(text: str, cancelled: Cancelled) -> Iterator[str]:
    """The words of an answer to `!slow N`, none to any other text, until it is cancelled."""
    order, _, argument = text.partition(" ")
    for number in range(int(argument) if order == "!slow" else 0):
        if cancelled():
            return
        yield f"word{number} "
        time.sleep(0.02)


def write(words: list[str], path: Path) -> None:
    path.write_text(" ".join(words), encoding="utf-8")


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
