"""What a GGUF header means for a load: KV cache, context, slots, batches, tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import gguf
from backends.contract import (
    Artifact,
    BackendError,
    ChatRequest,
    CompleteRequest,
    LoadOptions,
    ModelFile,
    Task,
)

MIB = 1024 * 1024
FOOTPRINT = gguf.Footprint(
    runtime_bytes=20 * MIB,
    string_bytes=30,
    hole_bytes=4 * MIB,
    cell_bytes=200,
    slot_bytes=MIB // 4,
    candidates=1,
    full_windows=False,
    checkpoints=0,
    pools_together=False,
    image_batch=0,
    repacked_types=frozenset(["Q4_0"]),
)
SMOLLM2_FACTS = {
    "block_count": 30,
    "attention.head_count": 9,
    "attention.head_count_kv": 3,
    "embedding_length": 576,
}


def artifact(*, architecture: str = "llama", facts: dict[str, Any] | None = None, **fields: Any):
    """Return an artifact as large as SmolLM2-135M; `facts` are named without the architecture."""
    settings: dict[str, Any] = {
        "parameters": 134_515_008,
        "context_length": 8192,
        "weights_bytes": 94 * MIB,
    }
    settings["chat_template"] = "{{ messages }}"
    named = SMOLLM2_FACTS if facts is None else facts
    return Artifact(
        format="gguf",
        files=(ModelFile(path="/m.gguf", size_bytes=1, mtime_ns=1, sha256=""),),
        architecture=architecture,
        quantization="Q4_1",
        metadata={f"{architecture}.{key}": value for key, value in named.items()},
        **settings | fields,
    )


def estimate_of(model: Artifact, options: LoadOptions, *, max_slots: int = 64):
    return gguf.estimate(model, options, FOOTPRINT, max_slots=max_slots)


# KV cache


def test_smollm2_takes_23040_bytes_a_token():
    assert gguf.kv_bytes_per_token(artifact()) == 23_040


def test_kv_heads_may_differ_from_layer_to_layer():
    facts = SMOLLM2_FACTS | {"block_count": 4, "attention.head_count_kv": [3, 0, 1, 0]}
    assert gguf.kv_bytes_per_token(artifact(facts=facts)) == 2 * (3 + 1) * (64 + 64)


def test_without_kv_heads_in_the_header_every_head_has_its_own():
    facts = {"block_count": 2, "attention.head_count": 8, "embedding_length": 512}
    assert gguf.kv_bytes_per_token(artifact(facts=facts)) == 2 * (2 * 8) * (64 + 64)


def test_key_and_value_lengths_of_the_header_count():
    facts = SMOLLM2_FACTS | {"attention.key_length": 192, "attention.value_length": 128}
    assert gguf.kv_bytes_per_token(artifact(facts=facts)) == 2 * 30 * 3 * (192 + 128)


def test_keys_are_those_of_the_model_s_own_architecture():
    other = replace(artifact(), architecture="qwen3")
    assert gguf.kv_bytes_per_token(other) == 0
    assert gguf.kv_bytes_per_token(artifact(architecture="qwen3")) == 23_040


def test_a_header_without_facts_costs_no_kv_cache():
    assert gguf.kv_bytes_per_token(artifact(facts={})) == 0


# context


@pytest.mark.parametrize(
    ("trained", "settled"), [(8192, 4096), (4096, 4096), (2048, 2048), (0, 4096)]
)
def test_the_context_is_the_model_s_own_but_at_most_4096(trained, settled):
    model = artifact(context_length=trained)
    assert gguf.settle_context_length(model, LoadOptions()) == settled


@pytest.mark.parametrize("chosen", [512, 4096, 8192])
def test_the_user_s_context_length_stands(chosen):
    assert gguf.settle_context_length(artifact(), LoadOptions(context_length=chosen)) == chosen


def test_no_choice_reaches_beyond_what_the_model_was_trained_for():
    model = artifact(context_length=512)
    assert gguf.settle_context_length(model, LoadOptions(context_length=1024)) == 512
    unknown = artifact(context_length=0)
    assert gguf.settle_context_length(unknown, LoadOptions(context_length=9000)) == 9000


# slots


@pytest.mark.parametrize(
    ("slot_mib", "weights_mib", "slots"),
    [
        (1, 1, 4),
        (128, 1, 4),  # 4 × 128 is just the 512 MiB
        (129, 1, 2),
        (256, 1, 2),
        (257, 1, 1),
        (512, 1, 1),
        (2000, 1, 1),  # one request there must be
        (129, 1024, 2),  # half of 1 GiB is no more than 512 MiB
        (129, 1032, 4),  # 4 × 129 is just half of the weights
        (2000, 8000, 2),
        (2000, 16_000, 4),
    ],
)
def test_slots_are_the_most_of_4_2_1_whose_kv_cache_keeps_its_bound(slot_mib, weights_mib, slots):
    # 1 layer × 1 head × (128 + 128) × 2 bytes = 512 bytes a token
    facts = {"block_count": 1, "attention.head_count": 1, "embedding_length": 128}
    model = artifact(facts=facts, weights_bytes=weights_mib * MIB)
    assert gguf.settle_slots(model, LoadOptions(), slot_mib * 2048) == slots


def test_the_user_s_slots_stand_whatever_they_cost():
    assert gguf.settle_slots(artifact(), LoadOptions(slots=16), 8192) == 16


# prefill batches

PARAMETERS = st.integers(0, 10**12)
THREADS = st.integers(1, 256)


@given(PARAMETERS, THREADS)
def test_a_batch_keeps_within_its_bounds(parameters, threads):
    batch = gguf.prefill_batch(artifact(parameters=parameters), threads)
    assert 4 <= batch <= 256
    assert batch & (batch - 1) == 0


@given(st.lists(PARAMETERS, min_size=2, max_size=2).map(sorted), THREADS)
def test_a_larger_model_never_gets_a_larger_batch(parameters, threads):
    small, large = (gguf.prefill_batch(artifact(parameters=p), threads) for p in parameters)
    assert small >= large


@given(PARAMETERS, st.lists(THREADS, min_size=2, max_size=2).map(sorted))
def test_more_threads_never_get_a_smaller_batch(parameters, threads):
    model = artifact(parameters=parameters)
    few, many = (gguf.prefill_batch(model, count) for count in threads)
    assert few <= many


def test_batches_at_both_ends():
    assert gguf.prefill_batch(artifact(parameters=100_000), 2) == 256
    assert gguf.prefill_batch(artifact(parameters=70 * 10**9), 1) == 4
    # 8e9 parameters cost 16e9 operations a token: on 8 threads 0.5 s are 5 tokens, 1 s are 10
    assert gguf.prefill_batch(artifact(parameters=8 * 10**9), 8) == 4


# estimate


def test_an_estimate_settles_everything_and_counts_every_part():
    model = artifact()
    estimate = estimate_of(model, LoadOptions(threads=2))
    assert (estimate.context_length, estimate.slots) == (4096, 4)
    assert estimate.parts["weights"] == 94 * MIB
    assert estimate.parts["kv_cache"] == 23_040 * 4096 * 4
    assert estimate.parts["compute"] > 0 and estimate.parts["runtime"] > 0
    assert estimate.total_bytes == sum(estimate.parts.values())


def test_a_backend_of_one_slot_is_not_booked_for_more():
    estimate = estimate_of(artifact(), LoadOptions(slots=4), max_slots=1)
    assert estimate.slots == 1
    assert estimate.parts["kv_cache"] == 23_040 * 4096


def test_the_user_s_choice_is_what_is_estimated():
    estimate = estimate_of(artifact(), LoadOptions(context_length=512, slots=3))
    assert (estimate.context_length, estimate.slots) == (512, 3)
    assert estimate.parts["kv_cache"] == 23_040 * 512 * 3


@given(st.lists(st.integers(1, 131_072), min_size=2, max_size=2).map(sorted), st.integers(1, 8))
def test_a_longer_context_never_costs_less(lengths, slots):
    short, long = (
        estimate_of(artifact(), LoadOptions(context_length=n, slots=slots)) for n in lengths
    )
    assert short.total_bytes <= long.total_bytes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count_kv", -1_000_000),
        ("llama.attention.head_count_kv", [-5, 3]),
        ("llama.attention.head_count_kv", []),
        ("llama.attention.head_count", [-9]),
        ("llama.attention.head_count", []),
        ("llama.attention.key_length", -1_000_000),
        ("llama.embedding_length", -576),
        ("llama.embedding_length", "wide"),
        ("llama.block_count", -30),
        ("llama.block_count", "many"),
        ("tokenizer.ggml.tokens.length", -1_000_000),
    ],
)
def test_no_header_can_make_a_load_look_smaller_than_its_weights(key, value):
    """Headers are untrusted, and what is booked for a load rests on them."""
    model = artifact()
    lying = replace(model, metadata=model.metadata | {key: value})
    estimate = estimate_of(lying, LoadOptions())
    assert min(estimate.parts.values()) >= 0
    assert estimate.total_bytes >= model.weights_bytes


# tasks


def test_a_language_model_chats_and_completes():
    assert gguf.tasks(artifact()) == (Task.CHAT, Task.COMPLETE)


def test_a_model_without_a_chat_template_does_not_chat():
    assert gguf.tasks(artifact(chat_template="")) == (Task.COMPLETE,)


@pytest.mark.parametrize(
    "names", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")]
)
def test_infill_needs_all_three_of_its_tokens(names):
    ids = {f"tokenizer.ggml.{name}_token_id": 10 + n for n, name in enumerate(names)}
    model = artifact()
    whole = replace(model, metadata=model.metadata | ids)
    assert gguf.infill_tokens(whole) == (10, 11, 12)
    assert Task.INFILL in gguf.tasks(whole)
    for name in ids:
        lacking = replace(whole, metadata={k: v for k, v in whole.metadata.items() if k != name})
        assert gguf.infill_tokens(lacking) is None
        assert Task.INFILL not in gguf.tasks(lacking)


def test_images_need_an_image_encoder_among_the_files():
    encoder = ModelFile(path="/e.gguf", size_bytes=1, mtime_ns=1, sha256="", role="mmproj")
    model = artifact()
    assert Task.VISION in gguf.tasks(replace(model, files=(*model.files, encoder)))
    assert Task.VISION not in gguf.tasks(model)


@pytest.mark.parametrize(("pooling", "task"), [(1, Task.EMBED), (3, Task.EMBED), (4, Task.RERANK)])
def test_the_pooling_type_tells_embedders_from_rerankers(pooling, task):
    assert gguf.tasks(artifact(architecture="bert", facts={"pooling_type": pooling})) == (task,)


# engine options


def test_quantized_keys_and_values_take_less():
    f16 = gguf.kv_bytes_per_token(artifact())
    q8 = {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    assert gguf.kv_bytes_per_token(artifact(), q8) == f16 * 34 / 64
    assert gguf.kv_bytes_per_token(artifact(), {"cache_type_k": "f32"}) == f16 * 1.5


def test_a_model_that_reads_whole_texts_keeps_nothing():
    facts = SMOLLM2_FACTS | {"attention.causal": False, "pooling_type": 1}
    assert gguf.kv_bytes_per_token(artifact(architecture="bert", facts=facts)) == 0


def test_a_model_that_pools_reads_a_whole_text_at_once():
    embedder = artifact(facts=SMOLLM2_FACTS | {"pooling_type": 1})
    assert gguf.batch_size(embedder, 2, 512, 4) == 512
    assert gguf.batch_size(artifact(), 2, 4096, 4) == gguf.prefill_batch(artifact(), 2)
    assert gguf.batch_size(artifact(parameters=10**12), 1, 4096, 16) == 16  # a token for each slot


@pytest.mark.parametrize(
    ("given_options", "words"),
    [
        ({"n_ctx": 5}, "'n_ctx'; it has: adapter_scale, cache_type_k"),
        ({"cache_type_k": "q3"}, "cache_type_k of engine is 'q3', but must be one of f32, f16"),
        ({"adapter_scale": "much"}, "adapter_scale .* a number of at least -10 and at most 10"),
        ({"adapter_scale": True}, "adapter_scale of engine is True"),
        ({"gpu_layers": -1}, "gpu_layers of engine is -1"),
        ({"cache_type_v": "q8_0", "flash_attention": "off"}, "needs flash attention"),
    ],
)
def test_a_wrong_option_is_refused_by_name(given_options, words):
    with pytest.raises(BackendError, match=words) as refused:
        gguf.check("engine", given_options)
    assert refused.value.code == "invalid_request"


def test_right_options_pass():
    options = {"cache_type_v": "q8_0", "flash_attention": "on", "adapter_scale": 0, "gpu_layers": 0}
    assert gguf.check("engine", options) == options


# what never fits


def test_messages_that_can_never_fit_are_refused_before_they_are_tokenized():
    fits = ChatRequest(messages=({"role": "user", "content": "a" * 128 * 512},))
    gguf.refuse_hopeless(fits, 512)
    hopeless = ChatRequest(messages=({"role": "user", "content": "a"}, *fits.messages))
    with pytest.raises(BackendError, match="65537 characters.*512 tokens") as refused:
        gguf.refuse_hopeless(hopeless, 512)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.tokens == 513  # at least


def test_the_texts_of_all_parts_and_of_a_suffix_count():
    parts = [{"type": "text", "text": "a" * 65_537}, {"type": "image_url", "image_url": {}}]
    for request in (
        ChatRequest(messages=({"role": "user", "content": parts},)),
        ChatRequest(messages=({"role": "user", "content": None}, {"role": "x", "content": parts})),
        CompleteRequest(prompt="a" * 65_000, suffix="b" * 537),
        ChatRequest(
            messages=({"tool_calls": [{"function": {"name": "f", "arguments": "a" * 65_536}}]},)
        ),
        ChatRequest(messages=(), tools=({"description": "a" * 65_518},)),
    ):
        with pytest.raises(BackendError, match="65537 characters"):
            gguf.refuse_hopeless(request, 512)
