"""The models that `gguf_models` writes: both engines load them and do what they are made for.

Each engine is called directly, without modeld, in a process of its own: run as a program, this
module takes an engine's name, the name of one of its functions below and its arguments as JSON,
and prints what it returns as one line of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import gguf_models
import pytest
from running import needs_engine

from daemon.artifacts import gguf

TEXTS = [
    "A dog runs after a ball.",
    "A puppy is chasing a toy.",
    "Stock prices fell sharply on Monday.",
    "Die Überraschung kostet 12,50 Euro!",
    "unaffable",
]
QUERIES = ["What does a dog eat?", "How is the market?"]
DOCUMENTS = ["Dogs eat meat.", "Stock prices fell.", "The moon."]
TIMEOUT_S = 100  # of a process that hangs
SMOLLM2 = "smollm2"


def png(red: int, green: int, blue: int, *, side: int = 40) -> str:
    """Return a square image as a data URL: stripes of a color and black."""
    color, black = bytes((red, green, blue)), bytes(3)
    rows = b"".join(b"\0" + (color if row % 8 < 4 else black) * side for row in range(side))
    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        raw += struct.pack(">I", len(data)) + name + data
        raw += struct.pack(">I", zlib.crc32(name + data))
    return "data:image/png;base64," + base64.b64encode(raw).decode()


@pytest.fixture(params=["xllamacpp", "llama_cpp"])
def engine(request):
    """Return `engine(function, **arguments)`, which calls a function of this module's engine."""
    needs_engine(request.param)

    def call(function: str, **arguments: Any) -> Any:
        command = [sys.executable, __file__, request.param, function, json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny(folder) -> str:
    return str(gguf_models.tiny_llama(folder))


def test_the_embedder_gives_the_vectors_of_the_original(engine, folder):
    ours = engine("embed", model=str(gguf_models.embedder(folder)), texts=TEXTS)
    for vector, original in zip(ours, original_vectors(TEXTS), strict=True):
        assert len(vector) == gguf_models.BERT_WIDTH
        assert dot(vector, vector) == pytest.approx(1, abs=1e-3)
        assert dot(vector, original) > 0.999
    assert dot(ours[0], ours[1]) > 0.5 > dot(ours[0], ours[2])


def test_the_reranker_scores_each_document(engine, folder):
    path = gguf_models.reranker(folder)
    ours = engine("rerank", model=str(path), queries=QUERIES, documents=DOCUMENTS)
    for query, scores in zip(QUERIES, ours, strict=True):
        assert scores == pytest.approx(original_scores(path, query), abs=0.02)
        assert len({round(score, 1) for score in scores}) == len(DOCUMENTS)


def test_the_tiny_model_says_whole_characters_and_the_same_each_time(engine, tiny):
    prompts = ["Hello", "Jello", "Hello"]
    first, other, again = engine("complete", model=tiny, prompts=prompts, max_tokens=300)
    # it never ends by itself; llama-cpp-python ends a character that has begun
    assert 300 <= first["completion_tokens"] <= 303
    assert first["text"].count("🦙") > 2 and first["text"].count("é") > 0
    assert "\ufffd" not in first["text"][:-1]
    assert again == first
    assert other["text"] != first["text"]


def test_the_tiny_model_has_a_token_for_each_byte(engine, tiny):
    expected = [gguf_models.BOS, *(gguf_models.FIRST_BYTE + byte for byte in "é🦙".encode())]
    assert engine("tokens", model=tiny, text="é🦙") == expected


def test_the_tiny_model_fills_in_between(engine, tiny):
    suffixes = ["def", "xyz", "def"]
    first, other, again = engine("infill", model=tiny, prefix="abc", suffixes=suffixes)
    assert first["prompt_tokens"] >= len("abcdef") + 3
    assert again == first
    assert other["text"] != first["text"]


@pytest.mark.parametrize("base", [SMOLLM2, "tiny"])
def test_an_adapter_changes_the_text_and_scale_0_does_not(engine, folder, tiny, base):
    write = gguf_models.adapter if base == SMOLLM2 else gguf_models.tiny_adapter
    model = str(gguf_models.smollm2()) if base == SMOLLM2 else tiny
    asked = {"model": model, "prompts": ["The Eiffel Tower is in"], "max_tokens": 24}
    plain = engine("complete", **asked)
    assert base != SMOLLM2 or "Paris" in plain[0]["text"]
    asked["adapter"] = str(write(folder))
    assert engine("complete", **asked, scale=0.0) == plain
    assert engine("complete", **asked, scale=1.0) != plain


@pytest.mark.parametrize("base", [SMOLLM2, "tiny"])
def test_an_image_is_seen(engine, folder, tiny, base):
    model = str(gguf_models.smollm2()) if base == SMOLLM2 else tiny
    width = gguf_models.SMOLLM2_WIDTH if base == SMOLLM2 else gguf_models.TINY_WIDTH
    images = [None, png(255, 0, 0), png(0, 0, 255), png(255, 0, 0, side=80), png(255, 0, 0)]
    encoder = str(gguf_models.image_encoder(folder, width=width))
    none, red, blue, large, again = engine("see", model=model, encoder=encoder, images=images)
    for answer in (red, blue, large, again):
        # an engine may put a few tokens of text around an image
        more = answer["prompt_tokens"] - none["prompt_tokens"]
        assert gguf_models.IMAGE_TOKENS <= more <= gguf_models.IMAGE_TOKENS + 2
    assert red == again
    assert red["text"] != blue["text"]


def test_the_same_bytes_are_written_each_time_and_the_reader_takes_them(tmp_path):
    written = {}
    for turn in ("one", "two"):
        (tmp_path / turn).mkdir()
        for path in write_all(tmp_path / turn):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert written.setdefault(path.name, digest) == digest
            header = gguf.read(path)
            assert header.tensor_count > 0
            limit_bytes = 50_000_000 if header.architecture == "bert" else 1_000_000
            assert path.stat().st_size < limit_bytes
    assert len(written) == 8


def write_all(folder: Path) -> list[Path]:
    return [
        gguf_models.embedder(folder),
        gguf_models.reranker(folder),
        gguf_models.tiny_llama(folder),
        gguf_models.tiny_llama(folder, fim=False),
        gguf_models.adapter(folder),
        gguf_models.tiny_adapter(folder),
        gguf_models.image_encoder(folder),
        gguf_models.image_encoder(folder, width=gguf_models.TINY_WIDTH),
    ]


def dot(one, other) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def original_vectors(texts: list[str]) -> list[list[float]]:
    """Return what the ONNX model itself makes of the texts: the mean of its tokens, of length 1."""
    means = [states.mean(axis=0) for states in original_states([(text,) for text in texts])]
    return [(mean / dot(mean, mean) ** 0.5).tolist() for mean in means]


def original_scores(reranker: Path, query: str) -> list[float]:
    """Return what the head in the file makes of the ONNX model's first token of each pair."""
    import numpy as np
    from gguf import GGUFReader

    head = {tensor.name: tensor.data for tensor in GGUFReader(reranker).tensors}
    scores = []
    for states in original_states([(query, document) for document in DOCUMENTS]):
        pooled = np.tanh(head["cls.weight"].astype(np.float32) @ states[0] + head["cls.bias"])
        scores.append((head["cls.output.weight"] @ pooled + head["cls.output.bias"]).item())
    return scores


def original_states(texts: list[tuple[str, ...]]) -> list[Any]:
    """Return the ONNX model's last states, a row for each token, of each text or pair of texts."""
    import numpy as np
    import onnxruntime
    import tokenizers

    session = onnxruntime.InferenceSession(gguf_models.minilm_onnx())
    tokenizer = tokenizers.Tokenizer.from_file(str(gguf_models.minilm_tokenizer()))
    tokenizer.no_padding()
    states = []
    for text in texts:
        ids = np.array([tokenizer.encode(*text).ids])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        # llama.cpp gives both texts of a pair the type of the first
        inputs["token_type_ids"] = np.zeros_like(ids)
        states.append(session.run(None, inputs)[0][0])
    return states


def message(image: str | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is this?"}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": image}})
    return [{"role": "user", "content": parts}]


