"""The ctransformers backend with the real engine on real, tiny files of every architecture."""

from __future__ import annotations

import asyncio
import codecs
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from ggml_files import ARCHITECTURES, write_ggml

from backends.contract import (
    Artifact,
    BackendError,
    ChatRequest,
    CompleteRequest,
    Delta,
    Done,
    EmbedRequest,
    Hardware,
    LoadOptions,
    LoadSpec,
    ModelFile,
    Probe,
    Sampling,
    Task,
)
from backends.ctransformers import CTransformers, memory
from daemon import errors
from daemon.artifacts import ggml
from daemon.workers.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
PROMPT = "Hello the world"
GREEDY = Sampling(temperature=0, max_tokens=20)
SAID = "aö🙂.Z"  # of which no byte is there twice
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

pytestmark = pytest.mark.timeout(120)
Load = Callable[..., Awaitable[Worker]]


def artifact_of(path: Path, chat_template: str = "", architecture: str = "") -> Artifact:
    file = ModelFile(path=str(path), size_bytes=path.stat().st_size, mtime_ns=0, sha256="")
    return ggml.to_artifact(ggml.read(path, architecture), [file], chat_template)


def spec_of(artifact: Artifact, scratch: Path, context_length: int | None = None) -> LoadSpec:
    options = LoadOptions(context_length=context_length, threads=1)
    return LoadSpec(
        artifact=artifact,
        context_length=CTransformers.estimate(artifact, options).context_length,
        slots=1,
        threads=1,
        scratch_dir=str(scratch),
    )


@pytest.fixture
async def load(tmp_path: Path) -> AsyncIterator[Load]:
    """`await load("gpt2")` gives a worker that has loaded a model; keywords are write_ggml's."""
    started: list[Worker] = []

    async def load_model(
        architecture: str = "gpt2",
        *,
        chat_template: str = "",
        limit: int | None = None,
        **changes: Any,
    ) -> Worker:
        path = write_ggml(tmp_path / f"{architecture}.bin", architecture, **changes)
        worker = await Worker.start(
            "backends.ctransformers:CTransformers", name=architecture, scratch=tmp_path
        )
        started.append(worker)
        spec = spec_of(artifact_of(path, chat_template), tmp_path, limit)
        worker.loaded = await worker.load(spec, timeout_s=PATIENCE_S, progress=lambda _: None)
        return worker

    yield load_model
    for worker in started:
        await worker.stop("the test is over")


def complete(prompt: str = PROMPT, **sampling: Any) -> CompleteRequest:
    return CompleteRequest(
        prompt=prompt, sampling=Sampling(**({"temperature": 0, "max_tokens": 20} | sampling))
    )


async def pieces(worker: Worker, request) -> tuple[list[str], Done]:
    _, entry = worker.submit(request)
    async with asyncio.timeout(PATIENCE_S):
        *deltas, done = [part async for part in worker.answers(entry)]
    assert isinstance(done, Done)
    return [delta.content for delta in deltas], done


async def answer(worker: Worker, request) -> tuple[str, Done]:
    deltas, done = await pieces(worker, request)
    return "".join(deltas), done


async def refusal(worker: Worker, request) -> errors.ModeldError:
    with pytest.raises(errors.ModeldError) as error:
        await answer(worker, request)
    return error.value


def run(program: str, *arguments: str) -> Any:
    """Return what a program prints as JSON: engines crash, and take their process with them."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr[-2000:].decode(errors="replace")
    return json.loads(done.stdout)


ENGINES_OWN = """
import json, sys
from ctransformers import AutoModelForCausalLM
path, kind, prompt, count = sys.argv[1:]
llm = AutoModelForCausalLM.from_pretrained(path, model_type=kind, lib="basic", threads=1)
prompt = llm.tokenize(prompt)
raw, tokens = b"", 0
for token in llm.generate(prompt, top_k=1, temperature=1.0, top_p=0.95):
    if llm.is_eos_token(token) or tokens == int(count):
        break
    raw += llm.detokenize([token], decode=False)
    tokens += 1
