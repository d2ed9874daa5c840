"""The llama_cpp backend in this process, on real files, against the engine called directly."""

from __future__ import annotations

import base64
import gc
import itertools
import json
import math
import random
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf_models
import pytest
from running import needs_engine

from backends import gguf as settings
from backends.contract import (
    Artifact,
    BackendError,
    ChatRequest,
    CompleteRequest,
    Delta,
    Done,
    EmbedRequest,
    Gpu,
    Hardware,
    LoadOptions,
    LoadSpec,
    ModelFile,
    Placement,
    RerankRequest,
    Sampling,
    Task,
)
from backends.llama_cpp import LlamaCpp
from backends.llama_cpp.model import Model
from daemon.artifacts import gguf

CONTEXT_LENGTH = 1024
SLOTS = 4
EIFFEL = "Where is the Eiffel Tower?"
PARIS = 7042  # " Paris"
HARDWARE = Hardware(cpu_model="", physical_cores=2, logical_cores=2, ram_bytes=2**34)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}


def batch_tokens() -> int:
    """How many tokens of SmolLM2 the backend computes at a time here."""
    return settings.prefill_batch(artifact_of(gguf_models.smollm2()), threads=2)


def never() -> bool:
    return False


def artifact_of(path: Path, **others: Path) -> Artifact:
    """A model's file and, by their roles, others that belong to it."""
    files = {"weights": path, **others}
    return gguf.to_artifact(
        gguf.read(path),
        tuple(
            ModelFile(path=str(file), size_bytes=0, mtime_ns=0, sha256="", role=role)
            for role, file in files.items()
        ),
    )