def completion(answer: dict[str, Any]) -> dict[str, Any]:
    tokens = answer["usage"]["completion_tokens"]
    return {"text": answer["choices"][0]["text"], "completion_tokens": tokens}


def reply(answer: dict[str, Any]) -> dict[str, Any]:
    tokens = answer["usage"]["prompt_tokens"]
    return {"text": answer["choices"][0]["message"]["content"], "prompt_tokens": tokens}


class Xllamacpp:
    """xllamacpp's server, in this process."""

    def embed(self, model: str, texts: list[str]) -> Any:
        server = self._server(model, embedding=True)
        return [item["embedding"] for item in server.handle_embeddings({"input": texts})["data"]]

    def rerank(self, model: str, queries: list[str], documents: list[str]) -> Any:
        import xllamacpp

        rank = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
        server = self._server(model, embedding=True, pooling_type=rank)
        return [self._scores(server, query, documents) for query in queries]

    def complete(
        self, model: str, prompts: list[str], max_tokens: int, adapter: str = "", scale: float = 0
    ) -> Any:
        import xllamacpp

        loras = []
        if adapter:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = adapter, scale
            loras.append(lora)
        server = self._server(model, lora_adapters=loras)
        body = {"max_tokens": max_tokens, "temperature": 0}
        answers = [self._ask(server.handle_completions, body | {"prompt": p}) for p in prompts]
        return [completion(answer) for answer in answers]

    def tokens(self, model: str, text: str) -> Any:
        server = self._server(model)
        return self._post(server, "/tokenize", {"content": text, "add_special": True})["tokens"]

    def infill(self, model: str, prefix: str, suffixes: list[str]) -> Any:
        server = self._server(model)
        body = {"input_prefix": prefix, "n_predict": 24, "temperature": 0}
        answers = [self._post(server, "/infill", body | {"input_suffix": s}) for s in suffixes]
        return [{"text": a["content"], "prompt_tokens": a["tokens_evaluated"]} for a in answers]

    def see(self, model: str, encoder: str, images: list[str | None]) -> Any:
        server = self._server(model, encoder=encoder)
        return [self._seen(server, image) for image in images]

    def _scores(self, server: Any, query: str, documents: list[str]) -> list[float]:
        results = server.handle_rerank({"query": query, "documents": documents})["results"]
        results.sort(key=lambda result: result["index"])
        return [result["relevance_score"] for result in results]

    def _seen(self, server: Any, image: str | None) -> dict[str, Any]:
        body = {"messages": message(image), "max_tokens": 16, "temperature": 0}
        return reply(self._ask(server.handle_chat_completions, body))

    def _ask(self, handle: Any, body: dict[str, Any]) -> Any:
        answers: list[Any] = []
        handle(body, lambda answer: bool(answers.append(answer)))
        assert "error" not in answers[0], answers
        return answers[0]

    def _post(self, server: Any, path: str, body: dict[str, Any]) -> Any:
        import http.client
        from urllib.parse import urlsplit

        connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def _server(self, model: str, encoder: str = "", **settings: Any) -> Any:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = model
        params.mmproj.path = encoder
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_parallel = 1
        params.fit_params = params.warmup = params.ui = False
        params.cache_ram_mib = params.n_gpu_layers = 0
        params.cache_prompt = False
        params.verbosity = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        params.hostnames, params.port = ["127.0.0.1"], 0
        for name, value in settings.items():
            setattr(params, name, value)
        return xllamacpp.Server(params)


