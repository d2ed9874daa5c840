"""Worker: one loaded model in a real process; what its requests are told, whatever it does."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends import wire
from backends.contract import (
    Artifact,
    ChatRequest,
    Delta,
    Done,
    LoadSpec,
    ModelFile,
    Sampling,
    SavedConversation,
)
from daemon import errors
from daemon.workers import worker as worker_module
from daemon.workers.child import Child
from daemon.workers.worker import Request, Worker, error_from

CHILDREN = Path(__file__).parent / "children"
PATIENCE_S = 10.0  # for what takes an interpreter's start on a busy machine

pytestmark = pytest.mark.timeout(60)

Start = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`await start()` gives a worker of the reference backend, `await start("torn")` a bad one."""
    started: list[Worker] = []

    async def start_worker(program: str = "", *arguments: str, backend: str = "") -> Worker:
        if program:
            command = [str(CHILDREN / f"{program}.py"), *arguments]
            child = await Child.start(command, union=wire.FromWorker, name="tiny")
            worker = Worker(child, "tiny")
        else:
            path = backend or "reference_backend:ReferenceBackend"
            worker = await Worker.start(path, name="tiny", scratch=tmp_path)
        started.append(worker)
        return worker

    yield start_worker
    for worker in started:
        worker.kill("the test is over")
        await end_of(worker)


@pytest.fixture
async def worker(start: Start) -> Worker:
    """A worker that has loaded its model, with two slots."""
    worker = await start()
    await load(worker)
    return worker


async def load(
    worker: Worker,
    order: str = "",
    *,
    slots: int = 2,
    timeout_s: float = PATIENCE_S,
    saved: tuple[SavedConversation, ...] = (),
    folder: Path | str = "",
    **orders: str,
):
    """Load a model; `order` and `orders` tell the reference backend how that and more goes."""
    artifact = Artifact(
        format="gguf",
        files=(ModelFile(path="/m.gguf", size_bytes=1, mtime_ns=1, sha256=""),),
        architecture="llama",
        parameters=1,
        quantization="F16",
        context_length=1024,
        weights_bytes=1,
        metadata={"test.load": order} | {f"test.{name}": how for name, how in orders.items()},
    )
    spec = LoadSpec(
        artifact=artifact,
        context_length=512,
        slots=slots,
        threads=1,
        scratch_dir="/",
        state_dir=str(folder),
        conversations=saved,
    )
    return await worker.load(spec, timeout_s=timeout_s, progress=lambda _: None)


def say(content: str, **sampling: Any) -> ChatRequest:
    message = {"role": "user", "content": content}
    return ChatRequest(messages=(message,), sampling=Sampling(**sampling))


async def answer(request: Request) -> tuple[str, Done]:
    """Return the whole text and the end of an answer."""
    async with asyncio.timeout(PATIENCE_S):
        *deltas, done = [part async for part in Worker.answers(request)]
    assert isinstance(done, Done)
    return "".join(delta.content for delta in deltas), done


async def first_delta(request: Request) -> Delta:
    async with asyncio.timeout(PATIENCE_S):
        async for part in Worker.answers(request):
            assert isinstance(part, Delta)
            return part
    raise AssertionError


async def failure(request: Request, *, within_s: float = PATIENCE_S) -> errors.ModeldError:
    """Return the error that ends the request."""
    with pytest.raises(errors.ModeldError) as error:
        async with asyncio.timeout(within_s):
            async for _ in Worker.answers(request):
                pass
    assert request.finished.done()
    return error.value


async def end_of(worker: Worker, *, within_s: float = PATIENCE_S) -> errors.ModeldError | None:
    """Return what `ended` gives, without ever cancelling it."""
    done, _ = await asyncio.wait([worker.ended], timeout=within_s)
    assert done, f"the worker's end was not seen within {within_s} s"
    return worker.ended.result()


# loading