def spec_of(artifact: Artifact, **changes: Any) -> LoadSpec:
    spec = LoadSpec(
        artifact=artifact, context_length=CONTEXT_LENGTH, slots=SLOTS, threads=2, scratch_dir="."
    )
    return replace(spec, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("llama_cpp")


@pytest.fixture
def load():
    """Load a model with `load(artifact, **changes of the LoadSpec)`; closed after the test."""
    needs_engine("llama_cpp")
    opened = []

    def loaded(artifact: Artifact, **changes: Any) -> LlamaCpp:
        backend = LlamaCpp()
        opened.append(backend)
        backend.load(spec_of(artifact, **changes), lambda _: None)
        return backend

    yield loaded
    for backend in opened:
        backend.close()


@pytest.fixture(scope="module")
def backend():
    """SmolLM2, with 4 slots."""
    needs_engine("llama_cpp")
    backend = LlamaCpp()
    backend.load(spec_of(artifact_of(gguf_models.smollm2())), lambda _: None)
    yield backend
    backend.close()


@pytest.fixture
def direct():
    """The engine's own class, `direct(path, **changes)`, with the backend's batches."""
    needs_engine("llama_cpp")
    import llama_cpp

    opened = []

    def loaded(path: Path, **changes: Any) -> Any:
        batch = batch_tokens()
        usual = {"n_ctx": CONTEXT_LENGTH, "n_batch": batch, "n_ubatch": batch, "flash_attn": True}
        computed = {"n_threads": 2, "n_threads_batch": 2, "n_gpu_layers": 0}
        llama = llama_cpp.Llama(str(path), **usual | computed | changes)
        opened.append(llama)
        return llama

    yield loaded
    for llama in opened:
        llama.close()
    gc.collect()


@dataclass(frozen=True)
class Answer:
    text: str
    done: Done
    deltas: list[Delta]

    @property
    def usage(self):
        return self.done.usage


def collect(generation) -> Answer:
    deltas: list[Delta] = []
    while True:
        try:
            deltas.append(next(generation))
        except StopIteration as end:
            return Answer("".join(delta.content for delta in deltas), end.value, deltas)


def asking(text: Any, *before: dict[str, Any], **sampling: Any) -> ChatRequest:
    sampling = {"temperature": 0, "max_tokens": 24} | sampling
    return ChatRequest(
        messages=(*before, {"role": "user", "content": text}), sampling=Sampling(**sampling)
    )


def chat(backend: LlamaCpp, text: Any = EIFFEL, *before: dict[str, Any], **sampling: Any) -> Answer:
    return collect(backend.chat(asking(text, *before, **sampling), never))


def complete(backend: LlamaCpp, prompt: str, suffix: str | None = None, **sampling: Any) -> Answer:
    asked = Sampling(**{"temperature": 0, "max_tokens": 24} | sampling)
    return collect(
        backend.complete(CompleteRequest(prompt=prompt, suffix=suffix, sampling=asked), never)
    )


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Make all calls at the same time; return what they return, in their order."""
    results: dict[int, Any] = {}

    def call(at: int) -> None:
        results[at] = calls[at]()

    threads = [threading.Thread(target=call, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=110)
    return [results[at] for at in range(len(calls))]


def refused(ask: Callable[[], Any], code: str = "invalid_request") -> str:
    """Return what a refusal says."""
    with pytest.raises(BackendError) as error:
        ask()
    assert error.value.code == code
    return error.value.message


# text


def test_the_greedy_text_is_that_of_the_engine_called_directly(backend, direct):
    llama = direct(gguf_models.smollm2())
    story = "Write a long story about a dog."
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{story}<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    own = []
    for token in llama.generate(tokens, temp=0):
        own.append(token)
        if len(own) == 64:
            break
    answer = chat(backend, story, max_tokens=64, ignore_eos=True)
    assert answer.usage.prompt_tokens == len(tokens)
    assert answer.text.encode() == llama.detokenize(own)


def test_it_knows_where_the_eiffel_tower_is_and_what_it_cost(backend):
    answer = chat(backend)
    assert "Paris" in answer.text
    assert answer.done.finish_reason == "stop"
    assert answer.usage.prompt_tokens == 37
    assert answer.usage.completion_tokens == len(answer.deltas)
    assert answer.done.timings.prompt_ms > 0 and answer.done.timings.predicted_ms > 0


def test_four_at_once_answer_as_each_does_alone(backend):
    questions = [EIFFEL, "Who wrote Hamlet?", "What is 2+2?", "Name a colour."]
    alone = [chat(backend, question).text for question in questions]
    assert len(set(alone)) == 4
    calls = [lambda question=question: chat(backend, question).text for question in questions]
    assert at_once(calls) == alone
    assert at_once([lambda: chat(backend).text] * 4) == [alone[0]] * 4


def test_more_than_there_are_slots_wait_for_one(backend):
    assert len({answer.text for answer in at_once([lambda: chat(backend)] * 9)}) == 1


def test_a_long_prompt_does_not_stop_another_answer(backend):
    """The answer grows while the prompt is being read: its tokens are in the same batches."""
    reading = asking("The cat sat on the mat. " * 120, max_tokens=1)
    writing = backend.chat(asking("Tell a story.", max_tokens=200, ignore_eos=True), never)
    next(writing)
    done = threading.Event()
    other = threading.Thread(target=lambda: (collect(backend.chat(reading, never)), done.set()))
    other.start()
    between = 0
    while not done.is_set() and next(writing, None) is not None:
        between += 1
    writing.close()
    other.join()
    assert between >= 120 * 7 // batch_tokens() // 2


def test_the_same_seed_gives_the_same_text(backend):
    first = chat(backend, temperature=1.5, seed=7)
    assert chat(backend, temperature=1.5, seed=7).text == first.text
    assert {chat(backend, temperature=1.5, seed=seed).text for seed in (1, 2, 3)} != {first.text}


def test_a_stop_sequence_ends_the_text_before_it(backend):
    whole = chat(backend).text
    answer = chat(backend, stop=("Paris",))
    assert answer.text == whole[: whole.index("Paris")]
    assert answer.done.finish_reason == "stop"


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_max_tokens_ends_with_length(backend, limit):
    answer = chat(backend, max_tokens=limit)
    assert answer.done.finish_reason == "length"
    assert answer.usage.completion_tokens == limit == len(answer.deltas)


def test_ignore_eos_goes_on(backend):
    assert chat(backend, max_tokens=60, ignore_eos=True).usage.completion_tokens == 60


def test_characters_are_never_broken(backend, load, folder):
    answer = chat(backend, "Repeat exactly: 🦙🇫🇷 café 日本語", max_tokens=48)
    assert "\ufffd" not in answer.text
    tiny = load(artifact_of(gguf_models.tiny_llama(folder)))
    said = complete(tiny, "Hello", max_tokens=300)
    assert said.text.count("🦙") > 2 and "\ufffd" not in said.text
    assert all("\ufffd" not in delta.content for delta in said.deltas)
    assert len(said.deltas) < said.usage.completion_tokens == 300


def test_a_prompt_beyond_the_context_says_both_numbers(backend):
    said = refused(
        lambda: chat(backend, "The cat sat on the mat. " * 1000), "context_length_exceeded"
    )
    assert "7031" in said and "1024" in said
    assert "characters" in refused(lambda: chat(backend, "x" * 200_000), "context_length_exceeded")


def test_an_answer_ends_where_the_context_does(load):
    backend = load(artifact_of(gguf_models.smollm2()), context_length=64, slots=2)
    answers = at_once([lambda: chat(backend, max_tokens=None, ignore_eos=True)] * 2)
    for answer in answers:
        assert answer.done.finish_reason == "length"
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 64
    assert answers[0].text == answers[1].text


def test_penalties_biases_and_filters_change_the_text(backend):
    plain = chat(backend).text
    assert "Paris" not in chat(backend, logit_bias={PARIS: -100}).text
    for changed in ({"repeat_penalty": 1.5}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert chat(backend, max_tokens=40, **changed).text != chat(backend, max_tokens=40).text
    # one candidate is as good as greedy
    assert chat(backend, temperature=2.0, top_k=1).text == plain
    assert chat(backend, temperature=2.0, top_p=0.0).text == plain
    assert chat(backend, temperature=0.5, min_p=1.0).text == plain


def test_wrong_sampling_is_refused_by_name(backend):
    assert "49152" in refused(lambda: chat(backend, logit_bias={49_152: 1}))[:30]
    assert "repeat_penalty" in refused(lambda: chat(backend, repeat_penalty=0.0))


# what the slots keep


def test_a_conversation_goes_on_where_it_was(backend):
    question = {"role": "user", "content": "Where is the Louvre?"}
    first = chat(backend, question["content"])
    reply = {"role": "assistant", "content": first.text}
    second = chat(backend, "And the Colosseum?", question, reply)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    chat(backend, "And the Prado?", question, reply)  # takes that slot
    again = chat(backend, "And the Colosseum?", question, reply)
    assert again.text == second.text


def test_the_same_prompt_is_read_once(backend):
    assert chat(backend).usage.cached_tokens <= 36
    answer = chat(backend)
    assert answer.usage.cached_tokens == 36 == answer.usage.prompt_tokens - 1


def test_a_cancelled_answer_ends_within_a_token(backend):
    looks = itertools.count()  # one before each batch: that of the prompt, then of each token
    asked = asking("Tell a story.", max_tokens=None)
    answer = collect(backend.chat(asked, lambda: next(looks) >= 5))
    assert answer.done.finish_reason == "cancelled"
    assert answer.usage.completion_tokens == 5


def test_a_cancelled_prompt_ends_after_a_batch_and_what_was_read_is_kept(load):
    backend = load(artifact_of(gguf_models.smollm2()), slots=1)
    asked = asking("The dog ate the meat. " * 120, max_tokens=1)
    batches = iter([False, False, True])
    answer = collect(backend.chat(asked, lambda: next(batches)))
    assert answer.done.finish_reason == "cancelled"
    assert answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens > 600
    assert collect(backend.chat(asked, never)).usage.cached_tokens == 2 * batch_tokens()


def test_a_caller_that_goes_away_frees_its_slot(backend):
    for _ in range(SLOTS):
        left = backend.chat(asking("Tell a story.", max_tokens=None), never)
        next(left)
        left.close()
    assert len(at_once([lambda: chat(backend).text] * SLOTS)) == SLOTS
    assert not backend._engine._jobs


def test_a_batch_that_fails_costs_its_own_requests_alone(backend):
    """The engine's own abort callback stands for whatever may fail in it."""
    import llama_cpp

    plain = chat(backend).text
    context = backend._model.context
    callback = llama_cpp.ggml_abort_callback(lambda _: True)
    llama_cpp.llama_set_abort_callback(context, callback, None)
    try:
        failed = at_once([lambda: refused(lambda: chat(backend, "Hello"), "engine_error")] * 2)
    finally:
        llama_cpp.llama_set_abort_callback(context, llama_cpp.ggml_abort_callback(0), None)
    assert all("status 2" in said for said in failed)
    assert chat(backend).text == plain


def test_a_call_waits_for_what_runs_and_what_comes_later_waits_for_it(backend):
    engine = backend._engine
    running = backend.chat(asking("Tell a story.", max_tokens=200, ignore_eos=True), never)
    next(running)
    order = []
    calling = threading.Thread(
        target=lambda: order.append(engine.call(lambda slots: (len(engine._jobs), len(slots))))
    )
    calling.start()
    while not engine._calls:
        time.sleep(0.01)
    later = threading.Thread(target=lambda: (chat(backend, max_tokens=1), order.append("later")))
    later.start()
    assert collect(running).done.finish_reason == "length"
    for thread in (calling, later):
        thread.join(timeout=60)
    assert order == [(0, SLOTS), "later"]


def test_a_call_that_fails_fails_for_its_caller_alone(backend):
    with pytest.raises(ZeroDivisionError):
        backend._engine.call(lambda slots: 1 / 0)
    assert backend._engine.call(len) == SLOTS


def test_closing_ends_a_call_that_waits(load):
    backend = load(artifact_of(gguf_models.smollm2()))
    engine = backend._engine
    running = backend.chat(asking("Tell a story.", max_tokens=None, ignore_eos=True), never)
    next(running)
    said = []
    calling = threading.Thread(
        target=lambda: said.append(refused(lambda: engine.call(len), "cancelled"))
    )
    calling.start()
    while not engine._calls:
        time.sleep(0.01)
    backend.close()
    calling.join(timeout=60)
    assert said == ["the model is being unloaded"]
    assert refused(lambda: engine.call(len), "cancelled")
    assert backend.save_state("/nowhere", 2**30) == ()


# a sliding window

LETTERS = "".join(random.Random(1).choices(gguf_models.PRINTABLE, k=600))
# How a prompt is spread over batches hardly matters then: less than 0.002 to a log-probability. A
# token that is missing at the far end of the window was seen to make 0.1.
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}


