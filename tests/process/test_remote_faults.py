"""The remote backend in a real worker, against an upstream that does everything wrong."""

from __future__ import annotations

import asyncio
import base64
import ssl
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from upstream import (
    KEY,
    MODEL,
    USAGE,
    WHOLE,
    FaultyUpstream,
    answer,
    end,
    endless_line,
    piece,
    reset,
    silent,
    status,
    stream,
)

from backends.contract import (
    Artifact,
    ChatRequest,
    CompleteRequest,
    Delta,
    Done,
    EmbedRequest,
    LoadSpec,
    RerankRequest,
    Sampling,
    TokenLogprob,
    ToolCall,
    Upstream,
)
from daemon import errors
from daemon.memory.measure import worker_use
from daemon.workers.lister import list_models
from daemon.workers.worker import Worker

PATIENCE_S = 20.0
ARTIFACT = Artifact(
    format="remote",
    files=(),
    architecture="",
    parameters=0,
    quantization="",
    context_length=0,
    weights_bytes=0,
)
HELLO = ChatRequest(messages=({"role": "user", "content": "Hello?"},))

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def upstream() -> AsyncIterator[FaultyUpstream]:
    async with FaultyUpstream() as started:
        yield started


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Worker]:
    """A worker that has yet to load."""
    started = await Worker.start("backends.remote:Remote", name="far", scratch=tmp_path)
    yield started
    await started.stop("the test is over")


@pytest.fixture
async def worker(idle: Worker, upstream: FaultyUpstream) -> Worker:
    """A worker that has loaded the upstream's model."""
    await load(idle, upstream.url)
    upstream.requests.clear()
    return idle


async def load(
    worker: Worker, url: str, *, key: str = KEY, model: str = MODEL, read_s: float = PATIENCE_S
):
    far = Upstream(url=url, model=model, api_key=key, connect_timeout_s=2.0, read_timeout_s=read_s)
    spec = LoadSpec(
        artifact=ARTIFACT, context_length=0, slots=4, threads=1, scratch_dir="/", upstream=far
    )
    return await worker.load(spec, timeout_s=PATIENCE_S, progress=lambda _: None)


async def parts(worker: Worker, request) -> list:
    """Return all that a request is answered with; raises its error."""
    _, entry = worker.submit(request)
    async with asyncio.timeout(PATIENCE_S):
        return [part async for part in Worker.answers(entry)]


async def text_of(worker: Worker, request=HELLO) -> str:
    return "".join(p.content for p in await parts(worker, request) if isinstance(p, Delta))


async def failure(worker: Worker, request=HELLO) -> errors.ModeldError:
    with pytest.raises(errors.ModeldError) as raised:
        await parts(worker, request)
    assert KEY not in raised.value.message
    return raised.value


# loading


async def test_a_load_asks_the_upstream_with_the_key_and_takes_its_context(idle, upstream):
    loaded = await load(idle, upstream.url)
    assert (loaded.context_length, loaded.slots) == (2048, 4)
    assert [asked.path for asked in upstream.requests] == ["/v1/models"]
    assert upstream.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_the_key_is_neither_in_the_arguments_nor_in_the_environment(worker):
    process = Path("/proc") / str(worker.pid)
    assert b"backends.worker" in (process / "cmdline").read_bytes()
    assert KEY.encode() not in (process / "cmdline").read_bytes()
    assert KEY.encode() not in (process / "environ").read_bytes()


async def test_what_a_worker_takes_is_what_was_estimated(worker):
    from backends.contract import LoadOptions
    from backends.remote import Remote

    await parts(worker, HELLO)
    estimate = Remote.estimate(ARTIFACT, LoadOptions()).total_bytes
    assert estimate / 2 < worker_use(worker.pid, []).total_bytes < estimate


@pytest.mark.parametrize("key", ["", "sk-wrong-one-0123456789"])
async def test_a_key_that_is_refused_is_told_and_not_shown(idle, upstream, key):
    with pytest.raises(errors.LoadFailed) as raised:
        await load(idle, upstream.url, key=key)
    message = raised.value.message
    assert upstream.url in message and "HTTP 401" in message
    assert "sk-" not in message and ("refused the key" if key else "api_key") in message