print(json.dumps([len(prompt), tokens, raw.hex()]))
"""


# every architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_greedy_text_is_the_engine_s_own(load, tmp_path, architecture):
    worker = await load(architecture)
    text, done = await answer(worker, complete())
    path = str(tmp_path / f"{architecture}.bin")
    prompt_tokens, tokens, raw = run(ENGINES_OWN, path, architecture, PROMPT, "20")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    assert text == decoder.decode(bytes.fromhex(raw))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt_tokens, tokens)
    assert tokens > 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_a_full_context_ends_an_answer_and_harms_nothing(load, architecture):
    worker = await load(architecture, limit=48)
    assert worker.loaded.context_length == 48
    request = complete(max_tokens=None, ignore_eos=True, temperature=1.5, seed=3)
    _, done = await answer(worker, request)
    assert done.finish_reason == "length"
    assert done.usage.prompt_tokens + done.usage.completion_tokens == 48
    error = await refusal(worker, complete("12345 " * 20))
    assert isinstance(error, errors.ContextLengthExceeded)
    assert "48" in error.message
    assert (await answer(worker, complete()))[1].usage.completion_tokens > 0


@pytest.mark.parametrize("architecture", ["llama", "falcon"])
async def test_vectors_are_of_the_text_and_of_length_1(load, architecture):
    worker = await load(architecture)
    assert Task.EMBED in worker.loaded.tasks
    texts = ("a cat", "another text", "a cat", "größe 🙂" * 20)
    _, entry = worker.submit(EmbedRequest(inputs=texts))
    (found,) = [part async for part in worker.answers(entry)]
    assert found.dimensions == 64
    values = [struct.unpack("<64f", vector) for vector in found.vectors]
    assert all(math.hypot(*vector) == pytest.approx(1, abs=1e-4) for vector in values)
    assert found.vectors[0] == found.vectors[2] != found.vectors[1]


async def test_other_architectures_have_no_vectors_and_say_so(load):
    worker = await load("gpt2")
    assert worker.loaded.tasks == (Task.COMPLETE,)
    error = await refusal(worker, EmbedRequest(inputs=("a",)))
    assert isinstance(error, errors.InvalidRequest) and "embed" in error.message


async def test_a_text_for_a_vector_is_refused_or_cut_if_it_is_too_long(load):
    worker = await load("llama", limit=32)
    error = await refusal(worker, EmbedRequest(inputs=("x" * 40,)))
    assert isinstance(error, errors.ContextLengthExceeded) and "41 tokens" in error.message
    _, entry = worker.submit(EmbedRequest(inputs=("x" * 40, "x" * 31), truncate=True))
    (found,) = [part async for part in worker.answers(entry)]
    assert found.vectors[0] == found.vectors[1]


# generation


async def test_characters_of_several_tokens_come_whole(load):
    worker = await load(recite=SAID.encode())
    deltas, done = await pieces(worker, complete("a", repeat_penalty=1.0))
    assert deltas == ["ö", "🙂", ".", "Z"]
    assert done.finish_reason == "stop"
    assert done.usage.completion_tokens == len(SAID.encode()) - 1


async def test_an_answer_cut_within_a_character_has_no_piece_of_it(load):
    worker = await load(recite=SAID.encode())
    text, done = await answer(worker, complete("a", repeat_penalty=1.0, max_tokens=4))
    assert (text, done.finish_reason, done.usage.completion_tokens) == ("ö", "length", 4)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [((".",), "ö🙂"), (("🙂.",), "ö"), (("no", "Z"), "ö🙂."), (("🙂x",), "ö🙂.Z")],
)
async def test_a_stop_sequence_ends_the_answer_before_it(load, stop, expected):
    worker = await load(recite=SAID.encode())
    text, done = await answer(worker, complete("a", repeat_penalty=1.0, stop=stop))
    assert (text, done.finish_reason) == (expected, "stop")


async def test_the_end_can_be_ignored(load):
    worker = await load(recite=SAID.encode())
    request = complete("a", repeat_penalty=1.0, ignore_eos=True, max_tokens=30)
    text, done = await answer(worker, request)
    assert text.startswith("ö🙂.Z") and "endoftext" not in text
    assert (done.finish_reason, done.usage.completion_tokens) == ("length", 30)


@pytest.mark.parametrize("limit", [0, 1, 7])
async def test_max_tokens_is_kept_to_the_token(load, limit):
    _, done = await answer(await load(), complete(max_tokens=limit, ignore_eos=True))
    assert (done.finish_reason, done.usage.completion_tokens) == ("length", limit)


async def test_a_seed_gives_its_text_again_and_none_another(load):
    worker = await load()

    async def drawn(seed):
        request = complete(temperature=2.0, seed=seed, top_k=0, top_p=1.0, ignore_eos=True)
        return (await answer(worker, request))[0]

    assert await drawn(5) == await drawn(5)
    assert len({await drawn(seed) for seed in (None, None, 6, 7)}) == 4


async def test_tokens_of_one_answer_are_drawn_anew(load):
    """The engine would begin its random numbers again for each token."""
    worker = await load(recite=b"a")  # after any byte but `a` all tokens are equally likely
    request = complete("b", temperature=1.0, seed=1, top_k=0, top_p=1.0, repeat_penalty=1.0)
    text, _ = await answer(worker, request)
    assert len(set(text)) > 5


async def test_odd_settings_do_not_end_the_engine(load):
    worker = await load()
    for odd in (
        {"top_k": 1_000_000},
        {"top_k": -1},
        {"top_p": 0.0},
        {"temperature": 1e-30},
        {"temperature": 100.0},
        {"repeat_penalty": 100.0},
        {"seed": -5},
        {"seed": 2**63},
        {"min_p": 0, "presence_penalty": 0.0, "frequency_penalty": 0},
    ):
        _, done = await answer(worker, complete(**({"temperature": 0.7, "max_tokens": 3} | odd)))
        assert done.usage.completion_tokens <= 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 0.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("logprobs", 0),
        ("logit_bias", {1: 2.0}),
        ("json_schema", {}),
        ("grammar", 'root ::= "a"'),
        ("repeat_penalty", 0),
    ],
)
def test_what_the_engine_does_not_know_is_refused_by_name(name, value):
    from backends.ctransformers.backend import _refuse_unknown

    with pytest.raises(BackendError, match=name) as refused:
        _refuse_unknown(Sampling(**{name: value}))
    assert refused.value.code == "invalid_request"


async def test_a_refused_request_leaves_the_model_usable(load):
    worker = await load()
    error = await refusal(worker, complete(grammar='root ::= "a"'))
    assert isinstance(error, errors.InvalidRequest) and "grammar" in error.message
    assert (await answer(worker, complete()))[0]


@pytest.mark.parametrize(("prompt", "problem"), [("", "empty"), ("a\0b", "NUL")])
async def test_a_prompt_of_nothing_is_refused(load, prompt, problem):
    error = await refusal(await load(), complete(prompt))
    assert isinstance(error, errors.InvalidRequest) and problem in error.message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_a_later_answer_does_not_depend_on_earlier_ones(load, architecture):
    worker = await load(architecture)
    first, done = await answer(worker, complete())
    assert done.usage.cached_tokens == 0
    for other in (PROMPT[:6] + "other", PROMPT, "quite another prompt", PROMPT):
        again, done = await answer(worker, complete(other))
        assert done.usage.cached_tokens < done.usage.prompt_tokens
    assert again == first


@pytest.mark.parametrize("architecture", ["gpt2", "falcon"])
async def test_what_a_prompt_has_in_common_with_the_last_text_is_not_read_again(load, architecture):
    worker = await load(architecture)
    text, done = await answer(worker, complete("Hello", max_tokens=1, ignore_eos=True))
    read = done.usage.prompt_tokens
    prompt = "Hello" + " the end"
    expected, done = await answer(worker, complete(prompt))
    assert done.usage.cached_tokens == read
    await answer(worker, complete("else"))
    again, done = await answer(worker, complete(prompt))
    assert (again, done.usage.cached_tokens) == (expected, 0)


async def test_a_cancel_ends_an_answer_and_the_next_one_is_right(load):
    worker = await load(context_length=32_768, limit=32_768)
    expected, _ = await answer(worker, complete())
    request = complete("another", max_tokens=None, ignore_eos=True)
    number, entry = worker.submit(request)
    answers = worker.answers(entry)
    assert isinstance(await anext(answers), Delta)
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancel(number)
    *_, last = [part async for part in answers]
    assert last.finish_reason == "cancelled"
    assert (await answer(worker, complete()))[0] == expected


async def test_a_cancel_ends_the_reading_of_a_prompt(load):
    worker = await load(context_length=8192, layers=4, limit=8192)
    expected, _ = await answer(worker, complete())
    number, entry = worker.submit(complete("1 2 3 4 " * 1000))
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancel(number)
    (last,) = [part async for part in worker.answers(entry)]
    assert last.finish_reason == "cancelled" and last.usage.prompt_tokens == 0
    assert (await answer(worker, complete()))[0] == expected


@pytest.mark.parametrize("architecture", ["gpt2", "mpt", "replit", "llama", "falcon"])
async def test_a_long_word_does_not_end_the_engine(load, architecture):
    """The engine's own tokenizer crashes on 40,000 letters, and takes 45 s for 20,000."""
    worker = await load(architecture, context_length=2048)
    for text in ("a" * 100_000, "字" * 40_000, " " * 100_000, "\n" * 50_000):
        error = await refusal(worker, complete(text))
        assert isinstance(error, errors.ContextLengthExceeded) and "tokens" in error.message
    assert (await answer(worker, complete()))[0]