def tokens_after(backend: LlamaCpp, prompt: str) -> tuple[list[tuple[str, float]], int]:
    """The answer's tokens with their log-probabilities, and how many of the prompt were there."""
    answer = complete(backend, prompt, logprobs=0, max_tokens=16)
    entries = [entry for delta in answer.deltas for entry in delta.logprobs]
    return [(each.token, pytest.approx(each.logprob, abs=0.01)) for each in entries], (
        answer.usage.cached_tokens
    )


@pytest.fixture(params=["whole", "window"])
def windowed(request, load, folder, monkeypatch):
    """Load a model with a window, whose cache keeps all of the context or little more than that."""
    if request.param == "window":
        usual = Model._context_params

        def small(self, spec, options):
            params = usual(self, spec, options)
            params.swa_full = False
            return params

        monkeypatch.setattr(Model, "_context_params", small)
    artifact = artifact_of(gguf_models.tiny_gemma(folder))

    def loaded(slots=1):
        return load(artifact, slots=slots, engine=EXACT)

    loaded.is_whole = request.param == "whole"
    return loaded


@pytest.mark.parametrize("kept", [20, 100, 300, 590])
def test_an_answer_that_parts_far_back_misses_no_token_of_the_window(windowed, kept):
    prompt = LETTERS[:kept] + "abc"
    right, _ = tokens_after(windowed(), prompt)
    backend = windowed()
    complete(backend, LETTERS, max_tokens=400)
    after, cached = tokens_after(backend, prompt)
    assert after == right
    # with the token that begins a text; the small cache has the last 512 of the thousand
    assert cached == (kept + 1 if windowed.is_whole or kept == 590 else 0)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("back", [0, 1, 2, 33, 100])