async def test_a_model_that_is_not_listed_fails_the_load_with_those_that_are(idle, upstream):
    with pytest.raises(errors.LoadFailed) as raised:
        await load(idle, upstream.url, model="other")
    assert "'other'" in raised.value.message and MODEL in raised.value.message


async def test_an_upstream_that_is_not_there_fails_the_load_with_its_url(idle, upstream):
    url = upstream.url
    await upstream.__aexit__()
    with pytest.raises(errors.LoadFailed, match="cannot be reached") as raised:
        await load(idle, url)
    assert url in raised.value.message


async def test_user_and_password_of_a_url_are_not_shown(idle):
    with pytest.raises(errors.LoadFailed) as raised:
        await load(idle, "http://me:hidden-word@127.0.0.1:1", key="")
    assert "127.0.0.1:1" in raised.value.message and "hidden-word" not in raised.value.message


# what is asked, and what comes back


async def test_a_chat_asks_for_what_was_set_and_no_more(worker, upstream):
    await parts(worker, HELLO)
    assert upstream.posts[0].path == "/v1/chat/completions"
    assert upstream.posts[0].body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_an_answer_is_passed_on_whole(worker):
    *deltas, done = await parts(worker, HELLO)
    assert [delta.content for delta in deltas] == ["Hello", " there"]
    assert isinstance(done, Done) and done.finish_reason == "stop"
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (7, 2, 3)


async def test_calls_reasoning_and_logprobs_are_passed_on(worker, upstream):
    def delta(**fields):
        return {"choices": [{"delta": fields}]}

    call = {"index": 1, "id": "c1", "function": {"name": "weather", "arguments": '{"to'}}
    more = {"index": 1, "function": {"arguments": 'wn":1}'}}
    likely = {"token": "a", "logprob": -0.5, "bytes": [97]}
    token = likely | {"top_logprobs": [likely, {"token": "b", "logprob": -2}]}
    logprobs = {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [token]}}]}
    upstream.plan = [
        stream(
            delta(role="assistant", content=None),
            delta(reasoning_content="Hm"),
            delta(reasoning="…"),
            logprobs,
            delta(tool_calls=[call]),
            delta(tool_calls=[more]),
            end("tool_calls"),
        )
    ]
    *deltas, done = await parts(worker, HELLO)
    top = (TokenLogprob(token="a", logprob=-0.5, bytes=(97,)), TokenLogprob(token="b", logprob=-2))
    assert deltas == [
        Delta(reasoning="Hm"),
        Delta(reasoning="…"),
        Delta(content="a", logprobs=(TokenLogprob(token="a", logprob=-0.5, bytes=(97,), top=top),)),
        Delta(tool_calls=(ToolCall(index=1, id="c1", name="weather", arguments='{"to'),)),
        Delta(tool_calls=(ToolCall(index=1, arguments='wn":1}'),)),
    ]
    assert done.finish_reason == "tool_calls"


@pytest.mark.parametrize(("told", "stopped_by"), [("END", "END"), (7, ""), (None, "")])
async def test_which_stop_sequence_it_was_is_passed_on_where_an_upstream_tells(
    worker, upstream, told, stopped_by
):
    last = {"delta": {}, "finish_reason": "stop", "stop_reason": told}
    upstream.plan = [stream({"choices": [{"delta": {"content": "a"}}]}, {"choices": [last]})]
    assert (await parts(worker, HELLO))[-1].stopped_by == stopped_by


async def test_a_completion_has_its_text_and_its_old_kind_of_logprobs(worker, upstream):
    logprobs = {"tokens": ["x"], "token_logprobs": [-1.0], "top_logprobs": [{"x": -1.0, "y": -3}]}
    upstream.plan = [
        stream({"choices": [{"text": "x", "finish_reason": "length", "logprobs": logprobs}]})
    ]
    request = CompleteRequest(prompt="p", suffix="s", sampling=Sampling(logprobs=2, max_tokens=1))
    delta, done = await parts(worker, request)
    top = (TokenLogprob(token="x", logprob=-1.0), TokenLogprob(token="y", logprob=-3.0))
    assert delta == Delta(content="x", logprobs=(TokenLogprob(token="x", logprob=-1.0, top=top),))
    assert done.finish_reason == "length"
    body = upstream.posts[0].body
    assert (body["prompt"], body["suffix"], body["logprobs"]) == ("p", "s", 2)