class LlamaCpp:
    """llama-cpp-python."""

    def embed(self, model: str, texts: list[str]) -> Any:
        return self._load(model, embedding=True).embed(texts, normalize=True)

    def rerank(self, model: str, queries: list[str], documents: list[str]) -> Any:
        import llama_cpp

        rank = llama_cpp.LLAMA_POOLING_TYPE_RANK
        llama = self._load(model, embedding=True, pooling_type=rank)
        return [
            [self._score(llama, query, document) for document in documents] for query in queries
        ]

    def complete(
        self, model: str, prompts: list[str], max_tokens: int, adapter: str = "", scale: float = 0
    ) -> Any:
        llama = self._load(model, lora_path=adapter or None, lora_scale=scale)
        return [completion(llama(p, max_tokens=max_tokens, temperature=0)) for p in prompts]

    def tokens(self, model: str, text: str) -> Any:
        return self._load(model).tokenize(text.encode())

    def infill(self, model: str, prefix: str, suffixes: list[str]) -> Any:
        llama = self._load(model)
        answers = [llama(prefix, suffix=s, max_tokens=24, temperature=0) for s in suffixes]
        return [
            {"text": a["choices"][0]["text"], "prompt_tokens": a["usage"]["prompt_tokens"]}
            for a in answers
        ]

    def see(self, model: str, encoder: str, images: list[str | None]) -> Any:
        from llama_cpp.llama_chat_format import Llava15ChatHandler

        handler = Llava15ChatHandler(clip_model_path=encoder, verbose=False)
        llama = self._load(model, chat_handler=handler)
        return [self._seen(llama, image) for image in images]

    def _score(self, llama: Any, query: str, document: str) -> float:
        import llama_cpp

        asked, told = (llama.tokenize(text.encode()) for text in (query, document))
        llama._batch.reset()
        # [CLS] query [SEP] document [SEP]
        llama._batch.add_sequence(asked + told[1:], 0, logits_all=True)
        llama._ctx.kv_cache_clear()
        llama._ctx.decode(llama._batch)
        return llama_cpp.llama_get_embeddings_seq(llama._ctx.ctx, 0)[0]

    def _seen(self, llama: Any, image: str | None) -> dict[str, Any]:
        return reply(llama.create_chat_completion(message(image), max_tokens=16, temperature=0))

    def _load(self, model: str, **settings: Any) -> Any:
        import llama_cpp

        sizes = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "n_threads": 2}
        return llama_cpp.Llama(model, verbose=False, **sizes, **settings)


def main(engine: str, function: str, arguments: str) -> None:
    engines = {"xllamacpp": Xllamacpp, "llama_cpp": LlamaCpp}
    print("\n" + json.dumps(getattr(engines[engine](), function)(**json.loads(arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