async def test_a_model_is_loaded_and_says_what_it_is(start):
    worker = await start()
    loaded = await load(worker, slots=3)
    assert (loaded.slots, loaded.context_length) == (3, 512)
    assert loaded.tasks == ("chat", "complete", "vision", "embed", "rerank", "classify")
    assert psutil.Process(worker.pid).is_running()


async def test_progress_is_reported_as_it_is_made(start):
    worker = await start()
    seen: list[float] = []
    spec = LoadSpec(
        artifact=Artifact(
            format="gguf",
            files=(),
            architecture="llama",
            parameters=1,
            quantization="F16",
            context_length=1,
            weights_bytes=1,
            metadata={"test.load": "slow 0.1"},
        ),
        context_length=1,
        slots=1,
        threads=1,
        scratch_dir="/",
    )
    await worker.load(spec, timeout_s=PATIENCE_S, progress=seen.append)
    assert seen == [step / 10 for step in range(10)] + [1.0]


async def test_a_load_that_fails_says_why_and_is_no_crash(start):
    worker = await start()
    with pytest.raises(errors.LoadFailed, match="this model was made to fail"):
        await load(worker, "fail")
    assert not worker.ended.done()
    await worker.stop("it did not load")
    assert await end_of(worker) is None


async def test_a_crash_while_loading_ends_the_load_with_its_last_words(start):
    worker = await start()
    with pytest.raises(errors.WorkerCrashed, match=r"SIGSEGV.*about to crash"):
        await load(worker, "crash")
    assert isinstance(await end_of(worker), errors.WorkerCrashed)


async def test_a_load_that_hangs_is_given_up(start):
    worker = await start()
    with pytest.raises(errors.LoadTimeout, match=r"tiny.*load_timeout_s"):
        await load(worker, "hang", timeout_s=0.2)
    async with asyncio.timeout(PATIENCE_S):
        await worker.stop("it did not load")
    assert await end_of(worker) is None


async def test_a_stop_ends_a_load_under_way(start):
    worker = await start()
    loading = asyncio.create_task(load(worker, "hang"))
    await asyncio.sleep(0)
    worker.kill("it was unloaded while it loaded")
    with pytest.raises(errors.Conflict, match="it was unloaded while it loaded"):
        await loading
    assert await end_of(worker) is None


async def test_a_backend_that_cannot_be_imported_ends_the_load_with_the_reason(tmp_path):
    worker = await Worker.start("no_such_module:Backend", name="tiny", scratch=tmp_path)
    with pytest.raises(errors.WorkerCrashed, match=r"exit status 1.*No module named"):
        await load(worker)
    await end_of(worker)


# asking


async def test_an_answer_comes_in_parts_and_with_its_cost(worker):
    _, request = worker.submit(say("größe 🙂 three"))
    text, done = await answer(request)
    assert text == "größe 🙂 three"
    assert done.finish_reason == "stop"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 3)
    assert request.finished.done()


async def test_an_answer_that_reached_its_length_says_so(worker):
    _, request = worker.submit(say("!words 10", max_tokens=4))
    text, done = await answer(request)
    assert (text, done.finish_reason) == ("word0 word1 word2 word3", "length")


async def test_answers_of_several_requests_are_not_mixed_up(worker):
    pairs = [(f"{letter} " * 50).strip() for letter in "ab"]
    requests = [worker.submit(say(content))[1] for content in pairs]
    answers = await asyncio.gather(*(answer(request) for request in requests))
    assert [text for text, _ in answers] == pairs


async def test_an_error_is_that_of_the_one_request(worker):
    _, slow = worker.submit(say("!slow 10"))
    _, bad = worker.submit(say("!error"))
    error = await failure(bad)
    assert isinstance(error, errors.InvalidRequest) and error.status == 400
    assert error.message == "this request was made to fail"
    assert (await answer(slow))[1].finish_reason == "stop"


