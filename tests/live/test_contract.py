"""The contract, on every backend and real files: each test runs for each case of contract_cases.

A worker in a process of its own holds the model, as in the daemon.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from contract_cases import CASES, Case, artifact_of, sample
from running import SAMPLE, RunningDaemon, needs_engine

from backends import gguf
from backends.contract import (
    Artifact,
    BackendError,
    ChatRequest,
    ClassifyRequest,
    CompleteRequest,
    Count,
    CountRequest,
    Delta,
    Done,
    EmbedRequest,
    LoadOptions,
    LoadSpec,
    RerankRequest,
    Sampling,
    SavedConversation,
    Task,
    Upstream,
)
from backends.registry import BUILTIN, load_class
from daemon import errors
from daemon.workers.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
LOAD_S = 60.0
GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)
GREEDY_TO_THE_END = replace(GREEDY, max_tokens=400)
pytestmark = pytest.mark.timeout(180)


def for_tasks(*tasks: Task):
    """Run a test for the cases that have one of these tasks; without any, for all."""
    cases = [case for case in CASES if not tasks or case.tasks & set(tasks)]
    return pytest.mark.parametrize("case", cases, ids=str, indirect=True, scope="module")


generating = for_tasks(Task.CHAT, Task.COMPLETE)


@pytest.fixture(scope="module")
def case(request) -> Case:
    needs_engine(request.param.module)
    return request.param


@pytest.fixture(scope="module")
def artifact(case, tmp_path_factory) -> Artifact:
    return artifact_of(case.build(tmp_path_factory.mktemp(case.name)))


@pytest.fixture(scope="module")
def upstream(case, tmp_path_factory):
    """Another modeld with the sample model, for a remote case."""
    if not case.is_remote:
        yield None
        return
    wanted = LoadOptions(context_length=case.context_length, slots=case.slots, threads=2)
    need = load_class(BUILTIN["xllamacpp"]).estimate(artifact_of(sample(Path())), wanted)
    other = RunningDaemon(
        tmp_path_factory.mktemp("upstream"),
        MODELD_MODELS_CONTEXT_LENGTH=str(case.context_length),
        MODELD_MODELS_SLOTS=str(case.slots),
        # or it would load the model anew with a longer context for a prompt that needs one
        MODELD_MEMORY_LIMIT=str(need.total_bytes + 4 * 1024**2),
    )
    other.start()
    try:
        other.download()
        other.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
        yield Upstream(url=other.url, model=SAMPLE)
    finally:
        other.stop()


def spec_of(case, artifact, upstream, scratch: Path) -> LoadSpec:
    """What the daemon would load the model with."""
    options = LoadOptions(
        context_length=case.context_length, slots=case.slots, threads=case.threads
    )
    estimate = load_class(case.backend).estimate(artifact, options)
    return LoadSpec(
        artifact=artifact,
        context_length=estimate.context_length,
        slots=estimate.slots,
        threads=case.threads,
        scratch_dir=str(scratch),
        upstream=upstream,
    )


@pytest.fixture
async def worker(case, artifact, upstream, tmp_path) -> AsyncIterator[Worker]:
    """A worker that has loaded the case's model; `worker.loaded` is what that became."""
    worker = await Worker.start(case.backend, name=case.name, scratch=tmp_path)
    try:
        spec = spec_of(case, artifact, upstream, tmp_path)
        worker.loaded = await worker.load(spec, timeout_s=LOAD_S, progress=lambda _: None)
        yield worker
    finally:
        await worker.stop("the test is over")


def asking(case: Case, text: str, sampling: Sampling):
    if Task.CHAT in case.tasks:
        return ChatRequest(messages=({"role": "user", "content": text},), sampling=sampling)
    return CompleteRequest(prompt=text, sampling=sampling)


async def answer(worker: Worker, request) -> tuple[str, Done]:
    """The whole text and the end of a generation."""
    _, entry = worker.submit(request)
    text = ""
    async for piece in worker.answers(entry):
        if isinstance(piece, Done):
            return text, piece
        text += piece.content
    raise AssertionError("no end")


def tokens_in(message: str) -> int:
    """The number of tokens that an error tells of."""
    found = re.search(r"([0-9]+) tokens", message)
    assert found, message
    return int(found[1])


