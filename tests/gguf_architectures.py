"""Writes random language models of several architectures, as large as small real ones.

They say nonsense. They are for what depends on a model's shape alone: which memory an engine takes.
Widths, heads and vocabularies are those of small published models; there are fewer layers. Bytes
come from a fixed stream, so that a model is the same each time. The names of keys and tensors are
those that llama.cpp reads (`src/llama-arch.cpp`, `src/models/`).
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_KINDS = gguf.GGMLQuantizationType
# The fixed bytes that a block of weights begins with: scales (float16) that keep weights under 0.03.
_SCALES = {
    "Q8_0": bytes.fromhex("0008"),  # 2**-13
    "Q4_0": bytes.fromhex("0018"),  # 2**-9
    "Q4_1": bytes.fromhex("00180024"),  # 2**-9, and a minimum of 2**-6
    "Q4_K": bytes.fromhex("00020008"),  # 2**-15, and 2**-13 for the minimum
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens of four letters at most: `bpe` joins them by merges, else pieces have scores."""

    size: int
    bpe: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model: header facts without the architecture's name, and tensors with their shapes.

    `matrices` are (name, columns, rows, …) as a matrix product takes them; `vectors` are float32.
    """

    architecture: str
    vocabulary: Vocabulary
    width: int
    layers: int
    facts: dict[str, Any]
    matrices: list[tuple[Any, ...]] = field(default_factory=list)
    vectors: list[tuple[Any, ...]] = field(default_factory=list)
    tied: bool = True


def write(folder: Path, recipe: Recipe, kind: str = "Q8_0", output: str = "") -> Path:
    """Write a model with matrices of type `kind` (F16, or a type of blocks); return its path.

    `output` is another type for the table of tokens and the last matrix.
    """
    name = f"{recipe.architecture}-{kind.lower()}.gguf"
    writer = gguf.GGUFWriter(folder / name, recipe.architecture)
    writer.add_type("model")
    writer.add_context_length(recipe.facts.get("context_length", 32_768))
    writer.add_embedding_length(recipe.width)
    writer.add_block_count(recipe.layers)
    for key, value in recipe.facts.items():
        _add(writer, f"{recipe.architecture}.{key}", value)
    _add_vocabulary(writer, recipe.vocabulary)
    seeds = itertools.count(1)
    last = output or kind
    _add_matrix(
        writer, next(seeds), "token_embd.weight", last, (recipe.width, recipe.vocabulary.size)
    )
    if not recipe.tied:
        shape = (recipe.width, recipe.vocabulary.size)
        _add_matrix(writer, next(seeds), "output.weight", last, shape)
    vectors = [(name, shape, "F32") for name, *shape in recipe.vectors]
    matrices = [(name, shape, kind) for name, *shape in recipe.matrices]
    # By layers, as in real files: which pages of a file an engine keeps depends on what is between.
    for tensor, shape, own in sorted(vectors + matrices, key=lambda entry: _layer(entry[0])):
        if own == "F32":
            writer.add_tensor(tensor, np.ones(shape[::-1], np.float32))
        else:
            _add_matrix(writer, next(seeds), tensor, own, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / name


def _layer(tensor: str) -> int:
    """Return the number in `blk.N.…`; what belongs to no layer comes last."""
    return int(tensor.split(".")[1]) if tensor.startswith("blk.") else 10_000


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif key != f"{writer.arch}.context_length":
        writer.add_uint32(key, value)


def _add_matrix(
    writer: gguf.GGUFWriter, seed: int, name: str, kind: str, shape: Sequence[int]
) -> None:
    """Add a matrix whose rows have `shape[0]` numbers. Rows that no block fits are float16."""
    columns = shape[0]
    block, size = gguf.GGML_QUANT_SIZES[_KINDS[kind]]
    if kind == "F16" or columns % block:
        raw = np.random.PCG64(seed).random_raw(-(-int(np.prod(shape)) // 4)).view(np.uint16)
        halves = (raw[: int(np.prod(shape))] & 0x83FF) | 0x2400  # a sign and 2**-6 to 2**-5
        writer.add_tensor(name, halves.view(np.float16).reshape(shape[::-1]))
        return
    blocks = int(np.prod(shape)) // block
    raw = np.random.PCG64(seed).random_raw(-(-blocks * size // 8)).view(np.uint8)
    data = raw[: blocks * size].reshape(blocks, size)
    if kind == "Q6_K":
        data[:, -2:] = (0x40, 0)  # 2**-18, at its end
    else:
        data[:, : len(_SCALES[kind])] = list(_SCALES[kind])
    rows = data.reshape(*shape[:0:-1], columns // block * size)
    writer.add_tensor(name, rows, raw_dtype=_KINDS[kind])


def _words() -> Iterator[str]:
    """Yield words of two, three and four letters, each after all of its own beginnings."""
    for length in (2, 3, 4):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    first = ["<unk>", "<s>", "</s>"]
    if vocabulary.bpe:
        alphabet = _byte_characters()
        words = list(itertools.islice(_words(), vocabulary.size - len(first) - len(alphabet)))
        tokens = first + alphabet + words
        types = [control] * 3 + [normal] * (len(tokens) - 3)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([f"{word[:-1]} {word[-1]}" for word in words])
    else:
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        letters = ["\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
        room = vocabulary.size - len(first) - len(bytes_) - len(letters)
        tokens = first + bytes_ + letters + list(itertools.islice(_words(), room))
        types = [control] * 3 + [gguf.TokenType.BYTE] * 256 + [normal] * (len(tokens) - 259)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    assert len(tokens) == vocabulary.size
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(value=False)


def _byte_characters() -> list[str]:
    """Return the characters that stand for the 256 bytes in the vocabularies of GPT-2's kind."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _layers(count: int, of: Callable[[int], Sequence[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    """Return the tensors of all layers, with `blk.N.` before and `.weight` after their names."""
    return [
        (f"blk.{n}.{name}" + ("" if name in _BARE else ".weight"), *shape)
        if not name.endswith(".bias")
        else (f"blk.{n}.{name}", *shape)
        for n in range(count)
        for name, *shape in of(n)
    ]


