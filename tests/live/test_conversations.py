"""Warm resume on the GGUF engines: what was saved by one worker, another one goes on from."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import stat
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_architectures
import gguf_models
import pytest
from contract_cases import GGUF, artifact_of
from running import needs_engine

from backends.contract import (
    ChatRequest,
    CompleteRequest,
    Done,
    EmbedRequest,
    LoadSpec,
    Sampling,
    SavedConversation,
)
from daemon.workers.worker import Worker

PATIENCE_S = 60.0
LIMIT_BYTES = 2**30
STORY = "The cat sat on the mat, and the dog lay down beside it. " * 12
QUESTION = "What did the dog do?"
SYSTEM = {"role": "system", "content": "You are helpful."}
# Then the text depends as little as can be on how a prompt was spread over batches: a state that is
# gone on from and a prompt that is read anew differ in that.
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
pytestmark = pytest.mark.timeout(180)

Start = Callable[..., Awaitable[Worker]]


@pytest.fixture(params=list(GGUF))
def engine(request) -> str:
    needs_engine(request.param)
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
async def start(engine, tmp_path) -> AsyncIterator[Start]:
    """`await start(model, saved)` loads a model in a new process and restores conversations."""
    workers = []

    async def started(
        model: Path | None = None, saved: tuple[SavedConversation, ...] = (), **changes: Any
    ) -> Worker:
        for other in workers:
            await other.stop("another one has the model now")
        scratch = tmp_path / f"scratch{len(workers)}"
        scratch.mkdir(mode=0o700)
        worker = await Worker.start(GGUF[engine], name="tiny", scratch=scratch)
        workers.append(worker)
        spec = LoadSpec(
            artifact=artifact_of(model or gguf_models.smollm2()),
            context_length=2048,
            slots=4,
            threads=2,
            scratch_dir=str(scratch),
            state_dir=str(folder_of(tmp_path)),
            conversations=saved,
        )
        spec = replace(spec, **changes)
        worker.loaded = await worker.load(spec, timeout_s=PATIENCE_S, progress=lambda _: None)
        left = [path.name for path in scratch.iterdir() if not path.name.endswith(".sock")]
        assert not left
        return worker

    yield started
    for worker in workers:
        await worker.stop("the test is over")


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "states" / "key"


@pytest.fixture
def folder(tmp_path) -> Path:
    return folder_of(tmp_path)


async def save(worker: Worker, folder: Path, limit_bytes: int = LIMIT_BYTES):
    return await worker.save_state(folder, limit_bytes=limit_bytes, timeout_s=PATIENCE_S)


async def answer(worker: Worker, request) -> tuple[str, Done]:
    _, entry = worker.submit(request)
    text = ""
    async for piece in worker.answers(entry):
        if isinstance(piece, Done):
            return text, piece
        text += piece.content
    raise AssertionError


def say(text: str, *before: dict[str, str]) -> ChatRequest:
    messages = (*(before or (SYSTEM,)), {"role": "user", "content": text})
    return ChatRequest(messages=messages, sampling=Sampling(temperature=0, max_tokens=16))


async def talk(worker: Worker, text: str, *before: dict[str, str]) -> tuple[str, Any, tuple]:
    """Say something; return the answer, the usage, and what was said so far."""
    request = say(text, *before)
    said, done = await answer(worker, request)
    return said, done.usage, (*request.messages, {"role": "assistant", "content": said})


async def test_a_conversation_goes_on_in_a_new_process(start, folder):
    worker = await start(engine=EXACT)
    _, first, so_far = await talk(worker, STORY + QUESTION)
    wanted, usage, _ = await talk(worker, "And the cat?", *so_far)
    worker = await start(engine=EXACT)
    await talk(worker, STORY + QUESTION)
    (saved,) = await save(worker, folder)
    # all that was computed: the last token of an answer that was cut is not
    assert saved.tokens == first.prompt_tokens + first.completion_tokens - 1
    worker = await start(saved=(saved,), engine=EXACT)
    assert worker.loaded.restored == (saved.name,)
    text, resumed, _ = await talk(worker, "And the cat?", *so_far)
    assert text == wanted
    assert resumed.cached_tokens >= first.prompt_tokens
    assert resumed.cached_tokens == usage.cached_tokens
    worker = await start(engine=EXACT)
    fresh, usage, _ = await talk(worker, "And the cat?", *so_far)
    assert (fresh, usage.cached_tokens) == (wanted, 0)


async def test_a_file_is_private_and_is_what_it_is_said_to_be(start, folder):
    worker = await start()
    await talk(worker, QUESTION)
    (saved,) = await save(worker, folder)
    (path,) = folder.iterdir()
    assert path.name == saved.name and len(path.stem) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) & 0o077 == 0
    content = path.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (saved.size_bytes, saved.sha256)
    assert await save(worker, folder) and len(list(folder.iterdir())) == 2  # a file of its own


async def tell_three(worker: Worker) -> list[tuple]:
    """Have three conversations at once, the longest first."""
    texts = [STORY + QUESTION, STORY[:300] + QUESTION, QUESTION]
    return await asyncio.gather(*(talk(worker, text) for text in texts))


async def test_of_several_the_longest_come_first_and_as_many_as_may_be(start, folder):
    worker = await start()
    talks = await tell_three(worker)
    saved = await save(worker, folder)
    tokens = [each.tokens for each in saved]
    lengths = [usage.prompt_tokens + usage.completion_tokens for _, usage, _ in talks]
    assert tokens == sorted(tokens, reverse=True) == pytest.approx(lengths, abs=1)
    sizes = [each.size_bytes for each in saved]
    two = await save(worker, folder, sizes[0] + sizes[2])
    assert [each.tokens for each in two] == [tokens[0], tokens[2]]
    assert [each.tokens for each in await save(worker, folder, sizes[1])] == tokens[1:2]
    assert await save(worker, folder, sizes[2] - 1) == ()
    assert await save(worker, folder, 0) == ()
    assert len(list(folder.iterdir())) == 6


@pytest.mark.parametrize(
    ("context_length", "slots", "kept"), [(4096, 2, 2), (8192, 1, 1), (2048, 8, 3)]
)
async def test_what_was_saved_fits_another_context_and_other_slots(
    start, folder, context_length, slots, kept
):
    worker = await start()
    talks = await tell_three(worker)
    saved = await save(worker, folder)
    worker = await start(saved=saved, context_length=context_length, slots=slots)
    assert worker.loaded.restored == tuple(each.name for each in saved[:kept])
    for before, (_, usage, so_far) in zip(saved[:kept], talks, strict=False):
        _, resumed, _ = await talk(worker, "And the cat?", *so_far)
        assert resumed.cached_tokens >= usage.prompt_tokens
        assert resumed.cached_tokens == pytest.approx(before.tokens, abs=4)


async def test_the_text_is_the_same_in_another_context_and_other_slots(start, folder):
    worker = await start(engine=EXACT)
    _, _, so_far = await talk(worker, STORY + QUESTION)
    wanted, _, _ = await talk(worker, "And the cat?", *so_far)
    worker = await start(engine=EXACT)
    await talk(worker, STORY + QUESTION)
    saved = await save(worker, folder)
    worker = await start(saved=saved, context_length=4096, slots=2, engine=EXACT)
    text, usage, _ = await talk(worker, "And the cat?", *so_far)
    assert text == wanted and usage.cached_tokens > saved[0].tokens - 4


async def test_a_context_that_is_too_short_has_none_of_it(start, folder):
    worker = await start()
    await talk(worker, STORY + STORY + QUESTION)
    short = await talk(worker, QUESTION)
    saved = await save(worker, folder)
    worker = await start(saved=saved, context_length=256)
    assert worker.loaded.restored == (saved[1].name,)
    _, usage, _ = await talk(worker, "And the cat?", *short[2])
    assert usage.cached_tokens >= short[1].prompt_tokens


async def test_new_conversations_leave_the_restored_ones_alone_while_there_is_room(start, folder):
    worker = await start()
    talks = await tell_three(worker)
    saved = (await save(worker, folder))[:2]
    worker = await start(saved=saved)
    for text in ("Name a colour of the rainbow.", "How far away is the moon from the earth?"):
        await talk(worker, text)
    for _, usage, so_far in talks[:2]:
        _, resumed, _ = await talk(worker, "And the cat?", *so_far)
        assert resumed.cached_tokens >= usage.prompt_tokens


async def test_the_least_wanted_makes_room_first(start, folder):
    worker = await start()
    talks = await tell_three(worker)
    saved = (await save(worker, folder))[:2]
    worker = await start(saved=saved, slots=2)
    await talk(worker, "How far away is the moon from the earth, and who measured it first?")
    _, usage, so_far = talks[0]
    _, resumed, _ = await talk(worker, "And the cat?", *so_far)
    assert resumed.cached_tokens >= usage.prompt_tokens


async def test_what_was_restored_and_not_used_is_saved_again(start, folder):
    worker = await start()
    _, usage, so_far = await talk(worker, STORY + QUESTION)
    first = await save(worker, folder)
    worker = await start(saved=first)
    second = await save(worker, folder)
    assert [each.tokens for each in second] == [each.tokens for each in first]
    assert second[0].name != first[0].name
    worker = await start(saved=second, slots=2)
    _, resumed, _ = await talk(worker, "And the cat?", *so_far)
    assert resumed.cached_tokens >= usage.prompt_tokens


# what can't be restored


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [flipped, truncated, Path.unlink])
async def test_a_file_that_was_changed_is_left_out_and_another_one_is_not(start, folder, spoil):
    worker = await start()
    wanted, _, _ = await talk(worker, STORY + QUESTION)
    _, usage, so_far = await talk(worker, "Where does the sun rise?")
    long, short = await save(worker, folder)
    spoil(folder / long.name)
    worker = await start(saved=(long, short), slots=1)
    assert worker.loaded.restored == (short.name,)
    _, resumed, _ = await talk(worker, "And the moon?", *so_far)
    assert resumed.cached_tokens >= usage.prompt_tokens
    assert (await talk(worker, STORY + QUESTION))[0] == wanted


async def test_a_name_never_leads_out_of_the_folder(start, folder, tmp_path):
    worker = await start()
    await talk(worker, QUESTION)
    (saved,) = await save(worker, folder)
    (folder / saved.name).rename(tmp_path / saved.name)
    names = [f"../../{saved.name}", str(tmp_path / saved.name)]
    worker = await start(saved=tuple(replace(saved, name=name) for name in names))
    assert worker.loaded.restored == ()


async def test_a_state_of_another_model_is_left_out(start, folder, models):
    worker = await start(gguf_models.tiny_llama(models))
    await answer(worker, CompleteRequest(prompt=STORY[:300], sampling=Sampling(max_tokens=4)))
    saved = await save(worker, folder)
    assert len(saved) == 1
    worker = await start(saved=saved)
    assert worker.loaded.restored == ()
    text, usage, _ = await talk(worker, "Where is the Eiffel Tower?")
    assert "Tower" in text and usage.cached_tokens == 0


@pytest.mark.parametrize("slots", [4, 2])
async def test_a_state_in_another_element_type_is_left_out(start, folder, slots):
    worker = await start(engine={"cache_type_k": "q8_0", "cache_type_v": "q8_0"})
    _, usage, so_far = await talk(worker, STORY[:300] + QUESTION)
    saved = await save(worker, folder)
    worker = await start(saved=saved, slots=slots)
    assert worker.loaded.restored == ()
    text, _, _ = await talk(worker, "Where is the Eiffel Tower?")
    assert "Tower" in text
    same = {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    worker = await start(saved=saved, slots=slots, engine=same)
    assert worker.loaded.restored == (saved[0].name,)
    _, resumed, _ = await talk(worker, "And the cat?", *so_far)
    assert resumed.cached_tokens >= usage.prompt_tokens


async def test_a_folder_that_cannot_be_written_is_an_error_and_the_model_goes_on(start, tmp_path):
    worker = await start()
    await talk(worker, QUESTION)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Exception, match="no conversation could be saved") as failed:
        await save(worker, tmp_path / "file" / "folder")
    assert failed.value.code == "engine_error"
    assert (await talk(worker, "Where is the Eiffel Tower?"))[0]


async def test_there_is_nothing_to_save_before_the_first_request(start, folder):
    assert await save(await start(), folder) == ()
    assert not folder.exists()


async def test_a_model_that_embeds_has_nothing_to_save(start, folder, models):
    worker = await start(gguf_models.embedder(models), context_length=512)
    _, entry = worker.submit(EmbedRequest(inputs=("a cat",)))
    assert [piece async for piece in worker.answers(entry)]
    assert await save(worker, folder) == ()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


GREY = (
    "data:image/png;base64,"
    + base64.b64encode(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">2I5B", 32, 32, 8, 0, 0, 0, 0))
        + png_chunk(b"IDAT", zlib.compress((b"\0" + b"\x80" * 32) * 32))
        + png_chunk(b"IEND", b"")
    ).decode()
)


async def test_what_followed_an_image_is_not_saved(start, engine, folder, models):
    where = models / f"seeing-{engine}"
    where.mkdir()
    (where / "model.gguf").hardlink_to(gguf_models.smollm2())
    gguf_models.image_encoder(where)
    worker = await start(where)
    await talk(worker, QUESTION)
    image = {"type": "image_url", "image_url": {"url": GREY}}
    content = [{"type": "text", "text": STORY}, image, {"type": "text", "text": "What is it?"}]
    await answer(worker, say(content))
    saved = await save(worker, folder)
    # what may hold images the one engine saves not at all, the other only what holds none
    assert len(saved) == (0 if engine == "xllamacpp" else 1)
    worker = await start(where, saved)
    assert len(worker.loaded.restored) == len(saved)


# models that keep something else than keys and values of all tokens

WORDS = " ".join("".join(random.Random(at).choices("abcdefgh", k=3)) for at in range(90))


@pytest.mark.parametrize("slots", [2, 1])
@pytest.mark.parametrize("kind", ["mamba", "lfm2", "deepseek2"])
async def test_states_and_latent_keys_are_resumed(start, folder, models, kind, slots):
    path = models / kind
    if not path.exists():
        path.mkdir()
        gguf_architectures.write(path, getattr(gguf_architectures, kind)(layers=4))
    (model,) = path.iterdir()
    worker = await start(model, slots=2)
    request = CompleteRequest(prompt=WORDS, sampling=Sampling(temperature=0, max_tokens=1))
    _, done = await answer(worker, request)
    saved = await save(worker, folder)
    longer = CompleteRequest(prompt=f"{WORDS} abc", sampling=Sampling(temperature=0, max_tokens=8))
    worker = await start(model, slots=slots)
    wanted, _ = await answer(worker, longer)
    worker = await start(model, saved, slots=slots)
    assert worker.loaded.restored == (saved[0].name,)
    text, resumed = await answer(worker, longer)
    assert text == wanted
    assert resumed.usage.cached_tokens == pytest.approx(done.usage.prompt_tokens, abs=8)


# a sliding window

LETTERS = "".join(random.Random(1).choices(gguf_models.PRINTABLE, k=900))


async def go_on(worker: Worker, prompt: str) -> tuple[str, int]:
    sampling = Sampling(temperature=0, max_tokens=40)
    text, done = await answer(worker, CompleteRequest(prompt=prompt, sampling=sampling))
    return text, done.usage.cached_tokens


@pytest.mark.parametrize("slots", [1, 2, 4])
async def test_a_window_is_resumed_and_left_again_far_back(start, folder, models, slots):
    """Far back is beyond what the state holds of the window: only all of it anew is right."""
    model = gguf_models.tiny_gemma(models)
    fresh = {}
    for prompt in (LETTERS + "abc", LETTERS[:400] + "xyz"):
        worker = await start(model, slots=2, engine=EXACT)
        fresh[prompt] = (await go_on(worker, prompt))[0]
    worker = await start(model, slots=2, engine=EXACT)
    said, _ = await go_on(worker, LETTERS)
    saved = await save(worker, folder)
    for prompt, text in fresh.items():
        worker = await start(model, saved, slots=slots, engine=EXACT)
        assert worker.loaded.restored == (saved[0].name,)
        assert (await go_on(worker, prompt))[0] == text
    worker = await start(model, saved, slots=slots, engine=EXACT)
    on, cached = await go_on(worker, LETTERS + said + "and on")
    assert cached >= 800
    worker = await start(model, slots=slots, engine=EXACT)
    assert await go_on(worker, LETTERS + said + "and on") == (on, 0)