def test_a_window_that_was_restored_misses_no_token_either(windowed, tmp_path, back, slots):
    """A file holds the last tokens of a window alone, even if the cache held all."""
    backend = windowed()
    complete(backend, LETTERS, max_tokens=0)
    saved = backend.save_state(str(tmp_path), 2**30)
    assert [each.tokens for each in saved] == [len(LETTERS) + 1]
    prompt = LETTERS[: len(LETTERS) - back] + "\t\t"
    right, _ = tokens_after(windowed(), prompt)
    resumed = windowed(slots)
    assert resumed.restore_state(str(tmp_path), saved) == (saved[0].name,)
    after, cached = tokens_after(resumed, prompt)
    assert after == right
    assert cached == (len(LETTERS) + 1 - back if back <= 1 else 0)


# log-probabilities


def test_every_token_has_its_log_probability(backend):
    answer = chat(backend, logprobs=3)
    entries = [entry for delta in answer.deltas for entry in delta.logprobs]
    assert len(entries) == answer.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries) == answer.text.encode()
    for entry in entries:
        assert entry.logprob == entry.top[0].logprob <= 0 and entry.token == entry.top[0].token
        assert [top.logprob for top in entry.top] == sorted(
            (top.logprob for top in entry.top), reverse=True
        )
        assert len(entry.top) == 3


def test_log_probabilities_are_those_of_all_tokens(backend):
    (delta,) = chat(backend, logprobs=49_152, max_tokens=1).deltas
    (entry,) = delta.logprobs
    assert len(entry.top) == 49_152
    assert math.fsum(math.exp(top.logprob) for top in entry.top) == pytest.approx(1, abs=1e-4)


def test_log_probabilities_go_with_their_text(load, folder):
    tiny = load(artifact_of(gguf_models.tiny_llama(folder)))
    answer = complete(tiny, "Hello", max_tokens=300, logprobs=0)
    llamas = [delta for delta in answer.deltas if "🦙" in delta.content]
    assert llamas and all(len(delta.logprobs) == 4 for delta in llamas)
    cut = answer.text[: answer.text.index("🦙")]
    stopped = complete(tiny, "Hello", max_tokens=300, logprobs=0, stop=("🦙",))
    entries = [entry for delta in stopped.deltas for entry in delta.logprobs]
    assert stopped.text == cut
    assert b"".join(bytes(entry.bytes) for entry in entries) == cut.encode()


# grammars, schemas and tools


def test_a_grammar_is_kept_to_and_ends_the_answer(backend):
    answer = chat(backend, "Is water wet?", grammar='root ::= "no, never"', ignore_eos=True)
    assert (answer.text, answer.done.finish_reason) == ("no, never", "stop")
    answers = {chat(backend, grammar='root ::= "a" | "b"', seed=s).text for s in range(4)}
    assert answers <= {"a", "b"}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_is_kept_to(backend, temperature):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
    }
    answer = chat(backend, json_schema=schema, max_tokens=100, temperature=temperature, seed=1)
    found = json.loads(answer.text)
    assert isinstance(found["city"], str) and isinstance(found["large"], bool)
    assert answer.done.finish_reason == "stop"