# chat


async def test_without_a_template_there_is_no_chat_and_the_reasons_say_so(load, tmp_path):
    worker = await load()
    message = {"role": "user", "content": "hi"}
    error = await refusal(worker, ChatRequest(messages=(message,)))
    assert "chat" in error.message and "complete" in error.message
    artifact = artifact_of(tmp_path / "gpt2.bin")
    fit = CTransformers.fit(artifact, PROBE, HARDWARE)
    assert fit.tasks == (Task.COMPLETE,) and "no chat template" in fit.reason


async def test_a_template_of_the_catalog_is_used(load, tmp_path):
    worker = await load("gptj", chat_template=TEMPLATE)
    assert worker.loaded.tasks == (Task.CHAT, Task.COMPLETE)
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    request = ChatRequest(messages=({"role": "user", "content": parts},), sampling=GREEDY)
    text, done = await answer(worker, request)
    rendered = "<user>Hello\nthere\n<assistant>"
    expected, other = await answer(worker, complete(rendered))
    assert text == expected and done.usage.prompt_tokens == other.usage.prompt_tokens


async def test_a_template_cannot_reach_out_of_its_sandbox(load):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    worker = await load(chat_template=escape)
    error = await refusal(worker, ChatRequest(messages=({"role": "user", "content": "hi"},)))
    assert isinstance(error, errors.InvalidRequest) and "unsafe" in error.message