@pytest.mark.parametrize("form", ["base64", "numbers"])
async def test_vectors_come_back_in_order_whatever_their_form(worker, upstream, form):
    vectors = [[0.5, -1.0], [2.0, 0.25]]
    packed = [struct.pack("<2f", *vector) for vector in vectors]
    sent = [base64.b64encode(p).decode() for p in packed] if form == "base64" else vectors
    data = [{"index": i, "embedding": sent[i]} for i in (1, 0)]
    upstream.plan = [answer({"data": data, "usage": {"prompt_tokens": 4, "total_tokens": 4}})]
    (result,) = await parts(worker, EmbedRequest(inputs=("a", "b"), dimensions=2))
    assert result.vectors == tuple(packed) and result.dimensions == 2
    assert result.usage.prompt_tokens == 4
    assert upstream.posts[0].body["dimensions"] == 2


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": [1e99]}, {"index": 1, "embedding": [1.0]}],
        [{"index": 0, "embedding": "not base64"}, {"index": 1, "embedding": [1.0]}],
        [{"index": 0, "embedding": None}, {"index": 1, "embedding": [1.0]}],
    ],
)
async def test_vectors_that_are_not_what_was_asked_for_are_refused(worker, upstream, data):
    upstream.plan = [answer({"data": data})]
    error = await failure(worker, EmbedRequest(inputs=("a", "b")))
    assert isinstance(error, errors.EngineError) and upstream.url in error.message


async def test_scores_come_back_in_the_order_of_the_documents(worker, upstream):
    results = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": -1}]
    upstream.plan = [answer({"results": results, "usage": {"total_tokens": 9}})]
    (result,) = await parts(worker, RerankRequest(query="q", documents=("a", "b")))
    assert result.scores == (-1.0, 0.9) and result.usage.prompt_tokens == 9
    assert upstream.posts[0].path == "/v1/rerank"


# faults before the first token are tried again


