"""ONNX models through a whole daemon: a folder is imported, and asked over HTTP."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import numpy as np
import onnx_files
import onnxruntime
import pytest
from running import RunningDaemon
from tokenizers import Tokenizer

TEXTS = [
    "A cat sits on the mat.",
    "The quarterly report is due on Friday, and nobody has begun to write it.",
    "Ein Kätzchen 🐈 sitzt da.",
    "cats",
    "word " * 200,
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon with an embedder, a reranker, a classifier and a tiny language model."""
    daemon = RunningDaemon(tmp_path_factory.mktemp("onnx"))
    daemon.start()
    folders = tmp_path_factory.mktemp("folders")
    labels = {"0": "good", "1": "bad"}
    try:
        for name, write in (
            ("minilm", onnx_files.embedder),
            ("reranker", lambda folder: onnx_files.minilm_head(folder, {"0": "relevance"})),
            ("classifier", lambda folder: onnx_files.minilm_head(folder, labels)),
            ("letters", lambda folder: onnx_files.decoder(folder, context_length=256)),
        ):
            (folders / name).mkdir()
            write(folders / name)
            done = daemon.command("import", str(folders / name), "--name", name)
            assert done.returncode == 0, done.stderr
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture(scope="module")
def direct() -> list[np.ndarray]:
    """The vectors of TEXTS by onnxruntime called directly, one at a time."""
    tokenizer = Tokenizer.from_file(str(onnx_files.minilm_config("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    session = onnxruntime.InferenceSession(
        str(onnx_files.minilm_graph()), providers=["CPUExecutionProvider"]
    )
    vectors = []
    for text in TEXTS:
        ids = np.array([tokenizer.encode(text).ids], dtype=np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if "token_type_ids" in {node.name for node in session.get_inputs()}:
            given["token_type_ids"] = np.zeros_like(ids)
        states = session.run(None, given)[0][0]
        mean = states.mean(axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    return vectors


def embed(daemon, texts) -> list[np.ndarray]:
    answer = daemon.json("POST", "/v1/embeddings", {"model": "minilm", "input": texts})
    assert [entry["index"] for entry in answer["data"]] == list(range(len(texts)))
    return [np.array(entry["embedding"]) for entry in answer["data"]]


def test_vectors_are_onnxruntime_s_own_and_batch_and_single_agree(daemon, direct):
    together = embed(daemon, TEXTS)
    singles = [embed(daemon, [text])[0] for text in TEXTS]
    for own, batch, single in zip(direct, together, singles, strict=True):
        assert float(own @ batch) >= 0.9999
        assert float(own @ single) >= 0.9999
        assert float(batch @ single) >= 0.9999


async def test_many_clients_at_once_get_their_own_vectors(daemon, direct):
    async with aiohttp.ClientSession() as session:

        async def one(number: int) -> tuple[int, list[float]]:
            body = {"model": "minilm", "input": TEXTS[number]}
            async with session.post(f"{daemon.url}/v1/embeddings", json=body) as response:
                return number, (await response.json())["data"][0]["embedding"]

        asked = [one(number % len(TEXTS)) for number in range(60)]
        for number, vector in await asyncio.gather(*asked):
            assert float(direct[number] @ np.array(vector)) >= 0.9999


def test_documents_are_ranked_and_texts_labelled(daemon):
    body = {"model": "reranker", "query": "cats", "documents": TEXTS[:3]}
    results = daemon.json("POST", "/v1/rerank", body)["results"]
    scores = [entry["relevance_score"] for entry in results]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    answer = daemon.json("POST", "/modeld/v1/models/classifier/classify", {"input": TEXTS[:2]})
    for labels in answer["labels"]:
        assert set(labels) == {"good", "bad"} and abs(sum(labels.values()) - 1) < 1e-4


def test_a_stream_is_the_whole_answer_for_the_same_seed(daemon):
    body = {"model": "letters", "prompt": "abc", "max_tokens": 20, "seed": 5, "temperature": 1}
    whole = daemon.json("POST", "/v1/completions", body)["choices"][0]["text"]
    _, _, text = daemon.request("POST", "/v1/completions", body | {"stream": True})
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    streamed = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
    assert whole and streamed == whole


def test_what_it_cannot_do_is_said(daemon):
    body = {"model": "minilm", "messages": [{"role": "user", "content": "Hi"}]}
    status, _, text = daemon.request("POST", "/v1/chat/completions", body)
    assert status == 400 and "can't do chat, only embed" in text
    shown = daemon.model("minilm")
    assert (shown["format"], shown["backend"], shown["state"]) == ("onnx", "onnx", "ready")


def test_the_command_prints_a_vector_a_line(daemon, direct):
    given = daemon.command("embed", "minilm", *TEXTS[:2])
    piped = daemon.command("embed", "minilm", input_text="\n".join(TEXTS[:2]) + "\n\n")
    assert given.returncode == piped.returncode == 0, given.stderr + piped.stderr
    assert given.stdout == piped.stdout
    for line, expected in zip(given.stdout.splitlines(), direct[:2], strict=True):
        assert np.dot(json.loads(line), expected) > 0.999
    short = daemon.command("embed", "minilm", "--dimensions", "8", TEXTS[0])
    assert len(json.loads(short.stdout)) == 8
    wrong = daemon.command("embed", "letters", TEXTS[0])
    assert wrong.returncode == 1 and "embed" in wrong.stderr and wrong.stdout == ""