_BARE = ("ssm_a", "ssm_d")


def _heads(heads: int, kv_heads: int | list[int], length: int, feed_forward: int) -> dict[str, Any]:
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": length,
        "attention.value_length": length,
        "feed_forward_length": feed_forward,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }


def _attention(width: int, heads: int, kv_heads: int, length: int) -> list[tuple[Any, ...]]:
    return [
        ("attn_q", width, heads * length),
        ("attn_k", width, kv_heads * length),
        ("attn_v", width, kv_heads * length),
        ("attn_output", heads * length, width),
    ]


def _feed_forward(width: int, wide: int) -> list[tuple[Any, ...]]:
    return [("ffn_gate", width, wide), ("ffn_up", width, wide), ("ffn_down", wide, width)]


def qwen3(*, width: int = 512, layers: int = 8, vocabulary: int = 151_936) -> Recipe:
    """Grouped queries, norms of keys and queries, a large vocabulary."""
    heads, kv_heads, length, wide = 16, 8, 64, 3 * width
    norms = [("attn_norm", width), ("ffn_norm", width)]
    norms += [("attn_q_norm", length), ("attn_k_norm", length)]
    return Recipe(
        architecture="qwen3",
        vocabulary=Vocabulary(size=vocabulary),
        width=width,
        layers=layers,
        facts=_heads(heads, kv_heads, length, wide),
        matrices=_layers(
            layers,
            lambda _: _attention(width, heads, kv_heads, length) + _feed_forward(width, wide),
        ),
        vectors=[("output_norm.weight", width), *_layers(layers, lambda _: norms)],
    )


def gemma3(*, layers: int = 12, vocabulary: int = 131_072) -> Recipe:
    """Five layers of six look back 512 tokens only; one head of keys; heads wider than usual."""
    width, heads, length, wide = 640, 4, 256, 2048
    norms = [(name, width) for name in ("attn_norm", "ffn_norm")]
    norms += [(name, width) for name in ("post_attention_norm", "post_ffw_norm")]
    norms += [("attn_q_norm", length), ("attn_k_norm", length)]
    return Recipe(
        architecture="gemma3",
        vocabulary=Vocabulary(size=vocabulary, bpe=False),
        width=width,
        layers=layers,
        facts=_heads(heads, 1, length, wide) | {"attention.sliding_window": 512},
        matrices=_layers(
            layers, lambda _: _attention(width, heads, 1, length) + _feed_forward(width, wide)
        ),
        vectors=[("output_norm.weight", width), *_layers(layers, lambda _: norms)],
    )