@pytest.mark.parametrize(
    "fault",
    [
        status(503, {"error": "loading"}),
        status(502),
        status(504),
        status(429, Retry_After="0"),
        reset,
        stream(then="reset"),
        stream({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, then="reset"),
        stream(then="silently"),
    ],
)
async def test_a_fault_before_the_first_token_is_tried_again(worker, upstream, fault):
    upstream.plan = [fault]
    assert await text_of(worker) == "Hello there"
    assert len(upstream.posts) == 2


async def test_two_more_tries_and_no_more(worker, upstream):
    upstream.plan = [status(503, {"error": {"message": "still loading"}})] * 5
    error = await failure(worker)
    assert len(upstream.posts) == 3
    assert "still loading" in error.message and "HTTP 503" in error.message


async def test_a_request_without_a_stream_is_tried_again_too(worker, upstream):
    upstream.plan = [reset, answer({"data": [{"index": 0, "embedding": [1.0]}]})]
    (result,) = await parts(worker, EmbedRequest(inputs=("a",)))
    assert result.dimensions == 1


async def test_retry_after_is_waited_for(worker, upstream):
    upstream.plan = [status(429, Retry_After="1")]
    started = time.monotonic()
    assert await text_of(worker) == "Hello there"
    assert 1 <= time.monotonic() - started < 5


async def test_a_long_retry_after_is_passed_on(worker, upstream):
    upstream.plan = [status(429, {"error": {"message": "slow down"}}, Retry_After="3600")]
    error = await failure(worker)
    assert "slow down" in error.message and "3600 s" in error.message
    assert len(upstream.posts) == 1


async def test_what_no_retry_can_help_is_not_tried_again(worker, upstream):
    upstream.plan = [status(503, {"error": "never fits"}, x_should_retry="false")]
    assert "never fits" in (await failure(worker)).message
    assert len(upstream.posts) == 1


# and after it, never


@pytest.mark.parametrize("then", ["reset", "silently"])
async def test_a_break_after_the_first_token_is_an_error(worker, upstream, then):
    upstream.plan = [stream(piece("Hel"), then=then)]
    _, entry = worker.submit(HELLO)
    received = []
    with pytest.raises(errors.EngineError, match="broke off"):
        async for part in Worker.answers(entry):
            received.append(part.content)
    assert received == ["Hel"]
    assert len(upstream.posts) == 1


async def test_an_orderly_end_without_a_finish_reason_is_an_error(worker, upstream):
    upstream.plan = [stream(piece("Hel"))]
    assert "without a finish_reason" in (await failure(worker)).message
    assert len(upstream.posts) == 1


@pytest.mark.parametrize("last", [(end(),), (b"data: [DONE]",), (end(), USAGE)])
async def test_a_finish_reason_or_done_is_an_end(worker, upstream, last):
    upstream.plan = [stream(piece("Hi"), *last)]
    assert await text_of(worker) == "Hi"


@pytest.mark.parametrize("reason", ["content_filter", "abort"])
async def test_an_answer_that_was_ended_early_is_no_whole_answer(worker, upstream, reason):
    upstream.plan = [stream(piece("Hel"), end(reason))]
    assert reason in (await failure(worker)).message


async def test_an_error_in_the_middle_of_a_stream_is_passed_on(worker, upstream):
    upstream.plan = [stream(piece("Hel"), {"error": {"message": "the GPU is on fire"}})]
    error = await failure(worker)
    assert isinstance(error, errors.EngineError) and "the GPU is on fire" in error.message


async def test_silence_ends_with_the_read_timeout(idle, upstream):
    await load(idle, upstream.url, read_s=1)
    worker = idle
    for step in (silent, stream(piece("Hel"), then="stall")):
        upstream.plan, upstream.left = [step], asyncio.Event()
        assert "sent nothing for 1 s" in (await failure(worker)).message
        await asyncio.wait_for(upstream.left.wait(), PATIENCE_S)
    assert len(upstream.posts) == 2  # neither was tried again


# what an upstream may send


@pytest.mark.parametrize(
    "event",
    [
        b"data: {",
        b"data: [1]",
        b"data: 3",
        b"data: \xff\xfe",
        b"data: " + b"[" * 100_000,
        {"choices": [{"delta": {"content": 5}}]},
        {"choices": "none"},
    ],
)
async def test_garbage_is_an_error_that_names_the_upstream(worker, upstream, event):
    upstream.plan = [stream(piece("Hel"), event)]
    error = await failure(worker)
    assert isinstance(error, errors.EngineError) and upstream.url in error.message
    assert await text_of(worker) == "Hello there"


async def test_comments_and_other_lines_of_a_stream_are_passed_over(worker, upstream):
    events = (b": ping", b"event: chunk\nid: 1", *WHOLE)
    upstream.plan = [stream(*events)]
    assert await text_of(worker) == "Hello there"


async def test_an_endless_line_is_cut(worker, upstream):
    upstream.plan = [endless_line]
    assert "a line of over" in (await failure(worker)).message
    await asyncio.wait_for(upstream.left.wait(), PATIENCE_S)


async def test_an_answer_that_is_no_stream_is_refused(worker, upstream):
    upstream.plan = [answer({"choices": []})]
    assert "application/json" in (await failure(worker)).message


async def test_an_answer_that_is_no_http_is_refused(worker, upstream):
    async def gopher(connection):
        await connection.write(b"iWelcome to gopher\r\n\r\n")

    upstream.plan = [gopher] * 3
    assert upstream.url in (await failure(worker)).message


@pytest.mark.parametrize(
    ("code", "body", "kind"),
    [
        (400, {"error": {"message": "no such tool"}}, errors.InvalidRequest),
        (422, {"detail": [{"msg": "no such tool"}]}, errors.InvalidRequest),
        (404, "no such tool", errors.InvalidRequest),
        (500, {"error": {"message": "no such tool"}}, errors.EngineError),
        (
            400,
            {"error": {"message": "no such tool", "code": "context_length_exceeded"}},
            errors.ContextLengthExceeded,
        ),
        (
            400,
            {"error": {"message": "no such tool", "type": "exceed_context_size_error"}},
            errors.ContextLengthExceeded,
        ),
    ],
)
async def test_a_refusal_is_passed_on_with_its_text(worker, upstream, code, body, kind):
    upstream.plan = [status(code, body)]
    error = await failure(worker)
    assert type(error) is kind and "no such tool" in error.message
    assert len(upstream.posts) == 1


@pytest.mark.parametrize("code", [400, 500])
@pytest.mark.parametrize("padding", [0, 590])
async def test_an_echo_of_the_key_is_taken_out(worker, upstream, code, padding):
    upstream.plan = [status(code, {"error": {"message": f"{'x' * padding}{KEY} is bad"}})]
    message = (await failure(worker)).message
    assert KEY[:8] not in message and upstream.url in message


async def test_an_echo_of_the_key_in_garbage_is_taken_out(worker, upstream):
    upstream.plan = [stream(b"data: " + b"x" * 90 + KEY.encode())]
    assert KEY[:8] not in (await failure(worker)).message


async def test_a_redirect_is_refused_and_the_key_stays(worker, upstream):
    async with FaultyUpstream() as other:
        upstream.plan = [status(307, Location=f"{other.url}/v1/chat/completions?key={KEY}")]
        error = await failure(worker)
        assert other.requests == []
        assert "redirects to" in error.message and other.url in error.message


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def encrypted(authority) -> AsyncIterator[FaultyUpstream]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with FaultyUpstream(context) as started:
        yield started


async def test_a_certificate_that_nobody_vouches_for_is_refused(idle, encrypted):
    with pytest.raises(errors.LoadFailed, match="certificate") as raised:
        await load(idle, encrypted.url)
    assert encrypted.url in raised.value.message
    assert encrypted.requests == []


async def test_an_authority_of_the_user_s_own_is_trusted(
    encrypted, authority, tmp_path, monkeypatch
):
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    worker = await Worker.start("backends.remote:Remote", name="far", scratch=tmp_path)
    try:
        await load(worker, encrypted.url)
        assert await text_of(worker) == "Hello there"
    finally:
        await worker.stop("the test is over")


# cancelling


@pytest.mark.alone
@pytest.mark.parametrize("step", [silent, stream(piece("Hel"), then="stall")])
async def test_a_cancel_closes_the_connection_at_once(worker, upstream, step):
    upstream.plan = [step]
    request_id, entry = worker.submit(HELLO)
    async with asyncio.timeout(PATIENCE_S):
        while not upstream.posts:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        await worker.cancel(request_id)
        assert time.monotonic() - started < 0.3
        await upstream.left.wait()
    assert time.monotonic() - started < 0.5
    last = [part async for part in Worker.answers(entry)][-1]
    assert last.finish_reason == "cancelled"
    assert await text_of(worker) == "Hello there"


@pytest.mark.alone
async def test_a_cancel_ends_the_wait_between_two_tries(worker, upstream):
    upstream.plan = [status(503, Retry_After="5")]
    request_id, entry = worker.submit(HELLO)
    async with asyncio.timeout(PATIENCE_S):
        while not upstream.posts:
            await asyncio.sleep(0.01)
    started = time.monotonic()
    await worker.cancel(request_id)
    assert time.monotonic() - started < 1
    assert len(upstream.posts) == 1


async def test_a_cancelled_embedding_is_an_error(worker, upstream):
    upstream.plan = [silent]
    request_id, entry = worker.submit(EmbedRequest(inputs=("a",)))
    await worker.cancel(request_id)
    with pytest.raises(errors.ModeldError, match="cancelled"):
        [part async for part in Worker.answers(entry)]


# the lister


async def test_a_listing_has_names_and_context_lengths(upstream):
    upstream.models = {
        "data": [
            {"id": "a", "context_length": 10},
            {"id": "b", "max_model_len": 20},
            {"id": "c", "meta": {"n_ctx_train": 40, "n_ctx": 30}},
            {"id": "d", "meta": None, "context_length": "lots"},
            {"id": "e", "owned_by": "modeld:remote"},
            {"id": "f\n"},
            {"id": "x" * 600},
            {"name": "g"},
        ]
    }
    far = Upstream(url=upstream.url, model="", api_key=KEY)
    assert await list_models("far", far) == {"a": 10, "b": 20, "c": 30, "d": 0}


@pytest.mark.parametrize(
    ("listing", "says"),
    [
        (status(500, {"error": {"message": f"oh {KEY}"}}), "oh [the key]"),
        (answer("<html>"), "is not JSON"),
        (answer({"data": [3]}), "is not what it should be"),
        (status(301, Location="/elsewhere"), "redirects to"),
    ],
)
async def test_a_listing_that_fails_says_why(upstream, listing, says):
    upstream.listing = listing
    with pytest.raises(errors.EngineError) as raised:
        await list_models("far", Upstream(url=upstream.url, model="", api_key=KEY))
    assert says in raised.value.message and upstream.url in raised.value.message
    assert KEY not in raised.value.message