def test_the_longest_text_that_a_schema_may_ask_for_works(backend):
    schema = {"type": "string", "maxLength": 1000}
    assert chat(backend, json_schema=schema, max_tokens=20).text.startswith('"')


def test_an_empty_schema_is_any_object(backend):
    answer = chat(backend, "A JSON object, please.", json_schema={}, max_tokens=60)
    assert answer.text.startswith("{")


def test_constrained_answers_share_batches_with_free_ones(backend):
    free, bound = at_once(
        [
            lambda: chat(backend).text,
            lambda: chat(backend, grammar="root ::= [0-9]{12}").text,
        ]
    )
    assert "Paris" in free and len(bound) == 12 and bound.isdigit()


@pytest.mark.parametrize(
    "wrong",
    [
        {"grammar": "root ::= unknown"},
        {"grammar": 'rot ::= "a"'},
        {"grammar": 'root ::= root "a"'},
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {"$ref": "https://example.org/schema"}},
        {"json_schema": {"enum": []}},
        # these would take the process down
        {"json_schema": {"type": "string", "maxLength": 20_000}},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 20_000}},
        {"grammar": f'root ::= {"(" * 20_000}"a"{")" * 20_000}'},
    ],
)
def test_a_wrong_grammar_or_schema_is_refused(backend, wrong):
    said = refused(lambda: chat(backend, **wrong))
    assert "grammar" in said or "json_schema" in said
    assert chat(backend, max_tokens=1).text


def calling(choice: str, name: str = "", **sampling: Any) -> ChatRequest:
    asked = asking("How is the weather in Paris?", **{"max_tokens": 100} | sampling)
    return replace(asked, tools=(WEATHER, CLOCK), tool_choice=choice, tool_name=name)


@pytest.mark.parametrize(("choice", "name"), [("required", ""), ("function", "get_time")])
def test_a_call_that_is_required_is_made(backend, choice, name):
    answer = collect(backend.chat(calling(choice, name), never))
    assert answer.done.finish_reason == "tool_calls" and answer.text == ""
    ((call,),) = [delta.tool_calls for delta in answer.deltas]
    assert call.name == name or (not name and call.name in ("get_weather", "get_time"))
    assert isinstance(json.loads(call.arguments), dict) and call.id


def test_a_call_that_is_cut_short_is_no_call(backend):
    answer = collect(backend.chat(calling("required", max_tokens=5), never))
    assert (answer.done.finish_reason, answer.deltas) == ("length", [])


def test_a_choice_that_is_left_to_the_model_is_refused_with_a_way_out(backend):
    said = refused(lambda: collect(backend.chat(calling("auto"), never)))
    assert "required" in said and "xllamacpp" in said
    assert collect(backend.chat(calling("none"), never)).text


# completion and infill