async def test_a_request_too_many_is_an_error_and_harms_no_other(worker):
    busy = [worker.submit(say("!slow 100000")) for _ in range(2)]
    for _, request in busy:
        await first_delta(request)
    _, surplus = worker.submit(say("one too many"))
    error = await failure(surplus)
    assert isinstance(error, errors.EngineError) and "2 slots" in error.message
    for number, request in busy:
        for _ in range(20):  # more than can have come before the refusal
            await first_delta(request)
        await worker.cancel(number)
        assert (await answer(request))[1].finish_reason == "cancelled"
    assert (await answer(worker.submit(say("free again"))[1]))[0] == "free again"


async def test_a_slot_is_free_as_soon_as_its_answer_has_ended(worker):
    """The very next request must not find it taken, not once in many."""
    for number in range(100):
        pair = [worker.submit(say(f"{number}"))[1] for _ in range(2)]
        for request in pair:
            assert (await answer(request))[0] == f"{number}"


async def test_a_request_before_the_load_is_an_error(start):
    worker = await start()
    error = await failure(worker.submit(say("hello"))[1])
    assert isinstance(error, errors.EngineError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", errors.InvalidRequest),
        ("context_length_exceeded", errors.ContextLengthExceeded),
        ("load_failed", errors.LoadFailed),
        ("engine_error", errors.EngineError),
        ("worker_crashed", errors.EngineError),  # a backend can't say that of itself
        ("something_new", errors.EngineError),
        ("", errors.EngineError),
    ],
)
def test_a_backend_s_code_becomes_the_daemon_s_error(code, kind):
    error = error_from(code, "why")
    assert type(error) is kind and error.message == "why"


def test_how_long_a_prompt_was_that_did_not_fit_is_passed_on():
    assert error_from("context_length_exceeded", "why", 5000).tokens == 5000
    assert error_from("context_length_exceeded", "why").tokens is None


async def test_a_request_is_finished_before_its_last_answer_is_taken():
    request, seen = Request(), []

    async def take():
        answer = await request.answers.get()
        seen.append((answer, request.finished.done()))

    request.finished.add_done_callback(lambda _: seen.append("finished"))
    taking = asyncio.create_task(take())
    await asyncio.sleep(0)
    request.finish(Done(finish_reason="stop"))
    await taking
    assert seen == ["finished", (Done(finish_reason="stop"), True)]


# cancelling


async def test_a_cancel_ends_the_work_and_frees_the_slot(worker):
    request_id, request = worker.submit(say("!slow 100000"))
    await first_delta(request)
    async with asyncio.timeout(1):
        await worker.cancel(request_id)
    assert request.finished.done()
    assert (await answer(request))[1].finish_reason == "cancelled"
    both = [worker.submit(say("free"))[1] for _ in range(2)]
    assert [(await answer(request))[0] for request in both] == ["free", "free"]


async def test_a_cancel_harms_no_other_request(worker):
    request_id, cancelled = worker.submit(say("!slow 100000"))
    _, other = worker.submit(say("!slow 20"))
    await first_delta(cancelled)
    await worker.cancel(request_id)
    assert (await answer(other))[1].usage.completion_tokens == 20


async def test_a_cancel_of_what_has_ended_is_nothing(worker):
    request_id, request = worker.submit(say("done"))
    await answer(request)
    async with asyncio.timeout(1):
        await worker.cancel(request_id)
        await worker.cancel(12345)
    assert not worker.ended.done()


async def test_two_cancels_of_one_request_both_return(worker):
    request_id, request = worker.submit(say("!slow 100000"))
    await first_delta(request)
    async with asyncio.timeout(2):
        await asyncio.gather(worker.cancel(request_id), worker.cancel(request_id))
    assert not worker.ended.done()


async def test_a_request_that_ignores_its_cancel_costs_the_worker_its_life(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "_CANCEL_GRACE_S", 0.2)
    request_id, stuck = worker.submit(say("!stuck"))
    _, other = worker.submit(say("!slow 100000"))
    await first_delta(other)
    async with asyncio.timeout(3):
        await worker.cancel(request_id)
    assert stuck.finished.done()
    assert isinstance(await failure(stuck), errors.WorkerCrashed)
    assert isinstance(await failure(other), errors.WorkerCrashed)
    assert isinstance(await end_of(worker), errors.WorkerCrashed)