async def test_a_template_s_refusal_and_tools_are_told(load):
    worker = await load(chat_template="{{ raise_exception('roles must alternate') }}")
    user = {"role": "user", "content": "hi"}
    assert "roles must alternate" in (await refusal(worker, ChatRequest(messages=(user,)))).message
    tool = {"type": "function", "function": {"name": "f"}}
    error = await refusal(worker, ChatRequest(messages=(user,), tools=(tool,)))
    assert "tools" in error.message


async def test_a_broken_template_fails_the_load(load):
    with pytest.raises(errors.LoadFailed, match="chat template is broken"):
        await load(chat_template="{% for %}")


# loading


HARDWARE = Hardware(cpu_model="", physical_cores=1, logical_cores=1, ram_bytes=2**30)
PROBE = Probe(backend="ctransformers", available=True, version="0.2.27")


def test_a_probe_says_which_build_it_picks():
    program = """
import json
from backends.ctransformers import CTransformers
probe = CTransformers.probe()
print(json.dumps([probe.available, probe.version, probe.devices, probe.features, probe.reason]))
"""
    available, version, devices, features, reason = run(program)
    assert (available, devices, reason) == (True, ["CPU"], "")
    assert version.startswith("0.2") and features[0] in ("avx2", "avx", "basic", "local")


def test_importing_the_backend_imports_no_engine():
    program = """
import json, sys
import backends.ctransformers, backends.ctransformers.model, backends.ctransformers.templates
print(json.dumps([name for name in ("ctransformers", "jinja2", "numpy") if name in sys.modules]))
"""
    assert run(program) == []


def test_an_architecture_that_the_engine_does_not_know_does_not_fit(tmp_path):
    from dataclasses import replace

    artifact = replace(artifact_of(write_ggml(tmp_path / "m.bin")), architecture="bloom")
    fit = CTransformers.fit(artifact, PROBE, HARDWARE)
    assert fit.score == 0 and "bloom" in fit.reason and "gpt2" in fit.reason


@pytest.mark.parametrize("architecture", ["gpt2", "mpt", "llama", "falcon"])
async def test_a_file_that_the_engine_cannot_read_fails_the_load(tmp_path, architecture):
    path = write_ggml(tmp_path / "m.bin", architecture)
    spec = spec_of(artifact_of(path), tmp_path)
    path.write_bytes(path.read_bytes()[:-100_000] + bytes(100))
    worker = await Worker.start(
        "backends.ctransformers:CTransformers", name="bad", scratch=tmp_path
    )
    try:
        with pytest.raises((errors.LoadFailed, errors.WorkerCrashed)):
            await worker.load(spec, timeout_s=PATIENCE_S, progress=lambda _: None)
    finally:
        await worker.stop("the test is over")


async def test_a_file_that_is_gone_fails_the_load_by_name(load, tmp_path):
    artifact = artifact_of(write_ggml(tmp_path / "gone.bin"))
    (tmp_path / "gone.bin").unlink()
    worker = await Worker.start(
        "backends.ctransformers:CTransformers", name="bad", scratch=tmp_path
    )
    try:
        with pytest.raises(errors.LoadFailed, match=r"gone\.bin.*gpt2"):
            await worker.load(
                spec_of(artifact, tmp_path), timeout_s=PATIENCE_S, progress=lambda _: None
            )
    finally:
        await worker.stop("the test is over")