def test_a_completion_goes_on_with_the_text_itself(backend):
    assert complete(backend, "The capital of France is").text.startswith(" Paris")
    # special tokens are read as such: this is the prompt of a chat
    marked = complete(backend, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert marked.usage.prompt_tokens < 12


def test_an_empty_prompt_is_the_begin_of_a_text(backend):
    assert complete(backend, "").usage.prompt_tokens == 1


def test_what_is_filled_in_depends_on_both_sides(load, folder):
    tiny = load(artifact_of(gguf_models.tiny_llama(folder)))
    first, other = complete(tiny, "abc", "def"), complete(tiny, "abc", "xyz")
    assert first.text != other.text
    assert first.usage.prompt_tokens == 1 + 3 + len("abcdef")
    # the same as the marks themselves in a prompt
    assert complete(tiny, "<PRE>abc<SUF>def<MID>").text == first.text


def test_a_model_without_infill_refuses_a_suffix(backend, load, folder):
    assert "suffix" in refused(lambda: complete(backend, "abc", "def"))


# loading


def test_it_loads_again_after_a_close_and_closing_twice_is_fine(load):
    LlamaCpp().close()
    before = threading.active_count()
    texts = []
    for _ in range(2):
        backend = load(artifact_of(gguf_models.smollm2()), context_length=256, slots=1)
        texts.append(chat(backend).text)
        backend.close()
        backend.close()
    assert texts[0] == texts[1]
    assert threading.active_count() == before


def test_closing_ends_what_runs(load):
    backend = load(artifact_of(gguf_models.smollm2()), context_length=256, slots=1)
    answering = backend.chat(asking("Tell a story.", max_tokens=None), never)
    next(answering)
    backend._engine.close()
    refused(lambda: collect(answering), "cancelled")


def test_progress_is_told_and_never_goes_back():
    needs_engine("llama_cpp")
    backend, told = LlamaCpp(), []
    loaded = backend.load(
        spec_of(artifact_of(gguf_models.smollm2()), context_length=256, slots=1), told.append
    )
    backend.close()
    assert told == sorted(told) and told[-1] == 1.0
    assert loaded.tasks == (Task.CHAT, Task.COMPLETE) and loaded.slots == 1


def test_a_wrong_option_is_refused_by_name(load):
    artifact = artifact_of(gguf_models.smollm2())
    for wrong in ({"n_ctx": 5}, {"cache_type_k": "q3"}, {"gpu_layers": -1}):
        (name,) = wrong
        assert name in refused(lambda wrong=wrong: load(artifact, engine=wrong))
        options = LoadOptions(engine=wrong)
        assert name in refused(lambda options=options: LlamaCpp.estimate(artifact, options))


@pytest.mark.parametrize(
    "engine",
    [
        {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
        {"cache_type_k": "bf16", "cache_type_v": "f32"},
        {"cache_type_k": "iq4_nl"},
        {"flash_attention": "off"},
        {"flash_attention": "on"},
    ],
    ids=str,
)
def test_options_reach_the_engine(load, engine, capfd):
    backend = load(artifact_of(gguf_models.smollm2()), context_length=256, slots=1, engine=engine)
    log = capfd.readouterr().err
    for option, letter in (("cache_type_k", "K"), ("cache_type_v", "V")):
        assert f"{letter} ({engine.get(option, 'f16')})" in log
    if attention := engine.get("flash_attention"):
        wanted = {"off": "disabled", "on": "enabled"}[attention]
        assert f"flash_attn            = {wanted}" in log
    assert "Tower" in chat(backend).text


def test_a_load_that_fails_says_why(load, folder, capfd):
    broken = folder / "broken.gguf"
    broken.write_bytes(gguf_models.smollm2().read_bytes()[:3_000_000])
    whole = artifact_of(gguf_models.smollm2())
    artifact = replace(whole, files=(replace(whole.files[0], path=str(broken)),))
    said = refused(lambda: load(artifact), "load_failed")
    assert str(broken) in said and "not within the file bounds" in said
    assert "error" in capfd.readouterr().err
    said = refused(lambda: load(replace(whole, chat_template="{% if %}")), "load_failed")
    assert "chat template" in said


def test_a_file_of_the_wrong_kind_is_named(load, folder):
    model = gguf_models.smollm2()
    for role in ("adapter", "mmproj"):
        said = refused(lambda role=role: load(artifact_of(model, **{role: model})), "load_failed")
        assert str(model) in said


def test_without_a_chat_template_there_is_no_chat(load):
    artifact = replace(artifact_of(gguf_models.smollm2()), chat_template="")
    fit = LlamaCpp.fit(artifact, LlamaCpp.probe(), HARDWARE)
    assert fit.tasks == (Task.COMPLETE,)
    backend = load(artifact, context_length=256, slots=1)
    assert "chat template" in refused(lambda: chat(backend))
    assert complete(backend, "The capital of France is").text.startswith(" Paris")


def test_a_template_that_reads_parts_only_gets_parts(load):
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    )
    artifact = replace(artifact_of(gguf_models.smollm2()), chat_template=template)
    backend = load(artifact, context_length=256, slots=1)
    whole = chat(backend, "Where is\nthe Eiffel Tower?")
    assert whole.usage.prompt_tokens == 10
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "the Eiffel Tower?"}]
    assert chat(backend, parts).text == whole.text


def test_an_adapter_is_used_at_its_scale(load, direct, folder):
    model, adapter = gguf_models.smollm2(), gguf_models.adapter(folder)
    plain = chat(load(artifact_of(model), context_length=256, slots=1)).text
    texts = {
        scale: chat(
            load(
                artifact_of(model, adapter=adapter),
                context_length=256,
                slots=1,
                engine={"adapter_scale": scale},
            )
        ).text
        for scale in (0, 1)
    }
    assert texts[0] == plain != texts[1]


def test_the_probe_says_what_the_build_can_do():
    needs_engine("llama_cpp")
    probe = LlamaCpp.probe()
    assert probe.available and probe.version and "CPU" in probe.devices
    assert any(name in probe.features for name in ("AVX2", "NEON"))


def test_a_build_that_can_use_a_gpu_of_this_computer_scores_more():
    probe = LlamaCpp.probe()
    artifact = artifact_of(gguf_models.smollm2())
    assert LlamaCpp.fit(artifact, probe, HARDWARE).score == 70
    gpu = Gpu(id="GPU-1", vendor="nvidia", name="NVIDIA T4")
    able = replace(probe, gpu_vendors=("nvidia",))
    fit = LlamaCpp.fit(artifact, able, replace(HARDWARE, gpus=(gpu,)))
    assert fit.score == 100 and "NVIDIA T4" in fit.reason


