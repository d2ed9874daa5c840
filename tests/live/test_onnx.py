"""The onnx backend on real files: what it answers is what onnxruntime answers when asked directly."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_files
import onnxruntime
import pytest
from tokenizers import Tokenizer

from backends.contract import (
    BackendError,
    ChatRequest,
    ClassifyRequest,
    CompleteRequest,
    Embeddings,
    EmbedRequest,
    LoadOptions,
    LoadSpec,
    RerankRequest,
    Sampling,
    Task,
)
from backends.onnx import Onnx
from daemon.memory.measure import worker_use
from daemon.workers.worker import Worker

pytestmark = pytest.mark.timeout(120)
PATIENCE_S = 30.0
TEXTS = (
    "The cat sat on the mat.",
    "Hello",
    "Where is the Eiffel Tower? It stands in Paris, on the Champ de Mars, near the Seine.",
    "SELECT name FROM users WHERE id = 1;",
    "こんにちは 世界",
    "word " * 120,
)


def never() -> bool:
    return False


def spec(artifact, **given) -> LoadSpec:
    """Return the load that `estimate` settles."""
    settled = Onnx.estimate(artifact, LoadOptions(threads=2, **given))
    return LoadSpec(
        artifact=artifact,
        context_length=settled.context_length,
        slots=settled.slots,
        threads=2,
        scratch_dir="/nonexistent",
        placement=settled.placement,
        engine=given.get("engine", {}),
    )


@pytest.fixture
def load():
    """`load(folder, context_length=…, engine={…})` gives a backend with the folder's model."""
    loaded: list[Onnx] = []

    def start(folder, **given) -> Onnx:
        backend = Onnx()
        loaded.append(backend)
        backend.load(spec(onnx_files.artifact(folder), **given), lambda _: None)
        return backend

    yield start
    for backend in loaded:
        backend.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return onnx_files.embedder(tmp_path_factory.mktemp("minilm") / "model")


@pytest.fixture(scope="module")
def embedder(folder):
    backend = Onnx()
    backend.load(spec(onnx_files.artifact(folder)), lambda _: None)
    yield backend
    backend.close()


def rows(answer: Embeddings) -> np.ndarray:
    return np.array([np.frombuffer(vector, "<f4") for vector in answer.vectors])


def embed(backend: Onnx, *texts: str, **given) -> np.ndarray:
    return rows(backend.embed(EmbedRequest(inputs=texts, **given), never))


