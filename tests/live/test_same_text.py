"""The text that comes out of each surface is the engine's own: nothing lost, doubled or moved.

The model's weights are float32: what else is computed at the time does not show in its text. It
says characters at random, some of which are several tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import gguf_models
import pytest
from contract_cases import GGUF, artifact_of
from running import RunningDaemon, needs_engine

from backends.contract import (
    ChatRequest,
    CompleteRequest,
    Done,
    LoadOptions,
    LoadSpec,
    Sampling,
)
from backends.registry import load_class
from daemon.workers.worker import Worker

MODEL = "letters"
STREAMS = 16
SLOTS = 4
TOKENS = 60
PROMPTS = [f"{'x' * number}Tell me number {number} of all." for number in range(STREAMS)]
SEEDED = [Sampling(temperature=1, seed=1000 + n, max_tokens=TOKENS) for n in range(STREAMS)]
GREEDY = [Sampling(temperature=0, max_tokens=TOKENS)] * STREAMS


@dataclass(frozen=True, kw_only=True)
class Surface:
    """How one prompt is asked on a surface, and where the text of its answer and pieces is."""

    path: str
    body: Callable[[str, int], dict[str, Any]]
    whole: Callable[[Any], str]
    piece: Callable[[Any], str]
    seeded: bool = True
    bare: bool = False  # the prompt goes to the model as it is
    lines: bool = False  # a JSON object a line, without anything before it


def said(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def openai_sampling(number: int) -> dict[str, Any]:
    return {"temperature": 1, "seed": 1000 + number, "max_tokens": TOKENS}


def ollama_options(number: int) -> dict[str, Any]:
    return {"options": {"temperature": 1, "seed": 1000 + number, "num_predict": TOKENS}}


SURFACES = [
    Surface(
        path="/v1/chat/completions",
        body=lambda prompt, number: {"messages": said(prompt), **openai_sampling(number)},
        whole=lambda answer: answer["choices"][0]["message"]["content"],
        piece=lambda piece: piece["choices"][0]["delta"].get("content", ""),
    ),
    Surface(
        path="/v1/completions",
        body=lambda prompt, number: {"prompt": prompt, **openai_sampling(number)},
        whole=lambda answer: answer["choices"][0]["text"],
        piece=lambda piece: piece["choices"][0]["text"],
        bare=True,
    ),
    Surface(
        path="/v1/responses",
        body=lambda prompt, _: {"input": prompt, "temperature": 0, "max_output_tokens": TOKENS},
        whole=lambda answer: answer["output"][0]["content"][0]["text"],
        piece=lambda piece: piece["delta"] if piece["type"] == "response.output_text.delta" else "",
        seeded=False,
    ),
    Surface(
        path="/v1/messages",
        body=lambda prompt, _: {
            "messages": said(prompt),
            "temperature": 0,
            "max_tokens": TOKENS,
        },
        whole=lambda answer: answer["content"][0]["text"],
        piece=lambda piece: (
            piece["delta"]["text"] if piece["type"] == "content_block_delta" else ""
        ),
        seeded=False,
    ),
    Surface(
        path="/api/chat",
        body=lambda prompt, number: {"messages": said(prompt), **ollama_options(number)},
        whole=lambda answer: answer["message"]["content"],
        piece=lambda piece: piece["message"]["content"],
        lines=True,
    ),
    Surface(
        path="/api/generate",
        body=lambda prompt, number: {"prompt": prompt, **ollama_options(number)},
        whole=lambda answer: answer["response"],
        piece=lambda piece: piece["response"],
        lines=True,
    ),
    Surface(
        path="/api/generate",
        body=lambda prompt, number: {"prompt": prompt, "raw": True, **ollama_options(number)},
        whole=lambda answer: answer["response"],
        piece=lambda piece: piece["response"],
        bare=True,
        lines=True,
    ),
]


@pytest.fixture(scope="module", params=sorted(GGUF))
def engine(request) -> str:
    needs_engine(request.param)
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return gguf_models.tiny_llama(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def daemon(engine, model, tmp_path_factory):
    daemon = RunningDaemon(
        tmp_path_factory.mktemp(engine),
        MODELD_MODELS_BACKEND=engine,
        MODELD_MODELS_SLOTS=str(SLOTS),
    )
    daemon.start()
    try:
        daemon.json("POST", "/modeld/v1/models", {"source": str(model), "unique": MODEL})
        daemon.download(MODEL)
        yield daemon
    finally:
        daemon.stop()


async def text_of(worker: Worker, request: ChatRequest | CompleteRequest) -> str:
    """What the engine says to one request, which is alone."""
    _, entry = worker.submit(request)
    text = ""
    async for piece in worker.answers(entry):
        if isinstance(piece, Done):
            return text
        text += piece.content
    raise AssertionError("no end")


@pytest.fixture(scope="module")
def own(engine, model, tmp_path_factory) -> dict[tuple[bool, bool], list[str]]:
    """The engine's own texts, one at a time, by whether they are seeded and their prompts bare."""
    scratch = tmp_path_factory.mktemp("scratch")
    artifact = artifact_of(model)
    backend = GGUF[engine]
    estimate = load_class(backend).estimate(artifact, LoadOptions(slots=SLOTS, threads=2))
    spec = LoadSpec(
        artifact=artifact,
        context_length=estimate.context_length,
        slots=estimate.slots,
        threads=2,
        scratch_dir=str(scratch),
    )

    async def run() -> dict[tuple[bool, bool], list[str]]:
        worker = await Worker.start(backend, name=engine, scratch=scratch)
        try:
            await worker.load(spec, timeout_s=60, progress=lambda _: None)
            texts: dict[tuple[bool, bool], list[str]] = {}
            for seeded, samplings in ((True, SEEDED), (False, GREEDY)):
                for prompt, sampling in zip(PROMPTS, samplings, strict=True):
                    chat = ChatRequest(messages=tuple(said(prompt)), sampling=sampling)
                    bare = CompleteRequest(prompt=prompt, sampling=sampling)
                    texts.setdefault((seeded, False), []).append(await text_of(worker, chat))
                    texts.setdefault((seeded, True), []).append(await text_of(worker, bare))
            return texts
        finally:
            await worker.stop("the test is over")

    return asyncio.run(run())


