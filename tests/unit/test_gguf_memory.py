"""What a GGUF load takes, from headers of models as they are published.

The numbers of layers, heads and widths are those of the models' own configurations; the sizes that
they must give were computed by hand, or are what llama.cpp itself reports for such a model.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

import pytest
from computers import see
from hypothesis import given
from hypothesis import strategies as st

from backends import gguf
from backends.contract import Artifact, LoadOptions, ModelFile
from backends.gguf import compute, images, memory
from backends.gguf.cache import cache, recurrent_layers, window_length
from backends.llama_cpp.model import FOOTPRINT as LLAMA_CPP
from backends.xllamacpp.parameters import FOOTPRINT as XLLAMACPP

KIB, MIB, GIB = 1024, 1024**2, 1024**3


def artifact(architecture: str, facts: dict[str, Any], **fields: Any) -> Artifact:
    """Return an artifact with these header facts; those with a dot before them have full names."""
    named = {k[1:] if k[0] == "." else f"{architecture}.{k}": v for k, v in facts.items()}
    settings: dict[str, Any] = {"parameters": 10**9, "weights_bytes": GIB, "context_length": 0}
    return Artifact(
        format="gguf",
        files=(ModelFile(path="/m.gguf", size_bytes=1, mtime_ns=1, sha256=""),),
        architecture=architecture,
        quantization="Q8_0",
        metadata=named,
        **settings | fields,
    )


def heads(layers: int, width: int, queries: int, keys: Any, length: int) -> dict[str, Any]:
    return {
        "block_count": layers,
        "embedding_length": width,
        "attention.head_count": queries,
        "attention.head_count_kv": keys,
        "attention.key_length": length,
        "attention.value_length": length,
    }


QWEN3_0_6B = artifact("qwen3", heads(28, 1024, 16, 8, 128) | {"feed_forward_length": 3072})
FALCON_7B = artifact(
    "falcon",
    {
        "block_count": 32,
        "embedding_length": 4544,
        "attention.head_count": 71,
        "attention.head_count_kv": 1,
    },
)
GEMMA3_1B = artifact("gemma3", heads(26, 1152, 4, 1, 256) | {"attention.sliding_window": 512})
DEEPSEEK_V2_LITE = artifact(
    "deepseek2",
    heads(27, 2048, 16, 1, 0)
    | {
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "attention.kv_lora_rank": 512,
    },
)
MAMBA_130M = artifact(
    "mamba",
    {
        "block_count": 24,
        "embedding_length": 768,
        "attention.head_count": 0,
        "feed_forward_length": 0,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 1536,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 48,
    },
)


def kept(model: Artifact, context: int, *, slots: int = 1, batch: int = 64, **settings: Any):
    full_windows = settings.pop("full_windows", False)
    return cache(
        model,
        settings,
        context_length=context,
        slots=slots,
        batch=batch,
        full_windows=full_windows,
    )


# keys and values


def test_grouped_queries_share_keys():
    # 28 layers × 8 heads × (128 + 128) × 2 bytes
    assert gguf.kv_bytes_per_token(QWEN3_0_6B) == 114_688
    assert sum(kept(QWEN3_0_6B, 4096).layers) == 448 * MIB


def test_all_queries_of_a_layer_may_share_one_key():
    assert gguf.kv_bytes_per_token(FALCON_7B) == 32 * (64 + 64) * 2


def test_every_slot_has_its_own():
    one, four = (sum(kept(QWEN3_0_6B, 2048, slots=n).layers) for n in (1, 4))
    assert four == 4 * one


@pytest.mark.parametrize(("context", "cells"), [(1, 256), (256, 256), (257, 512), (4096, 4096)])
def test_a_cache_is_as_long_as_a_multiple_of_256(context, cells):
    assert sum(kept(QWEN3_0_6B, context).layers) == 114_688 * cells


@pytest.mark.parametrize(
    ("kind", "bits"), [("f32", 32), ("f16", 16), ("bf16", 16), ("q8_0", 8.5), ("q4_0", 4.5)]
)
def test_elements_are_of_the_type_that_is_asked_for(kind, bits):
    both = {"cache_type_k": kind, "cache_type_v": kind}
    assert gguf.kv_bytes_per_token(QWEN3_0_6B, both) == 114_688 * bits / 16
    keys = {"cache_type_k": kind}
    assert gguf.kv_bytes_per_token(QWEN3_0_6B, keys) == 57_344 * bits / 16 + 57_344


def test_layers_without_kv_heads_keep_nothing():
    facts = heads(4, 512, 8, [2, 0, 4, 0], 64)
    sizes = kept(artifact("deci", facts), 256).layers
    assert sizes == (2 * 256 * 256, 0, 4 * 256 * 256, 0)


def test_without_flash_attention_all_values_are_as_wide_as_the_widest():
    model = artifact("deci", heads(2, 512, 8, [2, 4], 64))
    with_it, without = (
        sum(kept(model, 256, flash_attention=choice).layers) for choice in ("auto", "off")
    )
    assert with_it == (2 + 4) * 2 * 128 * 256
    assert without == with_it + 2 * 128 * 256


def test_latent_attention_keeps_one_short_key_for_all_heads():
    # 27 layers × (512 of the latent space + 64 with a position) × 2 bytes, and no values
    assert gguf.kv_bytes_per_token(DEEPSEEK_V2_LITE) == 27 * 576 * 2


def test_an_older_file_of_such_a_model_has_keys_and_values_for_each_head():
    facts = heads(27, 2048, 16, 16, 0) | {
        "attention.key_length": 192,
        "attention.value_length": 128,
    }
    assert gguf.kv_bytes_per_token(artifact("deepseek2", facts)) == 27 * 16 * (192 + 128) * 2


def test_layers_that_only_guess_ahead_keep_nothing():
    facts = heads(47, 4096, 96, 8, 128) | {"nextn_predict_layers": 1}
    assert gguf.kv_bytes_per_token(artifact("glm4moe", facts)) == 46 * 8 * 256 * 2


def test_later_layers_may_use_the_keys_of_earlier_ones():
    facts = heads(35, 2048, 8, 2, 256) | {"attention.sliding_window": 512}
    sizes = kept(artifact("gemma3n", facts), 512).layers
    assert all(sizes[:20]) and not any(sizes[20:])


def test_encoders_keep_nothing():
    assert kept(artifact("bert", heads(12, 768, 12, 12, 64)), 512).layers == (0,) * 12


# windows


def test_a_window_needs_room_for_itself_and_a_batch():
    sizes = kept(GEMMA3_1B, 4096).layers
    each = (256 + 256) * 2
    full = [layer for layer, size in enumerate(sizes) if size == 4096 * each]
    assert full == [5, 11, 17, 23]  # the last of six
    assert {size for layer, size in enumerate(sizes) if layer not in full} == {768 * each}
    assert kept(GEMMA3_1B, 4096, batch=256).layers[0] == 768 * each
    assert kept(GEMMA3_1B, 4096, batch=257).layers[0] == 1024 * each


def test_a_context_shorter_than_the_window_is_all_there_is():
    assert len(set(kept(GEMMA3_1B, 512).layers)) == 1


def test_an_engine_may_keep_the_whole_context_for_windows_too():
    assert sum(kept(GEMMA3_1B, 4096, full_windows=True).layers) == 26 * 4096 * 1024


@pytest.mark.parametrize(
    ("architecture", "facts", "full"),
    [
        ("gemma2", {}, [1, 3, 5, 7]),
        ("gpt-oss", {"attention.sliding_window": 128}, [1, 3, 5, 7]),
        ("cohere2", {"attention.sliding_window": 4096}, [3, 7]),
        ("smallthinker", {"attention.sliding_window": 4096}, [0, 4]),
        ("llama4", {}, [3, 7]),
        ("gemma3", {"attention.sliding_window": 512, "attention.sliding_window_pattern": 2}, None),
        (
            "gemma4",
            {
                "attention.sliding_window": 512,
                "attention.sliding_window_pattern": [True, True, True, False] * 2,
            },
            [3, 7],
        ),
    ],
)
def test_which_layers_have_windows(architecture, facts, full):
    model = artifact(architecture, heads(8, 512, 4, 2, 64) | facts)
    sizes = kept(model, 32_768).layers
    longest = [layer for layer, size in enumerate(sizes) if size == max(sizes)]
    assert longest == (full or [1, 3, 5, 7])
    assert min(sizes) < max(sizes)


@pytest.mark.parametrize(
    ("architecture", "facts"),
    [
        ("gemma3", {}),  # the first files had no such key
        ("llama4", {"attention.sliding_window": 0}),
        ("phi3", {"attention.sliding_window": 2047}),  # llama.cpp looks back all the way
        ("llama", {"attention.sliding_window": 4096}),
        ("exaone4", {"attention.sliding_window": 4096}),  # with fewer than 64 layers
    ],
)
def test_which_models_have_none(architecture, facts):
    model = artifact(architecture, heads(8, 512, 4, 2, 64) | facts)
    assert window_length(model) == 0
    assert len(set(kept(model, 32_768).layers)) == 1


def test_heads_of_layers_with_windows_may_be_shorter():
    facts = heads(2, 512, 4, 1, 512) | {
        "attention.sliding_window": 1024,
        "attention.sliding_window_pattern": [True, False],
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
    }
    assert kept(artifact("gemma4", facts), 256).layers == (256 * 1024, 256 * 2048)


# states


def test_a_recurrent_model_keeps_as_much_for_any_context():
    # a layer: (3 columns of 1536 for the convolution + 16 × 1536 of state) × 4 bytes
    for context in (512, 32_768):
        sizes = kept(MAMBA_130M, context, slots=2).layers
        assert sizes == (2 * 4 * (3 * 1536 + 16 * 1536),) * 24
    assert gguf.kv_bytes_per_token(MAMBA_130M) == 0


def test_rwkv_keeps_two_tokens_and_a_matrix_for_each_head():
    facts = {"block_count": 3, "embedding_length": 768, "wkv.head_size": 64}
    model = artifact("rwkv7", facts)
    assert kept(model, 4096).layers == (4 * 768 * (2 + 64),) * 3


def test_of_a_hybrid_some_layers_attend_and_some_have_a_state():
    facts = heads(4, 1024, 16, [0, 0, 8, 0], 64) | {"shortconv.l_cache": 3}
    model = artifact("lfm2", facts)
    assert recurrent_layers(model) == [True, True, False, True]
    state, keys = 2 * 1024 * 4, 8 * 128 * 2 * 512
    assert kept(model, 512).layers == (state, state, keys, state)


def test_of_some_hybrids_one_layer_of_four_attends():
    facts = heads(8, 2048, 16, 2, 256) | {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 4096,
        "ssm.state_size": 128,
        "ssm.group_count": 16,
    }
    model = artifact("qwen3next", facts)
    assert recurrent_layers(model) == [True, True, True, False] * 2
    listed = {"qwen3next.attention.recurrent_layers": [True, False] * 4}
    assert recurrent_layers(replace(model, metadata=model.metadata | listed)) == [True, False] * 4
    state = 4 * (3 * (4096 + 2 * 16 * 128) + 128 * 4096)
    assert kept(model, 256).layers[0] == state


def test_falcon_h1_has_both_in_every_layer():
    facts = heads(2, 1024, 8, 2, 64) | {"ssm.inner_size": 1536, "ssm.state_size": 128}
    sizes = kept(artifact("falcon-h1", facts), 256).layers
    assert sizes == (2 * 128 * 2 * 256 + 4 * 1536 * 128,) * 2


def test_nemotron_s_feed_forward_layers_have_neither():
    facts = heads(3, 1024, 8, [0, 0, 2], 64) | {
        "feed_forward_length": [0, 4096, 0],
        "ssm.inner_size": 2048,
        "ssm.state_size": 128,
    }
    assert recurrent_layers(artifact("nemotron_h", facts)) == [True, False, False]


def test_what_can_t_be_cut_back_is_kept_a_second_time_where_the_engine_does_so():
    window = 22 * 512 * 1024  # the layers with windows, of one conversation
    assert kept(GEMMA3_1B, 4096, slots=4).rewound == window
    assert kept(GEMMA3_1B, 4096, full_windows=True).rewound == 0
    assert kept(QWEN3_0_6B, 4096).rewound == 0
    assert kept(MAMBA_130M, 4096, slots=4).rewound == 24 * 4 * (3 + 16) * 1536
    options = LoadOptions(context_length=4096, slots=4)
    with_copies = gguf.estimate(GEMMA3_1B, options, XLLAMACPP, max_slots=8)
    none = gguf.estimate(GEMMA3_1B, options, replace(XLLAMACPP, checkpoints=0), max_slots=8)
    more = with_copies.parts["kv_cache"] - none.parts["kv_cache"]
    assert more == 4 * XLLAMACPP.checkpoints * window


# compute


def test_more_tokens_at_a_time_take_more():
    sizes = [
        compute.graph_bytes(QWEN3_0_6B, {}, batch=n, longest=4096, slots=1) for n in (8, 64, 256)
    ]
    # a token: four residuals; 16 queries three times, 8 keys and values twice; and the mask
    floats = 4 * 1024 + 3 * 16 * 128 + 2 * 8 * (128 + 128)
    assert sizes[1] - sizes[0] == 56 * (4 * floats + 2 * 4096)
    assert sizes == sorted(sizes)


def test_without_flash_attention_scores_are_written_out():
    with_it, without = (
        compute.graph_bytes(
            QWEN3_0_6B, {"flash_attention": choice}, batch=64, longest=8192, slots=1
        )
        for choice in ("auto", "off")
    )
    assert without - with_it == 64 * 8192 * (4 * (1 + 16) - 2)


def test_a_model_without_a_gate_holds_less():
    facts = {"block_count": 12, "embedding_length": 768, "feed_forward_length": 3072}
    facts |= {"attention.head_count": 12}
    plain, gated = (
        compute.graph_bytes(artifact(name, facts), {}, batch=1, longest=0, slots=1)
        for name in ("gpt2", "qwen2")
    )
    assert gated - plain == 4 * 3072


def test_tokens_of_experts_are_counted_for_each_expert_that_is_used():
    facts = heads(4, 1024, 16, 4, 64) | {
        "feed_forward_length": 1024,
        "expert_count": 64,
        "expert_used_count": 8,
        "expert_feed_forward_length": 768,
    }
    model = artifact("qwen3moe", facts)
    size = compute.graph_bytes(model, {}, batch=1, longest=0, slots=1)
    assert size == 4 * (4 * 1024 + 8 * (3 * 768 + 2 * 1024) + 2 * 64)


def test_every_thread_has_work_space():
    one, four = (compute.work_bytes(QWEN3_0_6B, batch=64, threads=n) for n in (1, 4))
    assert four - one == 3 * 4 * 64 * (4 * 128 + 128)


# the rest


def vocabulary(tokens: int, merges: int = 0, model: str = "gpt2") -> dict[str, Any]:
    return {
        ".tokenizer.ggml.tokens.length": tokens,
        ".tokenizer.ggml.merges.length": merges,
        ".tokenizer.ggml.model": model,
    }


@pytest.mark.parametrize(
    ("tokens", "merges", "model", "measured"),
    [
        # llama.cpp's own vocabularies (its `models/ggml-vocab-*.gguf`), loaded by llama_cpp
        (32_000, 0, "llama", 5_599_232),  # llama-spm
        (30_522, 0, "bert", 5_275_648),  # bert-bge
        (50_257, 50_000, "gpt2", 17_756_160),  # gpt-2
        (49_152, 48_872, "gpt2", 17_743_872),  # starcoder
        (100_008, 99_743, "gpt2", 36_917_248),  # aquila: of long texts
        (128_256, 280_147, "gpt2", 55_087_104),  # llama-bpe
        (151_936, 151_387, "gpt2", 49_033_216),  # qwen2
        (256_000, 253_333, "gpt2", 84_447_232),  # command-r
        (250_048, 0, "t5", 132_636_672),  # nomic-bert-moe
    ],
)
def test_a_vocabulary_takes_what_was_measured(tokens, merges, model, measured):
    some = artifact("llama", vocabulary(tokens, merges, model))
    off = memory.vocabulary_bytes(some, LLAMA_CPP) - measured
    assert -3 * MIB < off < max(3 * MIB, measured // 3)


def total(model: Artifact, footprint: gguf.Footprint = LLAMA_CPP, **options: Any):
    given_options = {"context_length": 512, "slots": 1} | options
    return gguf.estimate(model, LoadOptions(**given_options), footprint, max_slots=64)


def test_every_slot_has_outputs_and_candidates():
    model = replace(
        QWEN3_0_6B, metadata=QWEN3_0_6B.metadata | {"tokenizer.ggml.tokens.length": 1000}
    )
    one, two = (total(model, XLLAMACPP, slots=n).parts["runtime"] for n in (1, 2))
    assert two - one == (1000 * (4 + 12) + XLLAMACPP.slot_bytes + 512 * XLLAMACPP.cell_bytes)


def test_weights_that_the_cpu_lays_out_anew_are_there_twice():
    sizes = {"modeld.matrix_bytes.Q4_K": 600 * MIB, "modeld.matrix_bytes.Q6_K": 300 * MIB}
    model = replace(QWEN3_0_6B, metadata=QWEN3_0_6B.metadata | sizes)
    on_x86 = replace(LLAMA_CPP, repacked_types=gguf.repacked_types("x86_64"))
    on_arm = replace(LLAMA_CPP, repacked_types=gguf.repacked_types("aarch64"))
    assert total(model, on_x86).parts["weights"] == GIB + 600 * MIB
    assert total(model, on_arm).parts["weights"] == GIB + 900 * MIB


def test_they_are_not_where_a_gpu_computes(tmp_path):
    sizes = {"modeld.matrix_bytes.Q4_0": 600 * MIB, "modeld.layer_bytes": [38 * MIB] * 28}
    model = replace(QWEN3_0_6B, metadata=QWEN3_0_6B.metadata | sizes, weights_bytes=1100 * MIB)
    gpus = see(tmp_path, "two_nvidia").gpus
    some = replace(LLAMA_CPP, repacked_types=frozenset(["Q4_0"]))
    settled = total(model, some, gpus=gpus)
    assert settled.placement.gpu_layers == 29
    (on_gpu,) = settled.gpu_parts.values()
    assert on_gpu["weights"] == 28 * 38 * MIB and settled.parts["weights"] == 36 * MIB
    assert on_gpu["kv_cache"] == 114_688 * 512 and settled.parts["kv_cache"] == 0
    partly = total(model, some, gpus=gpus, engine={"gpu_layers": 15})
    (on_gpu,) = partly.gpu_parts.values()
    assert partly.parts["weights"] + on_gpu["weights"] == 1100 * MIB
    assert partly.parts["kv_cache"] == on_gpu["kv_cache"] == 114_688 * 512 // 2


def test_adapters_and_image_encoders_are_parts_of_their_own():
    facts = {
        "modeld.adapter_bytes": 5 * MIB,
        "modeld.mmproj_bytes": 100 * MIB,
        "modeld.mmproj.image_size": 336,
        "modeld.mmproj.patch_size": 14,
        "modeld.mmproj.embedding_length": 1024,
        "modeld.mmproj.feed_forward_length": 4096,
    }
    model = replace(QWEN3_0_6B, metadata=QWEN3_0_6B.metadata | facts)
    found = total(model)
    assert found.parts["adapters"] == 5 * MIB
    assert found.parts["mmproj"] == 100 * MIB + images.encoding_bytes(model)
    # 24 × 24 patches, each with 4 × 1024 and 2 × 4096 floats and its pixels twice
    floats = 576 * (4 * 1024 + 2 * 4096 + 2 * 3 * 14 * 14)
    assert images.encoding_bytes(model) == 12 * MIB + 4 * floats
    assert found.total_bytes == sum(found.parts.values())
    assert "mmproj" not in total(QWEN3_0_6B).parts and "adapters" not in total(QWEN3_0_6B).parts


def test_an_encoder_of_images_as_they_come_is_booked_for_the_largest():
    facts = {
        "modeld.mmproj_bytes": MIB,
        "modeld.mmproj.projector_type": "qwen2.5vl_merger",
        "modeld.mmproj.image_size": 560,
        "modeld.mmproj.patch_size": 14,
        "modeld.mmproj.embedding_length": 1280,
        "modeld.mmproj.feed_forward_length": 3420,
    }
    model = replace(QWEN3_0_6B, metadata=facts)
    patches = 4096 * 2 * 2
    assert images.encoding_bytes(model) > 4 * patches * (4 * 1280 + 2 * 3420)


def test_a_model_that_pools_has_room_for_logits_of_every_token():
    facts = heads(12, 384, 12, 12, 32) | {"pooling_type": 1, "feed_forward_length": 1536}
    model = artifact("bert", facts | vocabulary(30_522, model="bert"))
    found = total(model, context_length=512, slots=4)
    assert found.parts["kv_cache"] == 0
    assert found.parts["runtime"] > 4 * 512 * 30_522 + LLAMA_CPP.runtime_bytes


def test_texts_that_are_pooled_together_share_a_cache():
    model = artifact("qwen3", heads(28, 1024, 16, 8, 128) | {"pooling_type": 3})
    together = total(model, LLAMA_CPP, context_length=2048, slots=4).parts["kv_cache"]
    apart = total(model, XLLAMACPP, context_length=2048, slots=4).parts["kv_cache"]
    assert apart == 4 * together == 4 * 2048 * 114_688


def test_an_engine_s_own_runtime_is_what_differs():
    assert (
        total(QWEN3_0_6B, LLAMA_CPP).parts["kv_cache"]
        == total(QWEN3_0_6B, XLLAMACPP).parts["kv_cache"]
    )
    assert LLAMA_CPP.runtime_bytes > XLLAMACPP.runtime_bytes
    assert LLAMA_CPP.repacked_types == gguf.repacked_types(platform.machine())


VALUES = st.one_of(
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(-5, 2**32), max_size=8),
)
KEYS = st.sampled_from(
    """
    block_count embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.key_length_mla attention.kv_lora_rank attention.sliding_window
    attention.sliding_window_pattern attention.recurrent_layers attention.shared_kv_layers
    attention.indexer.key_length full_attention_interval nextn_predict_layers ssm.conv_kernel
    ssm.inner_size ssm.state_size ssm.group_count wkv.head_size shortconv.l_cache kda.head_dim
    expert_count expert_used_count pooling_type
    """.split()
)


@given(
    st.sampled_from("llama gemma3 gemma4 lfm2 mamba qwen35 nemotron_h deepseek2 bert".split()),
    st.dictionaries(KEYS, VALUES, max_size=8),
)
def test_no_header_breaks_an_estimate_or_makes_it_less_than_the_weights(architecture, facts):
    """Headers are untrusted, and what is booked for a load rests on them."""
    model = artifact(architecture, facts)
    for footprint in (LLAMA_CPP, XLLAMACPP):
        found = gguf.estimate(model, LoadOptions(context_length=4096), footprint, max_slots=64)
        assert min(found.parts.values()) >= 0
        assert found.total_bytes >= model.weights_bytes