def tokens(folder, *pair: str, limit: int = 0) -> dict[str, np.ndarray]:
    """Return a graph's inputs for one text or a pair, as the tokenizers package makes them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if limit:
        strategy = "only_second" if len(pair) > 1 else "longest_first"
        tokenizer.enable_truncation(limit, strategy=strategy)
    encoded = tokenizer.encode(*pair)
    ids = np.array([encoded.ids], np.int64)
    types = np.array([encoded.type_ids], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}


def directly(folder, name: str, *pair: str, limit: int = 0) -> np.ndarray:
    """Return what onnxruntime says, with its own defaults, of one text or pair alone."""
    session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    given = tokens(folder, *pair, limit=limit)
    return session.run(None, {port.name: given[port.name] for port in session.get_inputs()})[0][0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def failure(call, *arguments) -> BackendError:
    with pytest.raises(BackendError) as error:
        call(*arguments)
    return error.value


# what it can do


def test_the_prober_finds_the_engine():
    probe = Onnx.probe()
    assert probe.available and probe.version == onnxruntime.__version__
    assert "CPUExecutionProvider" in probe.devices
    assert "generate" in probe.features


# embeddings


def test_embeddings_are_those_of_onnxruntime_itself(folder, embedder):
    for text, vector in zip(TEXTS, embed(embedder, *TEXTS), strict=True):
        hidden = directly(folder, "onnx/model.onnx", text)
        assert cosine(vector, hidden.mean(axis=0)) >= 0.9999
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_a_batch_and_a_single_text_agree(embedder):
    together = embed(embedder, *TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        assert cosine(embed(embedder, text)[0], vector) >= 0.9999


def test_similar_texts_are_near_each_other(embedder):
    cat, kitten, stocks = embed(
        embedder, "A cat sleeps.", "A kitten is asleep.", "Stock prices fell on Monday."
    )
    assert cosine(cat, kitten) > 0.6 > 0.3 > cosine(cat, stocks)


def test_usage_counts_tokens(folder, embedder):
    answer = embedder.embed(EmbedRequest(inputs=TEXTS[:2]), never)
    counts = [tokens(folder, text)["input_ids"].size for text in TEXTS[:2]]
    assert answer.usage.prompt_tokens == sum(counts) and answer.dimensions == 384
    nothing = embedder.embed(EmbedRequest(inputs=()), never)
    assert nothing.vectors == () and nothing.usage.prompt_tokens == 0


def test_dimensions_cut_vectors_and_scale_them_anew(embedder):
    (whole,) = embed(embedder, TEXTS[0])
    (cut,) = embed(embedder, TEXTS[0], dimensions=64)
    assert cut.shape == (64,)
    assert np.allclose(cut, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)
    request = EmbedRequest(inputs=("a",), dimensions=385)
    assert "have 384" in failure(embedder.embed, request, never).message


def test_a_text_that_is_too_long_is_refused_with_its_length_or_cut(folder, embedder):
    long = "word " * 300
    error = failure(embedder.embed, EmbedRequest(inputs=("a", long)), never)
    assert error.code == "context_length_exceeded"
    assert error.message.startswith("text 2 has 302 tokens") and "256" in error.message
    (vector,) = embed(embedder, long, truncate=True)
    hidden = directly(folder, "onnx/model.onnx", long, limit=256)
    assert cosine(vector, hidden.mean(axis=0)) >= 0.9999


def test_a_hopeless_text_is_refused_before_it_is_read(embedder):
    huge = "x" * 5_000_000
    error = failure(embedder.embed, EmbedRequest(inputs=(huge,)), never)
    assert error.code == "context_length_exceeded" and "5000000 characters" in error.message
    assert embed(embedder, huge, truncate=True).shape == (1, 384)


def test_an_empty_text_is_refused(embedder):
    error = failure(embedder.embed, EmbedRequest(inputs=("a", "")), never)
    assert error.code == "invalid_request" and error.message == "text 2 is empty"


def test_a_shorter_context_is_kept_to(folder, load):
    backend = load(folder, context_length=16)
    error = failure(backend.embed, EmbedRequest(inputs=("word " * 20,)), never)
    assert "22 tokens" in error.message and "16" in error.message


def test_requests_at_once_get_their_own_answers(embedder):
    alone = {text: embed(embedder, text)[0] for text in TEXTS}
    with ThreadPoolExecutor(16) as threads:
        many = [TEXTS[n % len(TEXTS)] for n in range(64)]
        answers = list(threads.map(lambda text: embed(embedder, text)[0], many))
    for text, vector in zip(many, answers, strict=True):
        assert cosine(vector, alone[text]) >= 0.9999


def test_a_cancelled_request_ends_and_leaves_the_others_alone(embedder):
    cancel = threading.Event()
    inputs = tuple("word " * 200 for _ in range(400))  # some ten seconds
    with ThreadPoolExecutor(2) as threads:
        asked = EmbedRequest(inputs=inputs)
        long = threads.submit(failure, embedder.embed, asked, cancel.is_set)
        deadline = time.monotonic() + PATIENCE_S
        while not embedder._batches._batch.items:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        short = threads.submit(embed, embedder, TEXTS[0])
        cancel.set()
        assert long.result(PATIENCE_S).code == "cancelled"
        assert short.result(PATIENCE_S).shape == (1, 384)
    assert embed(embedder, TEXTS[0]).shape == (1, 384)
    assert failure(embedder.embed, EmbedRequest(inputs=("a",)), lambda: True).code == "cancelled"


@pytest.mark.parametrize("mode", ["mean", "cls", "last", "max"])
def test_pooling_is_what_plain_numpy_makes_of_the_tokens(tmp_path, load, mode):
    folder = onnx_files.lookup(tmp_path / "m")
    backend = load(folder, engine={"pooling": mode, "normalize": False})
    for text, vector in zip(TEXTS, embed(backend, *TEXTS), strict=True):
        found = onnx_files.table()[tokens(folder, text)["input_ids"][0]]
        expected = {"mean": found.mean(0), "cls": found[0], "last": found[-1], "max": found.max(0)}
        assert np.allclose(vector, expected[mode], atol=1e-5)


def test_half_precision_and_positions_are_understood(tmp_path, load):
    half = load(onnx_files.lookup(tmp_path / "half", half=True), engine={"normalize": False})
    whole = load(onnx_files.lookup(tmp_path / "whole"), engine={"normalize": False})
    assert np.allclose(embed(half, *TEXTS), embed(whole, *TEXTS), atol=1e-2)
    placed = load(
        onnx_files.lookup(tmp_path / "placed", positions=True),
        engine={"pooling": "last", "normalize": False},
    )
    last = load(tmp_path / "whole", engine={"pooling": "last", "normalize": False})
    added = embed(placed, *TEXTS) - embed(last, *TEXTS)
    counts = [tokens(tmp_path / "placed", text)["input_ids"].size for text in TEXTS]
    assert np.allclose(added, np.array(counts)[:, None] - 1, atol=1e-4)


def test_a_graph_that_rounds_by_the_batch_still_agrees_with_a_single_text(tmp_path, load):
    backend = load(onnx_files.lookup(tmp_path / "m", dynamic=True))
    together = embed(backend, *TEXTS)
    assert np.array_equal(together, np.concatenate([embed(backend, text) for text in TEXTS]))


def test_a_graph_of_fixed_shape_is_filled_up(tmp_path, load):
    backend = load(onnx_files.lookup(tmp_path / "m", batch=1, length=32))
    free = load(onnx_files.lookup(tmp_path / "n"))
    short = TEXTS[:4]
    assert np.allclose(embed(backend, *short), embed(free, *short), atol=1e-6)
    assert "32" in failure(backend.embed, EmbedRequest(inputs=TEXTS), never).message


def test_one_text_that_fails_does_not_fail_the_others(tmp_path, load):
    folder = onnx_files.lookup(tmp_path / "m", rows=3000)
    backend = load(folder)
    good, bad = "the", "zebra"  # the tokens 1996 and 29145
    with ThreadPoolExecutor(8) as threads:
        texts = [good, bad] * 8
        futures = [threads.submit(embed, backend, text) for text in texts]
        for text, future in zip(texts, futures, strict=True):
            error = future.exception(PATIENCE_S)
            assert (error is None) == (text == good)
            assert error is None or error.code == "engine_error"


def test_a_graph_that_pools_itself_is_taken_at_its_word(tmp_path, load):
    folder = onnx_files.lookup(tmp_path / "m")
    model = onnx.load(folder / "model.onnx")
    made = onnx.helper.make_node(
        "ReduceMax", ["last_hidden_state"], ["sentence_embedding"], axes=[1], keepdims=0
    )
    model.graph.node.append(made)
    model.graph.output.append(
        onnx_files.tensor(
            "sentence_embedding", onnx.TensorProto.FLOAT, ["batch", onnx_files.HIDDEN]
        )
    )
    onnx.save(model, folder / "model.onnx")
    (vector,) = embed(load(folder, engine={"normalize": False}), TEXTS[0])
    found = onnx_files.table()[tokens(folder, TEXTS[0])["input_ids"][0]]
    assert np.allclose(vector, found.max(axis=0))
    assert "pools itself" in refused(folder, engine={"pooling": "cls"}).message


# rankers and classifiers


def test_documents_are_scored_as_pairs(tmp_path, load):
    folder = onnx_files.minilm_head(tmp_path / "m", {"0": "relevant"})
    backend = load(folder, context_length=64)
    query, documents = "what is a cat?", ("A cat is an animal.", "Stocks fell.", "word " * 100)
    error = failure(backend.rerank, RerankRequest(query=query, documents=documents), never)
    assert error.code == "context_length_exceeded"
    assert error.message.startswith("document 3 with the query has 108 tokens")
    request = RerankRequest(query=query, documents=documents, truncate=True)
    answer = backend.rerank(request, never)
    for document, score in zip(documents, answer.scores, strict=True):
        (logit,) = directly(folder, "model.onnx", query, document, limit=64)
        assert score == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)
    assert answer.usage.prompt_tokens > 64
    endless = RerankRequest(query="word " * 80, documents=("a",), truncate=True)
    assert "the query has 80 tokens" in failure(backend.rerank, endless, never).message


@pytest.mark.parametrize("several", [False, True])
def test_every_label_gets_a_score(tmp_path, load, several):
    labels = {"0": "good", "1": "bad", "2": "ugly"}
    kind = {"problem_type": "multi_label_classification"} if several else {}
    folder = onnx_files.minilm_head(tmp_path / "m", labels, **kind)
    answer = load(folder).classify(ClassifyRequest(inputs=TEXTS), never)
    for text, found in zip(TEXTS, answer.labels, strict=True):
        logits = directly(folder, "model.onnx", text).astype(float)
        powers = np.exp(logits)
        expected = 1 / (1 + 1 / powers) if several else powers / powers.sum()
        assert list(found) == ["good", "bad", "ugly"]
        assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)


# loading


def test_a_model_is_loaded_again_after_it_was_closed(folder):
    backend = Onnx()
    backend.close()
    for _ in range(2):
        model = backend.load(spec(onnx_files.artifact(folder)), lambda _: None)
        assert (model.tasks, model.slots, model.context_length) == ((Task.EMBED,), 32, 256)
        assert embed(backend, "a").shape == (1, 384)
        backend.close()
        backend.close()
    assert failure(backend.embed, EmbedRequest(inputs=("a",)), never).code == "engine_error"


def test_progress_ends_at_one(folder):
    seen: list[float] = []
    backend = Onnx()
    backend.load(spec(onnx_files.artifact(folder)), seen.append)
    backend.close()
    assert seen == sorted(seen) and seen[-1] == 1.0


def refused(folder, **given) -> BackendError:
    backend = Onnx()
    try:
        return failure(backend.load, spec(onnx_files.artifact(folder), **given), lambda _: None)
    finally:
        backend.close()


def test_what_cannot_be_loaded_says_why(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m", rows=4)
    error = refused(folder)  # its tokens are beyond the table
    assert error.code == "load_failed" and "onnxruntime cannot run it" in error.message
    (folder / "tokenizer.json").write_text('{"model": 1}')
    error = refused(folder)
    assert error.code == "load_failed" and "tokenizer.json cannot be read" in error.message


def test_an_input_that_is_not_known_is_named(tmp_path):
    folder = onnx_files.lookup(tmp_path / "m", positions=True)
    model = onnx.load(folder / "model.onnx")
    model.graph.input[2].name = model.graph.node[1].input[0] = "bbox"
    onnx.save(model, folder / "model.onnx")
    assert "needs the input bbox" in refused(folder).message


def test_a_bad_option_is_refused_by_name(folder):
    artifact = onnx_files.artifact(folder)
    good = spec(artifact)
    bad = LoadSpec(
        artifact=artifact,
        context_length=good.context_length,
        slots=1,
        threads=1,
        scratch_dir="/nonexistent",
        engine={"provider": "abacus"},
    )
    error = failure(Onnx().load, bad, lambda _: None)
    assert error.code == "invalid_request" and "provider" in error.message


async def test_a_worker_computes_requests_together_within_its_estimate(folder, tmp_path):
    artifact = onnx_files.artifact(folder)
    worker = await Worker.start("backends.onnx:Onnx", name="minilm", scratch=tmp_path)
    try:
        await worker.load(spec(artifact), timeout_s=PATIENCE_S, progress=lambda _: None)
        asked = [worker.submit(EmbedRequest(inputs=TEXTS))[1] for _ in range(32)]
        async with asyncio.timeout(PATIENCE_S):
            answers = [[part async for part in Worker.answers(request)] for request in asked]
        vectors = {answer.vectors[0] for (answer,) in answers}
        assert len(answers) == 32 and all(len(vector) == 4 * 384 for vector in vectors)
        estimate = Onnx.estimate(artifact, LoadOptions(threads=2)).total_bytes
        measured = worker_use(worker.pid, artifact.paths("weights")).total_bytes
        assert 0.9 < estimate / measured < 1.1, (estimate, measured)
    finally:
        await worker.stop("the test is over")


# generation


@pytest.fixture
def decoder(tmp_path):
    return onnx_files.decoder(tmp_path / "decoder")


def generate(backend: Onnx, text: str, cancelled=never, *, chat: bool = False, **sampling):
    """Return the text and the Done of a completion, or of a chat."""
    given = Sampling(**({"temperature": 0} | sampling))
    if chat:
        message = {"role": "user", "content": text}
        generation = backend.chat(ChatRequest(messages=(message,), sampling=given), cancelled)
    else:
        generation = backend.complete(CompleteRequest(prompt=text, sampling=given), cancelled)
    pieces: list[str] = []
    while True:
        try:
            pieces.append(next(generation).content)
        except StopIteration as end:
            return "".join(pieces), end.value


def test_text_goes_on_from_a_prompt_and_from_messages(decoder, load):
    backend = load(decoder)
    for chat in (False, True):
        text, done = generate(backend, "xya", chat=chat, max_tokens=5)
        assert (text, done.finish_reason) == ("bcdef", "length")
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 5)
        assert done.timings.predicted_ms > 0


def test_content_in_parts_is_read_and_images_are_refused(decoder, load):
    backend = load(decoder)
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "a"}]
    assert generate(backend, parts, chat=True, max_tokens=2)[0] == "bc"
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(BackendError, match="cannot see images"):
        generate(backend, image, chat=True)


def test_generation_ends_at_a_stop_sequence_and_at_the_model_s_end(decoder, load):
    backend = load(decoder)
    text, done = generate(backend, "a", stop=("fg", "zz"), max_tokens=20)
    assert (text, done.finish_reason) == ("bcde", "stop")
    config = json.loads((decoder / "genai_config.json").read_text())
    end = Tokenizer.from_file(str(decoder / "tokenizer.json")).token_to_id("k")
    config["model"]["eos_token_id"] = end
    (decoder / "genai_config.json").write_text(json.dumps(config))
    ending = load(decoder)
    text, done = generate(ending, "g", max_tokens=20)
    assert (text, done.finish_reason, done.usage.completion_tokens) == ("hij", "stop", 3)
    _, done = generate(ending, "g", max_tokens=20, ignore_eos=True)
    assert (done.finish_reason, done.usage.completion_tokens) == ("length", 20)


def test_a_seed_repeats_and_another_differs(decoder, load):
    backend = load(decoder)
    sampling = {"temperature": 8.0, "top_k": 0, "top_p": 1.0, "max_tokens": 30, "ignore_eos": True}
    texts = [generate(backend, "a", seed=seed, **sampling)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_context_is_the_limit_of_prompt_and_answer(decoder, load):
    backend = load(decoder, context_length=40)
    _, done = generate(backend, "a" * 30)
    assert (done.finish_reason, done.usage.completion_tokens) == ("length", 10)
    with pytest.raises(BackendError, match="40 tokens") as error:
        generate(backend, "a" * 40)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(BackendError, match="6000 characters"):
        generate(backend, "a" * 6000)
    with pytest.raises(BackendError, match="is empty"):
        generate(backend, "")


def test_a_prompt_is_read_in_pieces_without_a_difference(decoder, load, monkeypatch):
    whole, pieces = load(decoder), load(decoder)
    monkeypatch.setattr(pieces._generator, "_piece", 3)
    prompt = "the quick brown fo"
    assert generate(whole, prompt, max_tokens=9)[0] == generate(pieces, prompt, max_tokens=9)[0]


def test_generation_is_cancelled_within_a_token_or_a_piece(decoder, load):
    backend = load(decoder)
    calls = iter([False, False, False, True])
    text, done = generate(backend, "a", lambda: next(calls))
    assert (text, done.finish_reason, done.usage.completion_tokens) == ("bc", "cancelled", 2)
    assert generate(backend, "a", lambda: True)[1].finish_reason == "cancelled"
    assert generate(backend, "a", max_tokens=1)[0] == "b"


def test_what_generation_cannot_do_is_refused(decoder, load):
    backend = load(decoder)
    message = {"role": "user", "content": "a"}
    tool = {"type": "function", "function": {"name": "f"}}
    chat = backend.chat(ChatRequest(messages=(message,), tools=(tool,)), never)
    assert "cannot call tools" in failure(next, chat).message
    fill = backend.complete(CompleteRequest(prompt="a", suffix="b"), never)
    assert "suffix" in failure(next, fill).message


def test_a_template_that_fails_is_an_error_of_the_request(decoder, load):
    config = json.loads((decoder / "tokenizer_config.json").read_text())
    template = "{{ raise_exception('no such role') }}"
    (decoder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with pytest.raises(BackendError, match="the chat template refused") as error:
        generate(load(decoder), "a", chat=True)
    assert error.value.code == "invalid_request"


def test_a_decoder_that_is_damaged_says_why(decoder, tmp_path):
    artifact = onnx_files.artifact(decoder)
    shutil.copy(onnx_files.minilm_graph(), decoder / "model.onnx")
    error = failure(Onnx().load, spec(artifact), lambda _: None)
    assert error.code == "load_failed" and "onnxruntime-genai cannot load" in error.message