def test_the_context_is_the_smaller_of_the_user_s_and_the_file_s(tmp_path):
    def settled(architecture, wanted):
        path = write_ggml(tmp_path / "m.bin", architecture, context_length=5000, layers=1)
        return CTransformers.estimate(
            artifact_of(path), LoadOptions(context_length=wanted)
        ).context_length

    assert [settled("gpt2", wanted) for wanted in (None, 100, 5000, 9000)] == [
        4096,
        100,
        5000,
        5000,
    ]
    assert [settled("llama", wanted) for wanted in (None, 9000)] == [2048, 9000]


def test_an_estimate_counts_what_the_file_makes_the_engine_allocate(tmp_path):
    path = write_ggml(tmp_path / "m.bin", "gpt2", context_length=512, leave_out="model/lm_head")
    artifact = artifact_of(path)
    parts = CTransformers.estimate(artifact, LoadOptions(context_length=128)).parts
    assert parts["kv_cache"] == 2 * 4 * 2 * 512 * 64  # float32, and for all of the file's context
    assert parts["weights"] == artifact.weights_bytes + artifact.metadata["ggml.tied_bytes"]


# Shapes whose buffers are at or above the engine's 256 MiB at the end of their context. The
# program computes a batch there, and prints what it took.
FULL = """
import json, sys
from pathlib import Path
from test_ctransformers import artifact_of, spec_of
from backends.ctransformers import memory
from backends.ctransformers.model import Model

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

path, scratch, context = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
before = resident()
model = Model(spec_of(artifact_of(path), scratch, context))
batch = min(model.batch, model.context_length)
past = model.context_length - batch
model._evaluated = [0] * past
model.evaluate([1] * batch, past)
print(json.dumps([model.context_length, batch, resident() - before]))
"""


@pytest.mark.parametrize(
    ("architecture", "context_length", "embedding", "layers", "heads"),
    [
        ("gpt2", 8192, 256, 36, 2),
        ("replit", 16_384, 256, 16, 8),
        ("gptj", 8192, 256, 24, 32),
        ("dolly-v2", 8192, 256, 24, 32),
        ("gpt_neox", 300_000, 256, 1, 64),
        ("mpt", 200_000, 1024, 1, 16),
        ("starcoder", 140_000, 512, 1, 16),
    ],
)
def test_the_end_of_a_long_context_fits_the_engine_s_buffers(
    tmp_path, architecture, context_length, embedding, layers, heads
):
    path = write_ggml(
        tmp_path / "m.bin",
        architecture,
        context_length=context_length,
        embedding=embedding,
        layers=layers,
        heads=heads,
        file_type=2,
    )
    artifact = artifact_of(path)
    options = LoadOptions(context_length=context_length, threads=1)
    estimate = CTransformers.estimate(artifact, options)
    length, batch, used = run(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'live')!r})\n{FULL}",
        *(str(path), str(tmp_path), str(context_length)),
    )
    assert length == estimate.context_length
    assert batch >= 1
    assert memory.computing_bytes(artifact, batch, length) > 0.4 * memory.BUFFER_BYTES
    assert used < estimate.total_bytes


# The engine's tokens for texts of all kinds, with a buffer that is large enough for them.
SAME_TOKENS = """
import json, random, sys
from ctypes import c_int
from ctransformers.llm import LLM, Config
from backends.ctransformers.tokens import tokenizer
llm = LLM(sys.argv[1], sys.argv[2], config=Config(), lib="basic")
ours = tokenizer(llm, sys.argv[2])
chance = random.Random(4)
parts = ["Hello", " world", " the", "ing", "### End", "### Response:", "<fim-prefix>", "<|end|>",
         "<|endoftext|>", " ", "  ", "\\n", "\\n\\n ", "\\t", "'s", "don't", "12", " 3", "ö", "🙂", "字",
         ".", "_", " -", "\\x0b", "\\x7f", "###", "\\u00a0", "\\r\\n"]
different = []
for _ in range(400):
    text = "".join(chance.choice(parts) for _ in range(chance.randrange(1, 30)))
    raw = text.encode()
    found = (c_int * (2 * len(raw) + 16))()
    count = llm.ctransformers_llm_tokenize(raw, False, found)
    if list(found[:count]) != ours(text):
        different.append([text, list(found[:count]), ours(text)])
print(json.dumps(different[:3]))
"""


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "starcoder", "dolly-v2", "mpt"])
def test_tokens_are_those_of_the_engine(tmp_path, architecture):
    path = write_ggml(tmp_path / "m.bin", architecture)
    assert run(SAME_TOKENS, str(path), architecture) == []