# saving and restoring conversations


async def save(worker: Worker, folder: Path, *, timeout_s: float = PATIENCE_S):
    return await worker.save_state(folder, limit_bytes=1000, timeout_s=timeout_s)


async def tell(worker: Worker, *said: str) -> int:
    """Say something after what was said before; return how much of it was known."""
    messages = tuple({"role": "user", "content": each} for each in said)
    return (await answer(worker.submit(ChatRequest(messages=messages))[1]))[1].usage.cached_tokens


async def test_what_one_worker_saves_another_one_restores(start, tmp_path):
    folder = tmp_path / "states" / "key"
    worker = await start()
    assert (await load(worker)).restored == ()
    assert await save(worker, folder) == ()
    await tell(worker, "größe 🙂")
    await tell(worker, "one two three")
    saved = await save(worker, folder)
    assert [each.tokens for each in saved] == [6, 4]  # what was said and what was answered
    assert {path.name for path in folder.iterdir()} == {each.name for each in saved}
    await worker.stop("unloaded")
    other = await start()
    loaded = await load(other, saved=saved, folder=folder)
    assert loaded.restored == tuple(each.name for each in saved)
    assert await tell(other, "größe 🙂", "größe 🙂", "more") == 4


async def test_no_more_is_restored_than_there_are_slots(start, worker, tmp_path):
    await tell(worker, "one two three")
    await tell(worker, "four")
    saved = await save(worker, tmp_path)
    other = await start()
    loaded = await load(other, saved=saved, folder=tmp_path, slots=1)
    assert loaded.restored == (saved[0].name,)


async def test_what_a_worker_writes_is_for_its_user_alone(start, tmp_path):
    before = os.umask(0)
    try:
        worker = await start()
    finally:
        os.umask(before)
    await load(worker)
    await tell(worker, "one")
    folder = tmp_path / "states" / "key"
    (saved,) = await save(worker, folder)
    for path in (folder.parent, folder, folder / saved.name):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


async def test_nothing_is_saved_while_a_request_runs(worker, tmp_path):
    request_id, request = worker.submit(say("!slow 100000"))
    await first_delta(request)
    with pytest.raises(errors.EngineError, match="while requests"):
        await save(worker, tmp_path)
    await worker.cancel(request_id)
    assert await save(worker, tmp_path) == ()


async def test_no_request_runs_while_it_is_saved(start, tmp_path):
    worker = await start()
    await load(worker, save="hang")
    saving = asyncio.create_task(save(worker, tmp_path))
    await asyncio.sleep(0)
    error = await failure(worker.submit(say("hello"))[1])
    assert isinstance(error, errors.EngineError) and "being saved" in error.message
    with pytest.raises(errors.EngineError, match="another save"):
        await save(worker, tmp_path)
    assert not saving.done()
    async with asyncio.timeout(PATIENCE_S):
        await worker.stop("it was unloaded")
    with pytest.raises(errors.Conflict, match="it was unloaded"):
        await saving


async def test_a_save_that_takes_too_long_is_given_up(start, tmp_path):
    worker = await start()
    await load(worker, save="hang")
    with pytest.raises(errors.EngineError, match=r"tiny did not save .* within 0\.2 s"):
        await save(worker, tmp_path, timeout_s=0.2)
    assert not worker.ended.done()
    async with asyncio.timeout(PATIENCE_S):
        await worker.stop("it was unloaded")
    assert await end_of(worker) is None


async def test_a_save_that_is_answered_after_it_was_given_up_harms_nothing(worker, tmp_path):
    await tell(worker, "one")
    saving = asyncio.create_task(save(worker, tmp_path))
    await asyncio.sleep(0)
    saving.cancel()
    await asyncio.wait([saving])
    while not list(tmp_path.glob("*.kv")):
        await asyncio.sleep(0.01)
    cached = None
    async with asyncio.timeout(PATIENCE_S):
        while cached is None:  # the file is there a moment before the save has ended
            try:
                cached = await tell(worker, "one", "one")
            except errors.ModeldError as error:
                assert "being saved" in error.message
    assert cached == 2


