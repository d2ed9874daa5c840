"""What is estimated before a load is what a worker takes once its model was really used.

An estimate may be too much by some percent, and never too little. The constants in the formulas
were measured on SmolLM2-135M and on a model of Qwen3's shape; other architectures check them.
"""

from __future__ import annotations

import asyncio
import shutil

import contract_cases
import gguf_architectures
import gguf_models
import onnx_files
import pytest
from peaks import Load, peak, picture
from running import needs_engine

from backends.contract import Artifact

KNOWN, UNSEEN = 0.10, 0.15
ENGINES = ("xllamacpp", "llama_cpp")
# Of a context only this much is filled here, since reading a thousand tokens takes seconds. It was
# zeroed at the load, so that a longer prompt takes no more; `benchmarks/memory.py` fills all of it.
FIRST, OTHERS = 512, 128
each_engine = pytest.mark.parametrize("engine", ENGINES)
pytestmark = pytest.mark.timeout(180)


def check(artifact: Artifact, load: Load, at_most: float) -> None:
    found = asyncio.run(peak(artifact, load))
    print(found)
    assert 0 <= found.error <= at_most, found


def gguf_load(engine: str, *, options=None, **settings) -> Load:
    needs_engine(engine)
    chosen = {"context_length": 1024, "slots": 2, "engine": options or {}} | settings
    return Load(backend=engine, first_tokens=FIRST, other_tokens=OTHERS, **chosen)


def smollm2() -> Artifact:
    return contract_cases.artifact_of(gguf_models.smollm2())


@each_engine
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("context_length", [512, 2048, 8192])
def test_smollm2(engine, context_length, slots):
    load = gguf_load(engine, context_length=context_length, slots=slots)
    check(smollm2(), load, KNOWN)


@each_engine
@pytest.mark.parametrize(
    "options",
    [{"cache_type_k": "q8_0", "cache_type_v": "q8_0"}, {"flash_attention": "off"}],
    ids=["8-bit-cache", "no-flash-attention"],
)
def test_smollm2_with_other_options(engine, options):
    check(smollm2(), gguf_load(engine, options=options), KNOWN)


@each_engine
@pytest.mark.parametrize(
    ("recipe", "kind", "output"),
    [
        (gguf_architectures.starcoder2, "Q4_0", "Q8_0"),  # weights laid out anew
        (gguf_architectures.gemma3, "Q4_0", ""),  # windows
        (gguf_architectures.granitehybrid, "Q8_0", ""),  # states and attention
        (gguf_architectures.deepseek2, "Q4_K", "Q6_K"),  # latent attention, experts
    ],
    ids=["starcoder2", "gemma3", "granitehybrid", "deepseek2"],
)
def test_an_unseen_architecture(tmp_path, engine, recipe, kind, output):
    load = gguf_load(engine)
    path = gguf_architectures.write(tmp_path, recipe(), kind, output)
    check(contract_cases.artifact_of(path), load, UNSEEN)


@each_engine
def test_a_model_that_pools(tmp_path, engine):
    needs_engine(engine)
    artifact = contract_cases.artifact_of(gguf_models.embedder(tmp_path))
    check(artifact, Load(backend=engine, slots=2), UNSEEN)


@each_engine
@pytest.mark.parametrize("beside", ["an image encoder", "an adapter"])
def test_smollm2_with(tmp_path, engine, beside):
    load = gguf_load(engine)
    shutil.copy(gguf_models.smollm2(), tmp_path)
    if beside == "an adapter":
        gguf_models.adapter(tmp_path)
    else:
        gguf_models.image_encoder(tmp_path)
        load = gguf_load(engine, image=picture())
    check(contract_cases.artifact_of(tmp_path), load, KNOWN)


def test_minilm_on_onnxruntime(tmp_path):
    artifact = onnx_files.artifact(onnx_files.embedder(tmp_path / "m"))
    check(artifact, Load(backend="onnx"), KNOWN)


def test_a_decoder_on_onnxruntime(tmp_path):
    needs_engine("onnxruntime_genai")
    artifact = onnx_files.artifact(onnx_files.decoder(tmp_path / "m", context_length=512))
    check(artifact, Load(backend="onnx"), UNSEEN)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "falcon"])
def test_ggml(tmp_path, architecture):
    artifact = contract_cases.artifact_of(contract_cases.ggml(tmp_path, architecture))
    check(artifact, Load(backend="ctransformers", threads=1), UNSEEN)


@each_engine
def test_a_long_use_takes_no_more(engine):
    check(smollm2(), gguf_load(engine, context_length=512, slots=4, rounds=12), KNOWN)