def gpt2(*, layers: int = 8) -> Recipe:
    """Each head has keys of its own; positions are learned; one matrix for queries, keys, values."""
    width, context, wide = 768, 4096, 3072
    biased = [
        ("attn_norm", width),
        ("attn_norm.bias", width),
        ("ffn_norm", width),
        ("ffn_norm.bias", width),
        ("attn_qkv.bias", 3 * width),
        ("attn_output.bias", width),
        ("ffn_up.bias", wide),
        ("ffn_down.bias", width),
    ]
    matrices = [
        ("attn_qkv", width, 3 * width),
        ("attn_output", width, width),
        ("ffn_up", width, wide),
        ("ffn_down", wide, width),
    ]
    return Recipe(
        architecture="gpt2",
        vocabulary=Vocabulary(size=50_257),
        width=width,
        layers=layers,
        facts={
            "context_length": context,
            "attention.head_count": 12,
            "feed_forward_length": wide,
            "attention.layer_norm_epsilon": 1e-5,
        },
        matrices=_layers(layers, lambda _: matrices),
        vectors=[
            ("position_embd.weight", width, context),
            ("output_norm.weight", width),
            ("output_norm.bias", width),
            *_layers(layers, lambda _: biased),
        ],
    )


def starcoder2(*, layers: int = 10) -> Recipe:
    """Two heads of keys for sixteen of queries, biases everywhere, no gate."""
    width, heads, kv_heads, length, wide = 1024, 16, 2, 64, 4096
    matrices = _attention(width, heads, kv_heads, length)
    matrices += [("ffn_up", width, wide), ("ffn_down", wide, width)]
    vectors: list[tuple[Any, ...]] = [("attn_norm", width), ("ffn_norm", width)]
    vectors += [(f"{name}.bias", width) for name in ("attn_norm", "ffn_norm", "attn_output")]
    vectors += [("attn_q.bias", width), ("ffn_up.bias", wide), ("ffn_down.bias", width)]
    vectors += [(f"attn_{name}.bias", kv_heads * length) for name in "kv"]
    return Recipe(
        architecture="starcoder2",
        vocabulary=Vocabulary(size=49_152),
        width=width,
        layers=layers,
        facts=_heads(heads, kv_heads, length, wide) | {"attention.layer_norm_epsilon": 1e-5},
        matrices=_layers(layers, lambda _: matrices),
        vectors=[
            ("output_norm.weight", width),
            ("output_norm.bias", width),
            *_layers(layers, lambda _: vectors),
        ],
    )


def phi3(*, layers: int = 10) -> Recipe:
    """One matrix for queries, keys, values, one for gate and up; a small vocabulary; untied."""
    width, wide = 1024, 2816
    matrices = [
        ("attn_qkv", width, 3 * width),
        ("attn_output", width, width),
        ("ffn_up", width, 2 * wide),
        ("ffn_down", wide, width),
    ]
    norms = [("attn_norm", width), ("ffn_norm", width)]
    return Recipe(
        architecture="phi3",
        vocabulary=Vocabulary(size=32_064, bpe=False),
        width=width,
        layers=layers,
        facts=_heads(16, 16, 64, wide),
        matrices=_layers(layers, lambda _: matrices),
        vectors=[("output_norm.weight", width), *_layers(layers, lambda _: norms)],
        tied=False,
    )


def mamba(*, layers: int = 16) -> Recipe:
    """No attention: a state of fixed size for each sequence."""
    width, inner, state, kernel, rank = 768, 1536, 16, 4, 48
    matrices = [
        ("ssm_in", width, 2 * inner),
        ("ssm_x", inner, rank + 2 * state),
        ("ssm_dt", rank, inner),
        ("ssm_out", inner, width),
    ]
    vectors = [
        ("attn_norm", width),
        ("ssm_conv1d", kernel, inner),
        ("ssm_conv1d.bias", inner),
        ("ssm_dt.bias", inner),
        ("ssm_a", state, inner),
        ("ssm_d", inner),
    ]
    return Recipe(
        architecture="mamba",
        vocabulary=Vocabulary(size=50_280),
        width=width,
        layers=layers,
        facts={
            "attention.head_count": 0,
            "feed_forward_length": 0,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "ssm.conv_kernel": kernel,
            "ssm.inner_size": inner,
            "ssm.state_size": state,
            "ssm.time_step_rank": rank,
        },
        matrices=_layers(layers, lambda _: matrices),
        vectors=[("output_norm.weight", width), *_layers(layers, lambda _: vectors)],
    )