def test_layers_for_a_gpu_that_is_not_there_are_computed_by_the_cpu(load):
    placement = Placement(gpu_layers=99, layers=(("GPU-1", 99),), reason="a test")
    backend = load(
        artifact_of(gguf_models.smollm2()), context_length=256, slots=1, placement=placement
    )
    assert "Paris" in chat(backend).text


# embeddings


TEXTS = ("A dog runs after a ball.", "A puppy is chasing a toy.", "Stock prices fell sharply.")


def vector(raw: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(raw) // 4}f", raw)


def dot(one, other) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def embedder(folder):
    needs_engine("llama_cpp")
    backend = LlamaCpp()
    artifact = artifact_of(gguf_models.embedder(folder))
    loaded = backend.load(spec_of(artifact, context_length=512, slots=2), lambda _: None)
    assert loaded.tasks == (Task.EMBED,)
    yield backend
    backend.close()


def embed(backend: LlamaCpp, *texts: str, cancelled=never, **fields: Any):
    return backend.embed(EmbedRequest(inputs=texts, **fields), cancelled)


def test_vectors_are_those_of_the_engine_called_directly(embedder, direct, folder):
    llama = direct(folder / "minilm-f16.gguf", n_ctx=512, n_batch=512, n_ubatch=512, embedding=True)
    found = embed(embedder, *TEXTS)
    assert found.dimensions == 384
    assert found.usage.prompt_tokens == sum(len(llama.tokenize(t.encode())) for t in TEXTS)
    for raw, text in zip(found.vectors, TEXTS, strict=True):
        own = llama.embed(text, normalize=True)
        assert dot(vector(raw), own) == pytest.approx(1, abs=1e-4)
        assert dot(vector(raw), vector(raw)) == pytest.approx(1, abs=1e-5)
    near, far = vector(found.vectors[1]), vector(found.vectors[2])
    assert dot(vector(found.vectors[0]), near) > 0.5 > dot(vector(found.vectors[0]), far)


def test_many_texts_of_many_requests_keep_their_order(embedder):
    alone = {n: vector(embed(embedder, f"number {n}").vectors[0]) for n in range(0, 80, 8)}
    results = at_once([lambda: embed(embedder, *(f"number {n}" for n in range(80))).vectors] * 2)
    for vectors in results:
        assert len(vectors) == 80
        for n, expected in alone.items():
            assert dot(vector(vectors[n]), expected) == pytest.approx(1, abs=1e-4)


def test_fewer_dimensions_are_the_first_ones(embedder):
    whole = vector(embed(embedder, TEXTS[0]).vectors[0])
    short = embed(embedder, TEXTS[0], dimensions=64)
    assert short.dimensions == 64
    length = math.sqrt(dot(whole[:64], whole[:64]))
    assert vector(short.vectors[0]) == pytest.approx([n / length for n in whole[:64]], abs=1e-5)
    assert "385" in refused(lambda: embed(embedder, TEXTS[0], dimensions=385))


def test_a_text_that_is_too_long_is_refused_or_cut(embedder):
    long = "cat " * 600
    said = refused(lambda: embed(embedder, TEXTS[0], long), "context_length_exceeded")
    assert "602" in said and "512" in said
    cut = embed(embedder, long, truncate=True)
    assert cut.usage.prompt_tokens == 512
    same = embed(embedder, "cat " * 510)
    assert dot(vector(cut.vectors[0]), vector(same.vectors[0])) == pytest.approx(1, abs=1e-4)
    assert "empty" in refused(lambda: embed(embedder, ""))


def test_embedding_ends_in_the_middle_of_a_batch(embedder):
    asked = iter([False] * 20)
    refused(
        lambda: embed(embedder, *["cat " * 500] * 40, cancelled=lambda: next(asked, True)),
        "cancelled",
    )
    assert embed(embedder, TEXTS[0]).dimensions == 384


def test_a_model_that_embeds_does_not_chat(embedder, backend):
    refused(lambda: chat(embedder), "engine_error")
    refused(lambda: embed(backend, TEXTS[0]), "engine_error")


# reranking

QUERY = "What does a dog eat?"
DOCUMENTS = ("Dogs eat meat.", "Stock prices fell.", "The moon.", "Dogs eat meat.")


def test_scores_are_those_of_the_engine_called_directly(load, direct, folder):
    import llama_cpp

    path = gguf_models.reranker(folder)
    backend = load(artifact_of(path), context_length=512, slots=2)
    llama = direct(
        path,
        n_ctx=512,
        n_batch=512,
        n_ubatch=512,
        embedding=True,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_RANK,
    )
    found = backend.rerank(RerankRequest(query=QUERY, documents=DOCUMENTS), never)
    assert found.scores[0] == found.scores[3]
    assert len({round(score, 2) for score in found.scores}) == 3
    assert found.scores == pytest.approx([own_score(llama, text) for text in DOCUMENTS], abs=1e-4)
    long = RerankRequest(query=QUERY, documents=("cat " * 600,))
    assert "512" in refused(lambda: backend.rerank(long, never), "context_length_exceeded")
    cut = backend.rerank(replace(long, truncate=True), never)
    assert cut.usage.prompt_tokens == 512
    refused(lambda: backend.rerank(long, never), "context_length_exceeded")
    refused(lambda: backend.rerank(replace(long, truncate=True), lambda: True), "cancelled")


def test_a_template_of_the_model_s_own_says_what_a_reranker_reads(load, folder):
    """No small model has such a template; what it does to tokens needs none."""
    backend = load(artifact_of(gguf_models.reranker(folder)), context_length=512, slots=1)
    texts, tokenize = backend._texts, backend._model.vocabulary.tokenize
    texts._template = "Query: {query} Document: {document} Relevant:"
    whole = tokenize(f"Query: {QUERY} Document: Dogs eat meat. Relevant:", add_special=False)
    assert texts.pair(QUERY, "Dogs eat meat.", truncate=False) == whole
    cut = texts.pair(QUERY, "cat " * 600, truncate=True)
    assert len(cut) == 512 and cut[-2:] == whole[-2:]


def own_score(llama: Any, document: str) -> float:
    """Return what the engine makes of [CLS] query [SEP] document [SEP]."""
    import llama_cpp

    asked, told = (llama.tokenize(text.encode()) for text in (QUERY, document))
    llama._batch.reset()
    llama._batch.add_sequence(asked + told[1:], 0, logits_all=True)
    llama._ctx.decode(llama._batch)
    return llama_cpp.llama_get_embeddings_seq(llama._ctx.ctx, 0)[0]


# images


def png(red: int, green: int, blue: int, *, side: int = 40) -> dict[str, Any]:
    """Return a part of a message: a square of stripes of a color and black."""
    color, black = bytes((red, green, blue)), bytes(3)
    rows = b"".join(b"\0" + (color if row % 8 < 4 else black) * side for row in range(side))
    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        raw += struct.pack(">I", len(data)) + name + data
        raw += struct.pack(">I", zlib.crc32(name + data))
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    return {"type": "image_url", "image_url": {"url": url}}


RED, BLUE = png(255, 0, 0), png(0, 0, 255)
WHAT = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def seeing(folder):
    needs_engine("llama_cpp")
    backend = LlamaCpp()
    artifact = artifact_of(gguf_models.smollm2(), mmproj=gguf_models.image_encoder(folder))
    loaded = backend.load(spec_of(artifact), lambda _: None)
    assert Task.VISION in loaded.tasks
    yield backend
    backend.close()


def test_images_are_seen_and_counted(seeing):
    none = chat(seeing, [WHAT])
    red, blue, again = (chat(seeing, [image, WHAT]) for image in (RED, BLUE, RED))
    assert red.text == again.text != blue.text
    assert red.usage.prompt_tokens == none.usage.prompt_tokens + gguf_models.IMAGE_TOKENS
    two = chat(seeing, [RED, BLUE, WHAT])
    assert two.usage.prompt_tokens == red.usage.prompt_tokens + gguf_models.IMAGE_TOKENS
    assert chat(seeing, [BLUE, RED, WHAT]).text != two.text


def test_only_the_text_before_an_image_is_kept(seeing):
    first = chat(seeing, [WHAT, RED])
    second = chat(seeing, [WHAT, RED])
    assert second.text == first.text
    assert 20 < second.usage.cached_tokens < first.usage.prompt_tokens - gguf_models.IMAGE_TOKENS


def test_images_and_text_share_batches(seeing):
    alone = [chat(seeing, content).text for content in (EIFFEL, [RED, WHAT], [BLUE, WHAT])]
    calls = [lambda c=c: chat(seeing, c).text for c in (EIFFEL, [RED, WHAT], [BLUE, WHAT])]
    assert at_once(calls) == alone


def test_the_mark_of_an_image_in_a_text_is_text(seeing):
    assert chat(seeing, [{"type": "text", "text": "<__media__>"}, RED, WHAT]).text


def test_what_is_no_image_is_refused(seeing, backend):
    broken = {"type": "image_url", "image_url": {"url": RED["image_url"]["url"][:-80]}}
    assert "image 2" in refused(lambda: chat(seeing, [RED, broken, WHAT]))
    assert "16 images" in refused(lambda: chat(seeing, [RED] * 17))
    assert "input_audio" in refused(lambda: chat(seeing, [{"type": "input_audio"}]))
    assert "image_url" in refused(lambda: chat(backend, [RED, WHAT]))
    assert "1024" in refused(
        lambda: chat(seeing, [RED, {"type": "text", "text": "cat " * 1000}]),
        "context_length_exceeded",
    )
