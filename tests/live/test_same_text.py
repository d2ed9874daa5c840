"""The text that comes out of each surface is the engine's own: nothing lost, doubled or moved.

The model's weights are float32, and so is all that is kept of a conversation: what else is computed
at the time does not show in its text. It says characters at random; some are several tokens.
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
from engines import add
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
# Half floats that are rounded the other way, or flash attention, which adds up a stream that is
# alone in another order than several, have a text part from itself after some hundred tokens.
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
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
        add(daemon, MODEL, str(model), options=EXACT)
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


def asked_of_engine(
    engine: str, model: Path, scratch: Path, requests: list[ChatRequest | CompleteRequest]
) -> list[str]:
    """What the engine says to requests, one at a time, without a daemon."""
    artifact = artifact_of(model)
    backend = GGUF[engine]
    options = LoadOptions(slots=SLOTS, threads=2, engine=EXACT)
    estimate = load_class(backend).estimate(artifact, options)
    spec = LoadSpec(
        artifact=artifact,
        context_length=estimate.context_length,
        slots=estimate.slots,
        threads=2,
        engine=EXACT,
        scratch_dir=str(scratch),
    )

    async def run() -> list[str]:
        worker = await Worker.start(backend, name=engine, scratch=scratch)
        try:
            await worker.load(spec, timeout_s=60, progress=lambda _: None)
            return [await text_of(worker, request) for request in requests]
        finally:
            await worker.stop("the test is over")

    return asyncio.run(run())


@pytest.fixture(scope="module")
def own(engine, model, tmp_path_factory) -> dict[tuple[bool, bool], list[str]]:
    """The engine's own texts, one at a time, by whether they are seeded and their prompts bare."""
    kinds = [(seeded, bare) for seeded in (True, False) for bare in (True, False)]
    requests: list[ChatRequest | CompleteRequest] = []
    for seeded, bare in kinds:
        for prompt, sampling in zip(PROMPTS, SEEDED if seeded else GREEDY, strict=True):
            if bare:
                requests.append(CompleteRequest(prompt=prompt, sampling=sampling))
            else:
                requests.append(ChatRequest(messages=tuple(said(prompt)), sampling=sampling))
    texts = asked_of_engine(engine, model, tmp_path_factory.mktemp("scratch"), requests)
    return {kind: texts[k * STREAMS :][:STREAMS] for k, kind in enumerate(kinds)}


def pieces_of(surface: Surface, body: str, choice: int = 0) -> str:
    """The text of a choice in a stream, as it was sent."""
    lines = body.splitlines()
    if not surface.lines:
        lines = [line[6:] for line in lines if line.startswith("data: {")]
    pieces = [json.loads(line) for line in lines if line]
    assert not any("error" in piece for piece in pieces), body
    text = ""
    for piece in pieces:
        choices = piece.get("choices")
        if choices is None or (choices and choices[0]["index"] == choice):
            text += surface.piece(piece)
    return text


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


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("surface", SURFACES[:2], ids=lambda surface: surface.path)
async def test_choices_under_load_say_what_single_requests_say(daemon, surface, streams):
    """Each choice has a seed of its own: that of the request, and one more for each before it.

    Four requests of four choices each are four times what the model has slots for.
    """
    async with aiohttp.ClientSession() as session:

        async def ask(number: int, seed: int, **fields: Any) -> str:
            body = {"model": MODEL, **surface.body(PROMPTS[number], number), "seed": seed, **fields}
            async with session.post(f"{daemon.url}{surface.path}", json=body) as response:
                text = await response.text()
            assert response.status == 200, text
            return text

        async def choices(number: int) -> list[str]:
            text = await ask(number, 1000 * number, n=4, stream=streams)
            if streams:
                return [pieces_of(surface, text, choice) for choice in range(4)]
            entries = json.loads(text)["choices"]
            assert [entry["index"] for entry in entries] == [0, 1, 2, 3]
            return [surface.whole({"choices": [entry]}) for entry in entries]

        singles = [
            [surface.whole(json.loads(await ask(number, 1000 * number + k))) for k in range(4)]
            for number in range(4)
        ]
        assert len({text for texts in singles for text in texts}) == 16
        assert await asyncio.gather(*map(choices, range(4))) == singles


async def test_sixteen_questions_are_answered_with_all_that_the_engine_says(
    engine, daemon, tmp_path_factory
):
    """Answers of the Pieces API have no limit but the context, which is short here."""
    folder = tmp_path_factory.mktemp("brief")
    model = gguf_models.tiny_llama(folder, context_length=256)
    greedy = Sampling(temperature=0)
    requests = [ChatRequest(messages=tuple(said(prompt)), sampling=greedy) for prompt in PROMPTS]
    scratch = tmp_path_factory.mktemp("scratch")
    expected = await asyncio.to_thread(asked_of_engine, engine, model, scratch, requests)
    assert len(set(expected)) == STREAMS and all(len(text) > TOKENS for text in expected)
    add(daemon, "brief", str(model), options=EXACT)
    model_id = daemon.model("brief")["id"]
    async with aiohttp.ClientSession() as session:

        async def ask(prompt: str) -> str:
            asked = {"query": prompt, "model": model_id, "relevant": {"iterable": []}}
            async with session.post(f"{daemon.url}/qgpt/question", json=asked) as response:
                assert response.status == 200, await response.text()
                (answer,) = (await response.json())["answers"]["iterable"]
            return str(answer["text"])

        assert await asyncio.gather(*map(ask, PROMPTS)) == expected


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