def deepseek2(*, layers: int = 5) -> Recipe:
    """Latent attention (one short key for all heads), and experts from the second layer on."""
    width, heads, q_rank, kv_rank, rope, key, value = 1024, 16, 512, 512, 64, 192, 128
    experts, wide, dense = 16, 512, 2816

    def matrices(layer: int) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = [
            ("attn_q_a", width, q_rank),
            ("attn_q_b", q_rank, heads * key),
            ("attn_kv_a_mqa", width, kv_rank + rope),
            ("attn_k_b", key - rope, kv_rank, heads),
            ("attn_v_b", kv_rank, value, heads),
            ("attn_output", heads * value, width),
        ]
        if not layer:
            return found + _feed_forward(width, dense)
        for name, *shape in _feed_forward(width, wide):
            found += [(f"{name}_exps", *shape, experts), (f"{name}_shexp", *shape)]
        return found

    def vectors(layer: int) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = [
            ("attn_norm", width),
            ("ffn_norm", width),
            ("attn_q_a_norm", q_rank),
            ("attn_kv_a_norm", kv_rank),
        ]
        return [*found, ("ffn_gate_inp", width, experts)] if layer else found

    return Recipe(
        architecture="deepseek2",
        vocabulary=Vocabulary(size=102_400),
        width=width,
        layers=layers,
        facts={
            "attention.head_count": heads,
            "attention.head_count_kv": 1,
            "attention.key_length": kv_rank + rope,
            "attention.value_length": kv_rank,
            "attention.key_length_mla": key,
            "attention.value_length_mla": value,
            "attention.q_lora_rank": q_rank,
            "attention.kv_lora_rank": kv_rank,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": rope,
            "feed_forward_length": dense,
            "leading_dense_block_count": 1,
            "expert_count": experts,
            "expert_used_count": 4,
            "expert_shared_count": 1,
            "expert_feed_forward_length": wide,
            "expert_weights_scale": 1.0,
        },
        matrices=_layers(layers, matrices),
        vectors=[("output_norm.weight", width), *_layers(layers, vectors)],
    )


def lfm2(*, layers: int = 12) -> Recipe:
    """Two layers of three remember the last two tokens only; the third attends."""
    width, heads, kv_heads, wide, cache = 1024, 16, 8, 2816, 3
    length = width // heads
    attends = [number % 3 == 2 for number in range(layers)]

    def matrices(layer: int) -> list[tuple[Any, ...]]:
        if attends[layer]:
            return _attention(width, heads, kv_heads, length) + _feed_forward(width, wide)
        return [
            ("shortconv.in_proj", width, 3 * width),
            ("shortconv.out_proj", width, width),
            *_feed_forward(width, wide),
        ]

    def vectors(layer: int) -> list[tuple[Any, ...]]:
        own: list[tuple[Any, ...]] = [("shortconv.conv", cache, width)]
        if attends[layer]:
            own = [("attn_q_norm", length), ("attn_k_norm", length)]
        return [("attn_norm", width), ("ffn_norm", width), *own]

    return Recipe(
        architecture="lfm2",
        vocabulary=Vocabulary(size=65_536),
        width=width,
        layers=layers,
        facts=_heads(heads, [kv_heads if attend else 0 for attend in attends], length, wide)
        | {"shortconv.l_cache": cache, "vocab_size": 65_536},
        matrices=_layers(layers, matrices),
        vectors=[("token_embd_norm.weight", width), *_layers(layers, vectors)],
    )


def granitehybrid(*, layers: int = 12) -> Recipe:
    """Mamba-2 layers, and one of four attends."""
    width, heads, kv_heads, length, wide = 768, 12, 4, 64, 2048
    inner, state, kernel, ssm_heads = 1536, 128, 4, 24
    attends = [number % 4 == 3 for number in range(layers)]

    def matrices(layer: int) -> list[tuple[Any, ...]]:
        if attends[layer]:
            return _attention(width, heads, kv_heads, length) + _feed_forward(width, wide)
        return [
            ("ssm_in", width, 2 * inner + 2 * state + ssm_heads),
            ("ssm_out", inner, width),
            *_feed_forward(width, wide),
        ]

    def vectors(layer: int) -> list[tuple[Any, ...]]:
        norms: list[tuple[Any, ...]] = [("attn_norm", width), ("ffn_norm", width)]
        if attends[layer]:
            return norms
        return [
            *norms,
            ("ssm_conv1d", kernel, inner + 2 * state),
            ("ssm_conv1d.bias", inner + 2 * state),
            ("ssm_dt.bias", ssm_heads),
            ("ssm_a", 1, ssm_heads),
            ("ssm_d", 1, ssm_heads),
            ("ssm_norm", inner, 1),
        ]

    return Recipe(
        architecture="granitehybrid",
        vocabulary=Vocabulary(size=100_352),
        width=width,
        layers=layers,
        facts=_heads(heads, [kv_heads if attend else 0 for attend in attends], length, wide)
        | {
            "ssm.conv_kernel": kernel,
            "ssm.inner_size": inner,
            "ssm.state_size": state,
            "ssm.time_step_rank": ssm_heads,
            "ssm.group_count": 1,
        },
        matrices=_layers(layers, matrices),
        vectors=[("output_norm.weight", width), *_layers(layers, vectors)],
    )