def pieces_of(surface: Surface, body: str) -> str:
    """The text of a stream, as it was sent."""
    lines = body.splitlines()
    if not surface.lines:
        lines = [line[6:] for line in lines if line.startswith("data: {")]
    pieces = [json.loads(line) for line in lines if line]
    assert not any("error" in piece for piece in pieces), body
    return "".join(surface.piece(piece) for piece in pieces if piece.get("choices") != [])


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    "surface", SURFACES, ids=lambda surface: surface.path + ("-bare" if surface.bare else "")
)
async def test_sixteen_at_once_say_what_the_engine_says(daemon, own, surface, streams):
    expected = own[surface.seeded, surface.bare]
    assert len(set(expected)) == STREAMS and all(len(text) >= TOKENS / 4 for text in expected)
    async with aiohttp.ClientSession() as session:

        async def ask(number: int) -> str:
            body = {"model": MODEL, "stream": streams, **surface.body(PROMPTS[number], number)}
            async with session.post(f"{daemon.url}{surface.path}", json=body) as response:
                text = await response.text()
            assert response.status == 200, text
            return pieces_of(surface, text) if streams else surface.whole(json.loads(text))

        texts = await asyncio.gather(*map(ask, range(STREAMS)))
    assert texts == expected


async def test_sixteen_turns_of_one_socket_say_what_the_engine_says(daemon, own):
    """Answers of the Pieces API have no limit: each is stopped once it is long enough."""
    expected = own[False, False]
    texts = [""] * STREAMS
    ended = dict.fromkeys(range(STREAMS), "")
    model_id = daemon.model(MODEL)["id"]
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{daemon.url}/qgpt/stream") as socket,
    ):
        for number, prompt in enumerate(PROMPTS):
            asked = {"query": prompt, "model": model_id}
            await socket.send_json({"relevance": asked, "request": str(number)})
        while not all(ended.values()):
            frame = await socket.receive_json(timeout=60)
            number = int(frame["request"])
            if frame["status"] != "IN-PROGRESS":
                ended[number] = frame["status"]
                continue
            texts[number] += frame["question"]["answers"]["iterable"][0]["text"]
            if len(texts[number]) >= len(expected[number]):
                await socket.send_json({"conversation": frame["conversation"], "stop": True})
    for text, own_text in zip(texts, expected, strict=True):
        assert text.startswith(own_text)


async def test_sixteen_sockets_say_what_the_engine_says(daemon, own):
    """Each has one turn, as sixteen apps would ask, and leaves in the middle of the answer."""
    expected = own[False, False]
    model_id = daemon.model(MODEL)["id"]
    async with aiohttp.ClientSession() as session:

        async def turn(number: int) -> str:
            text = ""
            async with session.ws_connect(f"{daemon.url}/qgpt/stream") as socket:
                asked = {"query": PROMPTS[number], "model": model_id}
                await socket.send_json({"relevance": asked})
                while len(text) < len(expected[number]):
                    frame = await socket.receive_json(timeout=60)
                    assert frame["status"] == "IN-PROGRESS", frame
                    text += frame["question"]["answers"]["iterable"][0]["text"]
            return text

        texts = await asyncio.gather(*map(turn, range(STREAMS)))
    for text, own_text in zip(texts, expected, strict=True):
        assert text.startswith(own_text)
