"""What GGML files of each architecture hold: header numbers, vocabulary, tensors and their shapes.

Facts only, as ctransformers 0.2.27 reads them (github.com/marella/ctransformers, `models/`). The
files themselves do not say which architecture they are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How files of some architectures are laid out, after the magic number and the version.

    `numbers` are the 32-bit integers of the header, in order; `-name` is one that is not kept. Then
    come the vocabulary (its size again if `counts_twice`, a float after each token if `scored`,
    pairs of strings if `merges`) and the tensors, each padded to 32 bytes if `aligned`.

    `tensors` has names, `{}` for the number of the layer, and shapes, in letters for the header's
    numbers: E embedding, V vocabulary, C context; `F` and `K` are whatever the file has. What is in
    `optional` may be missing. `uniform` files have one type for all matrices; others mix them.
    `wide` engines multiply sizes as 64-bit numbers.
    """

    architectures: tuple[str, ...]
    numbers: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]
    layer_tensors: Mapping[str, tuple[str, ...]]
    optional: frozenset[str] = frozenset()
    counts_twice: bool = False
    scored: bool = False
    merges: bool = False
    aligned: bool = False
    uniform: bool = True
    wide: bool = False


# A vocabulary that has one of these tokens belongs to the architecture: these two are laid out like
# gpt2 and gpt_neox, and differ in what the engine takes for special tokens.
MARKERS = {
    "starcoder": frozenset({b"<fim_prefix>", b"<fim-prefix>", b"<|system|>"}),
    "dolly-v2": frozenset({b"### End"}),
}

# Other names of architectures, without punctuation: those of Hugging Face's `model_type` too.
ALIASES = {
    "gptbigcode": "starcoder",
    "dollyv2": "dolly-v2",
    "gptneox": "gpt_neox",
    "refinedweb": "falcon",
    "refinedwebmodel": "falcon",
}

_GPT2 = Layout(
    architectures=("gpt2", "starcoder"),
    numbers=("vocabulary", "context", "embedding", "heads", "layers", "file_type"),
    counts_twice=True,
    tensors={
        "model/ln_f/g": ("E",),
        "model/ln_f/b": ("E",),
        "model/wte": ("E", "V"),
        "model/wpe": ("E", "C"),
        "model/lm_head": ("E", "V"),
    },
    layer_tensors={
        "model/h{}/ln_1/g": ("E",),
        "model/h{}/ln_1/b": ("E",),
        "model/h{}/ln_2/g": ("E",),
        "model/h{}/ln_2/b": ("E",),
        "model/h{}/attn/c_attn/w": ("E", "3E"),
        "model/h{}/attn/c_attn/b": ("3E",),
        "model/h{}/attn/c_proj/w": ("E", "E"),
        "model/h{}/attn/c_proj/b": ("E",),
        "model/h{}/mlp/c_fc/w": ("E", "4E"),
        "model/h{}/mlp/c_fc/b": ("4E",),
        "model/h{}/mlp/c_proj/w": ("4E", "E"),
        "model/h{}/mlp/c_proj/b": ("E",),
    },
    optional=frozenset({"model/lm_head"}),
)

_GPTJ = Layout(
    architectures=("gptj",),
    numbers=("vocabulary", "context", "embedding", "heads", "layers", "rotary", "file_type"),
    counts_twice=True,
    tensors={
        "transformer.wte.weight": ("E", "V"),
        "transformer.ln_f.weight": ("E",),
        "transformer.ln_f.bias": ("E",),
        "lm_head.weight": ("E", "V"),
        "lm_head.bias": ("V",),
    },
    layer_tensors={
        "transformer.h.{}.ln_1.weight": ("E",),
        "transformer.h.{}.ln_1.bias": ("E",),
        "transformer.h.{}.attn.q_proj.weight": ("E", "E"),
        "transformer.h.{}.attn.k_proj.weight": ("E", "E"),
        "transformer.h.{}.attn.v_proj.weight": ("E", "E"),
        "transformer.h.{}.attn.out_proj.weight": ("E", "E"),
        "transformer.h.{}.mlp.fc_in.weight": ("E", "4E"),
        "transformer.h.{}.mlp.fc_in.bias": ("4E",),
        "transformer.h.{}.mlp.fc_out.weight": ("4E", "E"),
        "transformer.h.{}.mlp.fc_out.bias": ("E",),
    },
)

_GPT_NEOX = Layout(
    architectures=("gpt_neox", "dolly-v2"),
    numbers=(
        *("vocabulary", "context", "embedding", "heads", "layers", "rotary"),
        *("parallel", "file_type"),
    ),
    tensors={
        "gpt_neox.embed_in.weight": ("E", "V"),
        "gpt_neox.final_layer_norm.weight": ("E",),
        "gpt_neox.final_layer_norm.bias": ("E",),
        "embed_out.weight": ("E", "V"),
    },
    layer_tensors={
        "gpt_neox.layers.{}.input_layernorm.weight": ("E",),
        "gpt_neox.layers.{}.input_layernorm.bias": ("E",),
        "gpt_neox.layers.{}.post_attention_layernorm.weight": ("E",),
        "gpt_neox.layers.{}.post_attention_layernorm.bias": ("E",),
        "gpt_neox.layers.{}.attention.query_key_value.weight": ("E", "3E"),
        "gpt_neox.layers.{}.attention.query_key_value.bias": ("3E",),
        "gpt_neox.layers.{}.attention.dense.weight": ("E", "E"),
        "gpt_neox.layers.{}.attention.dense.bias": ("E",),
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight": ("E", "4E"),
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias": ("4E",),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight": ("4E", "E"),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias": ("E",),
    },
)