@pytest.mark.parametrize(("how", "why"), [("fail", "made to fail"), ("bug", "a bug of a backend")])
async def test_a_save_that_fails_says_why_and_costs_nothing_else(start, tmp_path, how, why):
    worker = await start()
    await load(worker, save=how)
    with pytest.raises(errors.EngineError, match=why):
        await save(worker, tmp_path)
    assert await tell(worker, "one") == 0


async def test_a_crash_while_it_is_saved_is_told(start, tmp_path):
    worker = await start()
    await load(worker, save="hang")
    saving = asyncio.create_task(save(worker, tmp_path))
    while worker._child.last_line() != "it hangs":
        await asyncio.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(errors.WorkerCrashed, match="SIGKILL"):
        await saving
    with pytest.raises(errors.WorkerCrashed):
        await save(worker, tmp_path)


async def test_a_backend_that_cannot_save_says_so(start, tmp_path):
    worker = await start(backend="modeld_recital:Recital")
    with pytest.raises(errors.EngineError, match="this backend can't save"):
        await save(worker, tmp_path)


async def test_nothing_is_saved_before_a_load(start, tmp_path):
    with pytest.raises(errors.EngineError, match="no model is loaded"):
        await save(await start(), tmp_path)


@pytest.mark.parametrize("how", ["fail", "bug"])
async def test_a_restore_that_fails_does_not_fail_the_load(start, worker, tmp_path, how):
    await tell(worker, "one")
    saved = await save(worker, tmp_path)
    other = await start()
    assert (await load(other, saved=saved, folder=tmp_path, restore=how)).restored == ()
    assert await tell(other, "one", "one") == 0


# crashing


@pytest.mark.alone
async def test_a_kill_is_told_to_all_that_was_in_flight(worker):
    requests = [worker.submit(say("!slow 100000"))[1] for _ in range(2)]
    for request in requests:
        await first_delta(request)
    os.kill(worker.pid, signal.SIGKILL)
    began = time.monotonic()
    for request in requests:
        error = await failure(request, within_s=1)
        assert isinstance(error, errors.WorkerCrashed) and error.status == 502
        assert "tiny" in error.message and "killed by SIGKILL (9)" in error.message
    crash = await end_of(worker, within_s=1)
    assert time.monotonic() - began < 1
    assert isinstance(crash, errors.WorkerCrashed) and "SIGKILL" in crash.message
    assert not psutil.pid_exists(worker.pid), "not reaped"


async def test_what_was_said_before_a_crash_still_arrives(worker):
    _, request = worker.submit(say("!crash 3"))
    heard = []
    with pytest.raises(errors.WorkerCrashed):
        async with asyncio.timeout(PATIENCE_S):
            async for part in Worker.answers(request):
                heard.append(part.content)
    assert "".join(heard) == "word0 word1 word2"


async def test_a_request_to_a_worker_that_has_crashed_fails_at_once(worker):
    os.kill(worker.pid, signal.SIGKILL)
    await end_of(worker)
    error = await failure(worker.submit(say("hello"))[1], within_s=1)
    assert isinstance(error, errors.WorkerCrashed) and "SIGKILL" in error.message


async def test_a_request_that_is_sent_while_it_dies_is_not_forgotten(worker):
    os.kill(worker.pid, signal.SIGKILL)
    error = await failure(worker.submit(say("hello"))[1], within_s=2)
    assert isinstance(error, errors.WorkerCrashed)


async def test_a_stop_after_a_crash_does_not_turn_it_into_a_stop(worker):
    os.kill(worker.pid, signal.SIGKILL)
    await end_of(worker)
    async with asyncio.timeout(1):
        await worker.stop("tidying up")
    assert isinstance(await end_of(worker), errors.WorkerCrashed)