async def result(worker: Worker, request):
    _, entry = worker.submit(request)
    async for piece in worker.answers(entry):
        return piece


# loading


@for_tasks()
async def test_a_load_tells_tasks_slots_and_context(case, worker):
    assert case.tasks <= set(worker.loaded.tasks)
    assert worker.loaded.slots >= 1
    assert worker.loaded.engine_version or case.is_remote
    assert 0 < worker.loaded.context_length <= case.context_length


PRELUDE = """
import os, sys
import msgspec
from backends.contract import ChatRequest, CompleteRequest, LoadSpec
from backends.registry import BUILTIN, load_class
spec, chat, complete = msgspec.json.decode(
    sys.stdin.buffer.read(), type=tuple[LoadSpec, ChatRequest | None, CompleteRequest | None]
)
cls = load_class(sys.argv[1])
def generate(backend, cancelled):
    ask = backend.chat if chat is not None else backend.complete
    return ask(chat or complete, cancelled)
"""


def in_a_child(case, spec, program: str, request=None) -> list[str]:
    """Run `program` on the backend itself, in a process of its own, since engines crash."""
    chat = request if isinstance(request, ChatRequest) else None
    complete = request if isinstance(request, CompleteRequest) else None
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "plugin")))
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program + "\nos._exit(0)\n", case.backend],
        input=msgspec.json.encode((spec, chat, complete)),
        capture_output=True,
        timeout=120,
        cwd=spec.scratch_dir,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.decode().splitlines() if line.startswith(">")]


@for_tasks()
def test_it_loads_again_after_a_close_and_closing_twice_is_fine(case, artifact, upstream, tmp_path):
    program = """
cls().close()
for _ in range(2):
    backend = cls()
    loaded = backend.load(spec, lambda _: None)
    backend.close()
    backend.close()
    print(">", len(loaded.tasks), flush=True)
"""
    assert len(in_a_child(case, spec_of(case, artifact, upstream, tmp_path), program)) == 2


@for_tasks()
def test_an_option_that_it_does_not_have_is_refused_by_name(case, artifact):
    cls = load_class(case.backend)
    with pytest.raises(BackendError, match="no option 'no_such_option'") as refused:
        cls.estimate(artifact, LoadOptions(engine={"no_such_option": 1}))
    assert refused.value.code == "invalid_request"