_MPT_TENSORS = {
    "transformer.wte.weight": ("E", "V"),
    "transformer.norm_f.weight": ("E",),
}
_MPT_LAYER_TENSORS = {
    "transformer.blocks.{}.norm_1.weight": ("E",),
    "transformer.blocks.{}.attn.Wqkv.weight": ("E", "3E"),
    "transformer.blocks.{}.attn.out_proj.weight": ("E", "E"),
    "transformer.blocks.{}.norm_2.weight": ("E",),
    "transformer.blocks.{}.ffn.up_proj.weight": ("E", "4E"),
    "transformer.blocks.{}.ffn.down_proj.weight": ("4E", "E"),
}
_MPT = Layout(
    architectures=("mpt",),
    numbers=(
        *("embedding", "context", "heads", "layers", "vocabulary"),
        *("-alibi_bias_max", "-clip_qkv", "file_type"),  # floats
    ),
    tensors=_MPT_TENSORS,
    layer_tensors=_MPT_LAYER_TENSORS,
    wide=True,
)
_REPLIT = Layout(
    architectures=("replit",),
    numbers=("embedding", "context", "heads", "layers", "vocabulary", "file_type"),
    scored=True,
    tensors=_MPT_TENSORS,
    layer_tensors=_MPT_LAYER_TENSORS,
)


def _llama(*, aligned: bool) -> Layout:
    return Layout(
        architectures=("llama",),
        numbers=("vocabulary", "embedding", "multiple", "heads", "layers", "rotary", "file_type"),
        scored=True,
        aligned=aligned,
        uniform=False,
        wide=True,
        tensors={
            "tok_embeddings.weight": ("E", "V"),
            "norm.weight": ("E",),
            "output.weight": ("E", "V"),
        },
        layer_tensors={
            "layers.{}.attention_norm.weight": ("E",),
            "layers.{}.attention.wq.weight": ("E", "E"),
            "layers.{}.attention.wk.weight": ("E", "K"),
            "layers.{}.attention.wv.weight": ("E", "K"),
            "layers.{}.attention.wo.weight": ("E", "E"),
            "layers.{}.ffn_norm.weight": ("E",),
            "layers.{}.feed_forward.w1.weight": ("E", "F"),
            "layers.{}.feed_forward.w2.weight": ("F", "E"),
            "layers.{}.feed_forward.w3.weight": ("E", "F"),
        },
    )


def _falcon(*norms: str) -> Layout:
    """Return the layout of the variant whose layers have these norms."""
    return Layout(
        architectures=("falcon",),
        numbers=(
            *("vocabulary", "embedding", "heads", "heads_kv", "layers"),
            *("variant", "file_type", "merges"),
        ),
        scored=True,
        merges=True,
        aligned=True,
        uniform=False,
        wide=True,
        tensors={
            "transformer.word_embeddings.weight": ("E", "V"),
            "transformer.ln_f.weight": ("E",),
            "transformer.ln_f.bias": ("E",),
            "lm_head.weight": ("E", "V"),
        },
        layer_tensors={
            f"transformer.h.{{}}.{norm}.{part}": ("E",)
            for norm in norms
            for part in ("weight", "bias")
        }
        | {
            "transformer.h.{}.self_attention.query_key_value.weight": ("E", "K"),
            "transformer.h.{}.self_attention.dense.weight": ("E", "E"),
            "transformer.h.{}.mlp.dense_h_to_4h.weight": ("E", "4E"),
            "transformer.h.{}.mlp.dense_4h_to_h.weight": ("4E", "E"),
        },
    )


# By magic number (as an integer) and version; only "ggml" files have none.
LAYOUTS: dict[tuple[int, int], tuple[Layout, ...]] = {
    (0x67676D6C, 0): (_GPT2, _GPTJ, _GPT_NEOX, _MPT, _REPLIT),
    (0x67676D66, 1): (_llama(aligned=False),),
    (0x67676A74, 1): (_llama(aligned=True),),
    (0x67676A74, 2): (_llama(aligned=True),),
    (0x67676A74, 3): (_llama(aligned=True),),
    (0x67676363, 10): (_falcon("input_layernorm"), _falcon("ln_mlp", "ln_attn")),
}
MAGICS = {0x67676D6C: "ggml", 0x67676D66: "ggmf", 0x67676A74: "ggjt", 0x67676363: "ggcc"}

# What a file's type number stands for in files with one type for all matrices (enum ggml_ftype).
UNIFORM_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
}