@pytest.mark.parametrize("kind", ["text", "unknown", "binary", "nested"])
async def test_a_worker_that_breaks_the_protocol_is_killed_and_its_requests_fail(start, kind):
    worker = await start("garbage", kind)
    _, request = worker.submit(say("hello"))
    error = await failure(request)
    assert isinstance(error, errors.WorkerCrashed) and "SIGKILL" in error.message
    assert isinstance(await end_of(worker), errors.WorkerCrashed)


async def test_a_worker_that_dies_in_the_middle_of_a_line_fails_its_requests(start):
    worker = await start("torn")
    _, request = worker.submit(say("hello"))
    heard = []
    with pytest.raises(errors.WorkerCrashed, match="exit status 7"):
        async with asyncio.timeout(PATIENCE_S):
            async for part in Worker.answers(request):
                heard.append(part.content)
    assert heard == ["whole"]


async def test_a_worker_that_closes_its_channel_and_lives_on_is_killed(start, monkeypatch):
    monkeypatch.setattr(worker_module, "_EXIT_GRACE_S", 0.2)
    worker = await start("closes_channel")
    _, request = worker.submit(say("hello"))
    assert isinstance(await failure(request), errors.WorkerCrashed)
    assert isinstance(await end_of(worker), errors.WorkerCrashed)
    assert not psutil.pid_exists(worker.pid)


async def test_a_worker_that_never_answers_can_be_given_up(start, monkeypatch):
    monkeypatch.setattr(worker_module, "_STOP_GRACE_S", 0.2)
    worker = await start("never_answers")
    with pytest.raises(errors.LoadTimeout):
        await load(worker, timeout_s=0.2)
    async with asyncio.timeout(PATIENCE_S):
        await worker.stop("it did not load")
    assert await end_of(worker) is None


# stopping


async def test_a_stop_is_no_crash_and_tells_requests_why(worker):
    _, request = worker.submit(say("!slow 100000"))
    await first_delta(request)
    async with asyncio.timeout(2):
        await worker.stop("the model was unloaded while it answered")
    error = await failure(request)
    assert isinstance(error, errors.Conflict)
    assert "the model was unloaded while it answered" in error.message
    assert await end_of(worker) is None
    assert not psutil.pid_exists(worker.pid)


@pytest.mark.parametrize("program", ["", "never_answers", "ignores_everything", "closes_channel"])
async def test_a_stop_is_no_crash_whatever_the_exit_status(start, program, monkeypatch):
    monkeypatch.setattr(worker_module, "_STOP_GRACE_S", 0.2)
    worker = await start(program)
    async with asyncio.timeout(PATIENCE_S):
        await worker.stop("unloaded")
    assert await end_of(worker) is None


async def test_a_frozen_worker_is_stopped_all_the_same(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "_STOP_GRACE_S", 0.2)
    _, request = worker.submit(say("!slow 100000"))
    await first_delta(request)
    os.kill(worker.pid, signal.SIGSTOP)
    async with asyncio.timeout(2):
        await worker.stop("unloaded")
    assert isinstance(await failure(request), errors.Conflict)
    assert await end_of(worker) is None


async def test_a_worker_with_a_stuck_request_stops_within_its_grace(worker):
    _, request = worker.submit(say("!stuck"))
    async with asyncio.timeout(2):
        await worker.stop("unloaded")
    assert isinstance(await failure(request), errors.Conflict)
    assert await end_of(worker) is None


async def test_several_stops_at_once_all_return_and_the_first_reason_counts(worker):
    _, request = worker.submit(say("!slow 100000"))
    await first_delta(request)
    async with asyncio.timeout(3):
        await asyncio.gather(*(worker.stop(f"reason {number}") for number in range(3)))
    assert "reason 0" in (await failure(request)).message
    assert await end_of(worker) is None


async def test_a_request_after_a_stop_is_told_of_the_stop(worker):
    await worker.stop("it was unloaded")
    error = await failure(worker.submit(say("hello"))[1], within_s=1)
    assert isinstance(error, errors.Conflict) and "it was unloaded" in error.message