@pytest.mark.parametrize("case", [c for c in CASES if not c.is_remote], ids=str, indirect=True)
async def test_a_file_that_is_damaged_fails_with_a_reason(case, artifact, tmp_path):
    root = os.path.commonpath([os.path.dirname(file.path) for file in artifact.files])
    damaged = tmp_path / "damaged"
    copies = []
    for number, file in enumerate(artifact.files):
        copy = damaged / os.path.relpath(file.path, root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(Path(file.path).read_bytes() if number else b"\x00" * 4096)
        copies.append(replace(file, path=str(copy), size_bytes=copy.stat().st_size))
    broken = replace(artifact, files=tuple(copies))
    worker = await Worker.start(case.backend, name=case.name, scratch=tmp_path)
    try:
        with pytest.raises((errors.LoadFailed, errors.WorkerCrashed)) as failed:
            spec = spec_of(case, broken, None, tmp_path)
            await worker.load(spec, timeout_s=LOAD_S, progress=lambda _: None)
        assert len(failed.value.message) > 10
    finally:
        await worker.stop("the test is over")


# generation


@generating
async def test_the_same_seed_gives_the_same_text_and_another_one_another(case, worker):
    def seeded(seed):
        return asking(case, "Tell a story.", replace(GREEDY, temperature=1.5, seed=seed))

    first, _ = await answer(worker, seeded(7))
    again, _ = await answer(worker, seeded(7))
    others = [(await answer(worker, seeded(seed)))[0] for seed in (8, 9, 10)]
    assert first == again
    assert case.certain or any(other != first for other in others)


@generating
async def test_greedy_text_does_not_depend_on_who_else_is_served(case, worker):
    request = asking(case, "Where is the Eiffel Tower?", GREEDY)
    alone, _ = await answer(worker, request)
    together = await asyncio.gather(*(answer(worker, request) for _ in range(worker.loaded.slots)))
    assert alone and [text for text, _ in together] == [alone] * worker.loaded.slots


@generating
async def test_max_tokens_is_kept_to_the_token(case, worker):
    for limit in (1, 5):
        _, done = await answer(worker, asking(case, "Count.", replace(GREEDY, max_tokens=limit)))
        assert (done.finish_reason, done.usage.completion_tokens) == ("length", limit)
        assert done.usage.prompt_tokens > 0


@generating
async def test_a_stop_sequence_ends_the_answer_and_is_no_part_of_it(case, worker):
    whole, _ = await answer(worker, asking(case, "Tell a story.", GREEDY))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    sampling = replace(GREEDY, stop=(stop,))
    text, done = await answer(worker, asking(case, "Tell a story.", sampling))
    assert text == whole[: whole.index(stop)]
    assert done.finish_reason == "stop"
    assert done.stopped_by == stop or case.is_remote  # which not every upstream tells
    _, done = await answer(worker, asking(case, "Tell a story.", replace(GREEDY, stop=("\0",))))
    assert done.stopped_by == ""


@for_tasks(Task.CHAT)
async def test_the_tokens_of_a_prompt_are_counted_as_its_answer_counts_them(case, worker):
    if not hasattr(load_class(case.backend), "count"):
        with pytest.raises(errors.InvalidRequest, match="can't count tokens"):
            await result(worker, CountRequest(chat=asking(case, "Hello", GREEDY)))
        return
    conversation = ChatRequest(
        messages=(
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Wo liegt Größenwahn? 日本語 🙂"},
            {"role": "assistant", "content": "There."},
            {"role": "user", "content": "And then? " * 20},
        ),
        sampling=replace(GREEDY, max_tokens=1),
    )
    for request in (asking(case, "Hello", replace(GREEDY, max_tokens=1)), conversation):
        _, done = await answer(worker, request)
        assert await result(worker, CountRequest(chat=request)) == Count(
            tokens=done.usage.prompt_tokens
        )
    longer = asking(case, "word " * 2 * case.context_length, GREEDY)
    count = await result(worker, CountRequest(chat=longer))
    assert count.tokens >= 2 * case.context_length


@pytest.mark.parametrize("case", [c for c in CASES if c.build is sample], ids=str, indirect=True)
async def test_a_call_that_is_required_is_counted_with_all_that_asks_for_it(case, worker):
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    chat = asking(case, "What time is it?", replace(GREEDY, max_tokens=64, ignore_eos=False))
    request = replace(chat, tools=(tool,), tool_choice="required")
    _, done = await answer(worker, request)
    assert done.finish_reason == "tool_calls"
    count = await result(worker, CountRequest(chat=request))
    assert count.tokens == done.usage.prompt_tokens


@generating
def test_a_cancel_ends_an_answer_within_a_token(case, artifact, upstream, tmp_path):
    """The engine looks before each token: after the look that says so there is one at most."""
    program = """
backend = cls()
backend.load(spec, lambda _: None)
def run(limit):
    looks, deltas = 0, 0
    def cancelled():
        nonlocal looks
        looks += 1
        return looks > limit
    generation = generate(backend, cancelled)
    while True:
        try:
            next(generation)
            deltas += 1
        except StopIteration as end:
            print(">", deltas, end.value.finish_reason, flush=True)
            return
run(20)
run(1_000_000)
"""
    request = asking(case, "Tell a long story.", replace(GREEDY, max_tokens=100))
    spec = spec_of(case, artifact, upstream, tmp_path)
    cancelled, whole = in_a_child(case, spec, program, request)
    _, deltas, reason = cancelled.split()
    if not case.is_remote:  # it looks by the clock, not by the token
        assert reason == "cancelled" and int(deltas) <= 21
    assert whole.split()[2] == "length" and int(whole.split()[1]) > 30  # it goes on


@for_tasks(Task.CHAT)
async def test_a_cancel_sent_to_a_worker_ends_the_answer(case, worker):
    request_id, entry = worker.submit(asking(case, "Tell a long story.", GREEDY_TO_THE_END))
    answers = worker.answers(entry)
    assert isinstance(await anext(answers), Delta)
    await worker.cancel(request_id)
    assert entry.finished.done()
    rest = [piece async for piece in answers]
    assert isinstance(rest[-1], Done)


@generating
async def test_a_cancel_frees_the_slot_for_the_next_request(case, worker):
    sampling = replace(GREEDY, max_tokens=100)
    for _ in range(2 * worker.loaded.slots):
        request_id, entry = worker.submit(asking(case, "Tell a long story.", sampling))
        await worker.cancel(request_id)
        pieces = [piece async for piece in worker.answers(entry)]
        assert isinstance(pieces[-1], Done)
    text, _ = await answer(worker, asking(case, "Where is the Eiffel Tower?", GREEDY))
    assert text


@pytest.mark.parametrize("case", [c for c in CASES if c.build is sample], ids=str, indirect=True)
def test_a_cancel_ends_the_reading_of_a_prompt_between_two_batches(
    case, artifact, upstream, tmp_path
):
    program = """
backend = cls()
backend.load(spec, lambda _: None)
looks = 0
def counted(limit):
    def cancelled():
        global looks
        looks += 1
        return looks > limit
    return cancelled
def run(limit):
    global looks
    looks = deltas = 0
    generation = generate(backend, counted(limit))
    while True:
        try:
            next(generation)
            deltas += 1
        except StopIteration as end:
            print(">", looks, deltas, end.value.finish_reason, flush=True)
            return
run(1)
run(1_000_000)
"""
    # One token of an answer: what else is looked at is the prompt.
    request = asking(case, "word " * 400, replace(GREEDY, max_tokens=1))
    spec = spec_of(case, artifact, upstream, tmp_path)
    cancelled, whole = in_a_child(case, spec, program, request)
    assert cancelled.split()[2:] == ["0", "cancelled"]
    assert whole.split()[3] == "length"
    batches = 400 // gguf.batch_size(artifact, spec.threads, spec.context_length, spec.slots)
    assert batches >= 3 and int(whole.split()[1]) >= batches


@generating
async def test_a_prompt_that_does_not_fit_is_refused_with_its_number_of_tokens(case, worker):
    request = asking(case, "word " * 2 * case.context_length, GREEDY)
    with pytest.raises(errors.ContextLengthExceeded) as refused:
        await answer(worker, request)
    assert tokens_in(refused.value.message) >= 2 * case.context_length
    assert refused.value.tokens in (tokens_in(refused.value.message), None)
    assert refused.value.tokens or case.is_remote
    assert str(worker.loaded.context_length) in refused.value.message
    text, _ = await answer(worker, asking(case, "Hello", GREEDY))
    assert text  # it goes on


@generating
async def test_an_answer_that_fills_the_context_ends_there(case, worker):
    sampling = replace(GREEDY, max_tokens=None)
    _, done = await answer(worker, asking(case, "Tell a story.", sampling))
    assert done.finish_reason == "length"
    total = done.usage.prompt_tokens + done.usage.completion_tokens
    assert total <= worker.loaded.context_length


@generating
async def test_an_answer_that_is_wanted_whole_is_refused_where_it_has_no_room(case, worker):
    if case.is_remote:
        return  # an upstream's answers are as long as it makes them
    most = worker.loaded.context_length
    wanted = asking(case, "Tell a story.", replace(GREEDY, max_tokens=most - 1, whole=True))
    with pytest.raises(errors.ContextLengthExceeded) as refused:
        await answer(worker, wanted)
    prompt = refused.value.tokens
    assert prompt == tokens_in(refused.value.message) > 1
    fits = asking(case, "Tell a story.", replace(GREEDY, max_tokens=most - prompt, whole=True))
    _, done = await answer(worker, fits)
    assert done.usage.prompt_tokens == prompt
    assert done.usage.completion_tokens == most - prompt or done.finish_reason == "stop"


@pytest.mark.parametrize("case", [c for c in CASES if c.grammar], ids=str, indirect=True)
async def test_a_character_of_several_tokens_is_never_broken(case, worker):
    said = "ẞ日本語🙂🏳️‍🌈é"
    sampling = replace(GREEDY, grammar=f'root ::= "{said}"', ignore_eos=False, max_tokens=64)
    _, entry = worker.submit(asking(case, "Say it.", sampling))
    pieces = [piece async for piece in worker.answers(entry)]
    texts = [piece.content for piece in pieces[:-1]]
    assert "".join(texts) == said
    assert not any("\ufffd" in text for text in texts)
    assert pieces[-1].usage.completion_tokens > len(texts)  # there were characters to break


# conversations that outlive an unload


@pytest.fixture
async def another(case, artifact, upstream, tmp_path) -> AsyncIterator[Worker]:
    """A second worker, which has loaded nothing; `another.spec` is what it may load."""
    scratch = tmp_path / "another"
    scratch.mkdir()
    worker = await Worker.start(case.backend, name=case.name, scratch=scratch)
    worker.spec = spec_of(case, artifact, upstream, scratch)
    try:
        yield worker
    finally:
        await worker.stop("the test is over")


@generating
async def test_what_is_saved_goes_on_in_another_worker(case, worker, another, tmp_path):
    folder = tmp_path / "states"
    first = asking(case, "Tell a story. " * 10, GREEDY)
    text, done = await answer(worker, first)
    if Task.CHAT in case.tasks:
        said = ({"role": "assistant", "content": text}, {"role": "user", "content": "Go on."})
        second = replace(first, messages=(*first.messages, *said))
    else:
        second = replace(first, prompt=f"{first.prompt}{text} And")
    if not hasattr(load_class(case.backend), "save_state"):
        with pytest.raises(errors.EngineError, match="can't save"):
            await worker.save_state(folder, limit_bytes=2**30, timeout_s=LOAD_S)
        return
    saved = await worker.save_state(folder, limit_bytes=2**30, timeout_s=LOAD_S)
    assert len(saved) == 1 and saved[0].tokens >= done.usage.prompt_tokens
    spec = replace(another.spec, state_dir=str(folder), conversations=saved)
    loaded = await another.load(spec, timeout_s=LOAD_S, progress=lambda _: None)
    assert loaded.restored == (saved[0].name,)
    wanted, _ = await answer(worker, second)
    resumed, done = await answer(another, second)
    assert resumed == wanted
    assert done.usage.cached_tokens == pytest.approx(saved[0].tokens, abs=8)


@for_tasks()
async def test_what_cannot_be_restored_does_not_keep_it_from_loading(case, another, tmp_path):
    lost = SavedConversation(name=f"{'0' * 32}.kv", size_bytes=1, sha256="0" * 64, tokens=1)
    spec = replace(another.spec, state_dir=str(tmp_path), conversations=(lost, lost))
    loaded = await another.load(spec, timeout_s=LOAD_S, progress=lambda _: None)
    assert loaded.restored == ()


@for_tasks()
async def test_a_crash_of_the_engine_is_reported(case, worker):
    said = asyncio.Event()

    async def tell_stories() -> None:
        sampling = replace(GREEDY, max_tokens=case.context_length - 64)
        while True:  # a tiny model may have ended one story before it is killed
            _, entry = worker.submit(asking(case, "Tell a story.", sampling))
            async for _ in worker.answers(entry):
                said.set()

    stories = None
    if case.tasks & {Task.CHAT, Task.COMPLETE}:
        stories = asyncio.create_task(tell_stories())
        begun = asyncio.create_task(said.wait())
        await asyncio.wait({stories, begun}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
    os.kill(worker.pid, signal.SIGKILL)
    if stories is not None:
        with pytest.raises(errors.WorkerCrashed, match="SIGKILL"):
            await stories
    crash = await asyncio.shield(worker.ended)
    assert isinstance(crash, errors.WorkerCrashed)


# vectors, scores, labels


def unpack(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def cosine(a: bytes, b: bytes) -> float:
    return sum(x * y for x, y in zip(unpack(a), unpack(b), strict=True))


TEXTS = (
    "A cat sits on the mat.",
    "The quarterly report is due on Friday, and nobody has begun to write it.",
    "Ein Kätzchen 🐈 sitzt da.",
    "cats",
)


@for_tasks(Task.EMBED)
async def test_vectors_have_length_1_and_batch_and_single_agree(case, worker):
    together = await result(worker, EmbedRequest(inputs=TEXTS))
    assert together.dimensions * 4 == len(together.vectors[0])
    assert together.usage.prompt_tokens >= 2 * len(TEXTS)
    singles = [await result(worker, EmbedRequest(inputs=(text,))) for text in TEXTS]
    concurrent = await asyncio.gather(
        *(result(worker, EmbedRequest(inputs=(text,))) for text in TEXTS[: worker.loaded.slots])
    )
    for vector, single in zip(together.vectors, singles, strict=True):
        assert math.hypot(*unpack(vector)) == pytest.approx(1, abs=1e-4)
        assert cosine(vector, single.vectors[0]) >= 0.9999
    for single, other in zip(singles, concurrent, strict=False):
        assert cosine(single.vectors[0], other.vectors[0]) >= 0.9999
    assert cosine(together.vectors[0], together.vectors[1]) < 0.99


@for_tasks(Task.EMBED)
async def test_fewer_dimensions_are_the_first_ones(case, worker):
    whole = await result(worker, EmbedRequest(inputs=TEXTS[:1]))
    short = await result(worker, EmbedRequest(inputs=TEXTS[:1], dimensions=8))
    head = unpack(whole.vectors[0])[:8]
    length = math.hypot(*head)
    assert unpack(short.vectors[0]) == pytest.approx([x / length for x in head], abs=1e-4)
    with pytest.raises(errors.InvalidRequest, match="dimensions"):
        await result(worker, EmbedRequest(inputs=TEXTS[:1], dimensions=100_000))


@for_tasks(Task.EMBED, Task.RERANK, Task.CLASSIFY)
async def test_a_text_that_is_too_long_is_refused_with_its_tokens_or_cut(case, worker):
    text = "word " * 2 * case.context_length

    def request(*, truncate):
        if Task.EMBED in case.tasks:
            return EmbedRequest(inputs=("short", text), truncate=truncate)
        if Task.RERANK in case.tasks:
            return RerankRequest(query="which", documents=("short", text), truncate=truncate)
        return ClassifyRequest(inputs=("short", text), truncate=truncate)

    with pytest.raises(errors.ContextLengthExceeded) as refused:
        await result(worker, request(truncate=False))
    assert tokens_in(refused.value.message) >= 2 * case.context_length
    await result(worker, request(truncate=True))


@for_tasks(Task.EMBED)
async def test_what_is_cut_is_the_end(case, worker):
    full = "cat " * 2 * case.context_length
    texts = (full, full + "annual tax report " * 50, "annual tax report " * 50 + full)
    same, cut, other = (await result(worker, EmbedRequest(inputs=texts, truncate=True))).vectors
    assert cosine(same, cut) >= 0.9999 > cosine(same, other)


@for_tasks(Task.EMBED)
async def test_characters_of_several_tokens_count_in_full(case, worker):
    wide = "🐈" * case.context_length
    with pytest.raises(errors.ContextLengthExceeded):
        await result(worker, EmbedRequest(inputs=(wide + " " + "日" * case.context_length,)))
    inputs = (wide, "日" * (case.context_length - 1), "日" * 2 * case.context_length)
    found = await result(worker, EmbedRequest(inputs=inputs, truncate=True))
    assert len(found.vectors) == 3


@for_tasks(Task.RERANK)
async def test_documents_are_scored_in_their_order_and_each_alone_the_same(case, worker):
    documents = ("cats sit on mats", "the report is due", "cats")
    together = await result(worker, RerankRequest(query="Where do cats sit?", documents=documents))
    assert len(together.scores) == 3 and len(set(together.scores)) > 1
    for document, score in zip(documents, together.scores, strict=True):
        request = RerankRequest(query="Where do cats sit?", documents=(document,))
        alone = await result(worker, request)
        assert alone.scores[0] == pytest.approx(score, abs=1e-2)


@for_tasks(Task.CLASSIFY)
async def test_every_text_gets_a_score_for_every_label(case, worker):
    classes = await result(worker, ClassifyRequest(inputs=TEXTS))
    assert len(classes.labels) == len(TEXTS)
    names = set(classes.labels[0])
    assert len(names) > 1
    for labels in classes.labels:
        assert set(labels) == names
        assert all(0 <= score <= 1 for score in labels.values())
