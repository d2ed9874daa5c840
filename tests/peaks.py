"""What a worker's memory comes to when its model is really used, beside what was estimated.

A worker in a process of its own holds the model, as in the daemon, and is measured from outside, as
the daemon does. It is used as far as plain use goes: prompts that fill the context in all slots at
once, or full batches of texts as long as the model takes. What single features take beside that
(answers held to a grammar, above all) is not in it, nor in the estimate.
"""

from __future__ import annotations

import asyncio
import base64
import os
import struct
import tempfile
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.contract import (
    Answer,
    Artifact,
    ChatRequest,
    ClassifyRequest,
    CompleteRequest,
    Done,
    EmbedRequest,
    LoadedModel,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
    Request,
    RerankRequest,
    Sampling,
    Task,
)
from backends.registry import BUILTIN, load_class
from daemon.memory.measure import worker_use
from daemon.workers.worker import Worker

MIB = 1024 * 1024
LOAD_S = 120.0
_LOOK_S = 0.1
_WORDS = "the story of a dog and a cat goes on. "
_ANSWER_TOKENS = 4
_TEXTS = 12  # of a request for vectors or scores


@dataclass(frozen=True, kw_only=True)
class Load:
    """How a model is loaded and used.

    Prompts have `first_tokens` in the first slot and `other_tokens` in the others; None: as many as
    the context holds. `image` is a data URL, for a model that sees. After the first of `rounds`
    there are prompts of other lengths.
    """

    backend: str
    context_length: int | None = None
    slots: int | None = None
    threads: int = 2
    engine: dict[str, Any] = field(default_factory=dict)
    first_tokens: int | None = None
    other_tokens: int | None = None
    image: str = ""
    rounds: int = 1


@dataclass(frozen=True, kw_only=True)
class Peak:
    """An estimate, and the most that was measured. `longest` is the longest prompt, in tokens."""

    estimate: MemoryEstimate
    measured_bytes: int
    longest: int

    @property
    def error(self) -> float:
        """How far off the estimate is; positive is too much."""
        return self.estimate.total_bytes / self.measured_bytes - 1

    def __str__(self) -> str:
        parts = {name: round(size / MIB, 1) for name, size in self.estimate.parts.items()}
        return (
            f"estimate {self.estimate.total_bytes / MIB:.1f} MiB {parts}, "
            f"measured {self.measured_bytes / MIB:.1f} MiB, error {self.error:+.1%}"
        )


def picture(side: int = 640) -> str:
    """Return a square image of stripes as a data URL."""
    row = b"\0" + b"".join(bytes((x % 256, 0, 0)) for x in range(side))
    raw = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(row * side)), (b"IEND", b"")):
        raw += struct.pack(">I", len(data)) + name + data
        raw += struct.pack(">I", zlib.crc32(name + data))
    return "data:image/png;base64," + base64.b64encode(raw).decode()


async def peak(artifact: Artifact, load: Load) -> Peak:
    """Load a model, use it, and return what that took."""
    path = BUILTIN[load.backend]
    options = LoadOptions(
        context_length=load.context_length,
        slots=load.slots,
        threads=load.threads,
        engine=load.engine,
    )
    estimate = load_class(path).estimate(artifact, options)
    with tempfile.TemporaryDirectory() as scratch:
        worker = await Worker.start(path, name=load.backend, scratch=Path(scratch))
        try:
            spec = LoadSpec(
                artifact=artifact,
                context_length=estimate.context_length,
                slots=estimate.slots,
                threads=load.threads,
                scratch_dir=scratch,
                placement=estimate.placement,
                engine=load.engine,
            )
            loaded = await worker.load(spec, timeout_s=LOAD_S, progress=lambda _: None)
            async with _watching(worker.pid, artifact) as looks:
                longest = await _use(worker, loaded, load)
        finally:
            await worker.stop("it was measured")
    return Peak(estimate=estimate, measured_bytes=max(looks), longest=longest)


@asynccontextmanager
async def _watching(pid: int, artifact: Artifact) -> AsyncIterator[list[int]]:
    """Yield a list that fills with what the process uses: before, again and again, and after."""
    files = [os.path.realpath(file.path) for file in artifact.files]
    looks: list[int] = []

    async def look() -> None:
        looks.append((await asyncio.to_thread(worker_use, pid, files)).total_bytes)

    async def again() -> None:
        while True:
            await look()
            await asyncio.sleep(_LOOK_S)

    watching = asyncio.create_task(again())
    try:
        yield looks
    finally:
        watching.cancel()
        await look()


async def _use(worker: Worker, loaded: LoadedModel, load: Load) -> int:
    if Task.COMPLETE in loaded.tasks:
        if Task.CHAT in loaded.tasks:
            await _answer(worker, _chat(load))
        return await _fill(worker, loaded, load)
    text = _WORDS * (loaded.context_length // 8)
    for words, count in ((text, 1), (text, _TEXTS), (_WORDS, _TEXTS)):
        request = _pooling(loaded, words, count)
        at_once = min(loaded.slots, 4 if count > 1 else loaded.slots)
        await asyncio.gather(*(_answer(worker, request) for _ in range(at_once)))
    return loaded.context_length


def _chat(load: Load) -> ChatRequest:
    content: Any = "Who are you?"
    if load.image:
        picture = {"type": "image_url", "image_url": {"url": load.image}}
        content = [picture, {"type": "text", "text": content}]
    return ChatRequest(
        messages=({"role": "user", "content": content},),
        sampling=Sampling(max_tokens=16, temperature=0),
    )


async def _fill(worker: Worker, loaded: LoadedModel, load: Load) -> int:
    """Have all slots read prompts at once; return the tokens of the longest."""
    few, more = [await _answer(worker, _complete(n, 1)) for n in (4, 12)]
    assert isinstance(few, Done) and isinstance(more, Done)
    each = (more.usage.prompt_tokens - few.usage.prompt_tokens) / 8
    marks = few.usage.prompt_tokens - 4 * each

    def request(tokens: int) -> CompleteRequest:
        room = min(tokens, loaded.context_length) - marks - _ANSWER_TOKENS - 1
        return _complete(int(room / each), _ANSWER_TOKENS)

    first = load.first_tokens or loaded.context_length
    others = load.other_tokens or loaded.context_length
    lengths = [first] + [others] * (loaded.slots - 1)
    longest = 0
    for number in range(1, load.rounds + 1):
        asked = [request(max(32, length // number)) for length in lengths]
        answers = await asyncio.gather(*(_answer(worker, each) for each in asked))
        longest = max(longest, *(answer.usage.prompt_tokens for answer in answers))
    return longest


def _complete(times: int, max_tokens: int) -> CompleteRequest:
    sampling = Sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return CompleteRequest(prompt=_WORDS * max(1, times), sampling=sampling)


def _pooling(loaded: LoadedModel, text: str, count: int) -> Request:
    texts = (text,) * count
    if Task.EMBED in loaded.tasks:
        return EmbedRequest(inputs=texts, truncate=True)
    if Task.RERANK in loaded.tasks:
        return RerankRequest(query="a dog", documents=texts, truncate=True)
    return ClassifyRequest(inputs=texts, truncate=True)


async def _answer(worker: Worker, request: Request) -> Answer:
    _, entry = worker.submit(request)
    return [answer async for answer in worker.answers(entry)][-1]
