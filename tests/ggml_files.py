"""Writes small GGML files for tests: real models of every architecture, with made-up weights.

Has its own knowledge of the format, so that a mistake in the reader is not repeated here.

`recite` makes a gpt2 model that says one text and then ends; the others have random weights, the
same for the same seed.
"""

from __future__ import annotations

import math
import random
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

ARCHITECTURES = (
    "gpt2",
    "starcoder",
    "gptj",
    "gpt_neox",
    "dolly-v2",
    "mpt",
    "replit",
    "llama",
    "falcon",
)
END = b"<|endoftext|>"
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34)}  # by type of tensor
TYPE_OF = {0: 0, 1: 1, 2: 2, 3: 3, 7: 8}  # of a tensor, by type of file

Tensor = tuple[str, tuple[int, ...], Sequence[float]]


def vocabulary(architecture: str) -> list[bytes]:
    """Every byte, some words, and the architecture's special tokens: text of any kind is spelt."""
    single = [bytes([number]) for number in range(256)]
    words = [b"Hello", b" world", b" the", b"ing", b"  ", b"###", b" End"]
    if architecture == "llama":
        return [b"<unk>", b"<s>", b"</s>", *single, *words]
    if architecture == "falcon":
        special = [b">>%d<<" % number for number in range(11)]
        return [*special, END, *single, *words]
    if architecture == "replit":
        return [b"<unk>", END, *single, "▁".encode(), "▁the".encode(), b"Hello"]
    if architecture == "mpt":  # whose tokens are Latin-1 written as UTF-8
        return [token.decode("latin-1").encode() for token in [*single[1:], *words, END]]
    special = {
        "dolly-v2": [b"### End", b"### Instruction:", b"### Response:"],
        "starcoder": [b"<fim-prefix>", b"<|end|>"],
    }
    return [*single, *words, *special.get(architecture, []), END]


def write_ggml(
    path: Path,
    architecture: str = "gpt2",
    *,
    seed: int = 1,
    context_length: int = 64,
    layers: int = 2,
    embedding: int = 64,
    heads: int = 4,
    file_type: int = 0,
    quantization_version: int = 2,
    tokens: Sequence[bytes] | None = None,
    magic: tuple[int, int] | None = None,
    leave_out: str = "",
    recite: bytes = b"",
) -> Path:
    """Write a model to `path` and return it. Quantized files have weights of zero."""
    words = vocabulary(architecture) if tokens is None else list(tokens)
    shape = {"v": len(words), "c": context_length, "e": embedding, "h": heads, "l": layers}
    aligned = architecture in ("llama", "falcon")
    raw = bytearray(_header(architecture, shape, file_type, quantization_version, magic))
    for word in words:
        raw += struct.pack("<I", len(word)) + word
        if architecture in ("llama", "falcon", "replit"):
            raw += struct.pack("<f", -float(len(word)))
    if architecture == "falcon":
        raw += struct.pack("<i", 1) + b"".join(
            struct.pack("<I", len(part)) + part for part in (b"i", b"n")
        )
    made = _tensors(architecture, shape, words, seed, recite, zeros=file_type > 1)
    for name, dimensions, values in made:
        if name != leave_out:
            raw += _tensor(name, dimensions, values, TYPE_OF[file_type], len(raw), aligned=aligned)
    path.write_bytes(raw)
    return path


def _header(
    architecture: str,
    shape: dict[str, int],
    file_type: int,
    quantization_version: int,
    magic: tuple[int, int] | None,
) -> bytes:
    v, c, e, h, layers = (shape[letter] for letter in "vcehl")
    rotary = e // h // 2
    mark, version = {"llama": (b"tjgg", 3), "falcon": (b"ccgg", 10)}.get(architecture, (b"lmgg", 0))
    start = struct.pack("<II", *magic) if magic else mark + struct.pack("<I", version)
    if magic is None and not version:
        start = mark
    kind = file_type + 1000 * quantization_version * (file_type > 1)
    numbers = {
        "gpt2": (v, c, e, h, layers, kind, v),
        "starcoder": (v, c, e, h, layers, kind, v),
        "gptj": (v, c, e, h, layers, rotary, kind, v),
        "gpt_neox": (v, c, e, h, layers, rotary, 1, kind),
        "dolly-v2": (v, c, e, h, layers, rotary, 1, kind),
        "replit": (e, c, h, layers, v, kind),
        "llama": (v, e, 32, h, layers, e // h, file_type),
        "falcon": (v, e, h, 1, layers, 7, file_type, 1),
    }
    if architecture == "mpt":
        return start + struct.pack("<5i2fi", e, c, h, layers, v, 8.0, 0.0, kind)
    return start + struct.pack(f"<{len(numbers[architecture])}i", *numbers[architecture])


def _shapes(architecture: str, shape: dict[str, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and dimensions of the tensors, in no order that a file would have to have."""
    v, c, e, h = (shape[letter] for letter in "vceh")
    ff = -(-(2 * 4 * e // 3) // 32) * 32
    top: list[tuple[str, tuple[int, ...]]]
    layer: list[tuple[str, tuple[int, ...]]]
    match architecture:
        case "gpt2" | "starcoder":
            top = [
                ("model/ln_f/g", (e,)),
                ("model/ln_f/b", (e,)),
                ("model/wte", (e, v)),
                ("model/wpe", (e, c)),
                ("model/lm_head", (e, v)),
            ]
            layer = [
                *((f"model/h{{}}/{ln}/{p}", (e,)) for ln in ("ln_1", "ln_2") for p in "gb"),
                ("model/h{}/attn/c_attn/w", (e, 3 * e)),
                ("model/h{}/attn/c_attn/b", (3 * e,)),
                ("model/h{}/attn/c_proj/w", (e, e)),
                ("model/h{}/attn/c_proj/b", (e,)),
                ("model/h{}/mlp/c_fc/w", (e, 4 * e)),
                ("model/h{}/mlp/c_fc/b", (4 * e,)),
                ("model/h{}/mlp/c_proj/w", (4 * e, e)),
                ("model/h{}/mlp/c_proj/b", (e,)),
            ]
        case "gptj":
            top = [
                ("transformer.wte.weight", (e, v)),
                ("transformer.ln_f.weight", (e,)),
                ("transformer.ln_f.bias", (e,)),
                ("lm_head.weight", (e, v)),
                ("lm_head.bias", (v,)),
            ]
            h_ = "transformer.h.{}"
            layer = [
                (f"{h_}.ln_1.weight", (e,)),
                (f"{h_}.ln_1.bias", (e,)),
                *((f"{h_}.attn.{p}_proj.weight", (e, e)) for p in ("q", "k", "v", "out")),
                (f"{h_}.mlp.fc_in.weight", (e, 4 * e)),
                (f"{h_}.mlp.fc_in.bias", (4 * e,)),
                (f"{h_}.mlp.fc_out.weight", (4 * e, e)),
                (f"{h_}.mlp.fc_out.bias", (e,)),
            ]
        case "gpt_neox" | "dolly-v2":
            top = [
                ("gpt_neox.embed_in.weight", (e, v)),
                ("gpt_neox.final_layer_norm.weight", (e,)),
                ("gpt_neox.final_layer_norm.bias", (e,)),
                ("embed_out.weight", (e, v)),
            ]
            h_ = "gpt_neox.layers.{}"
            parts = [
                ("attention.query_key_value", (e, 3 * e)),
                ("attention.dense", (e, e)),
                ("mlp.dense_h_to_4h", (e, 4 * e)),
                ("mlp.dense_4h_to_h", (4 * e, e)),
            ]
            layer = [
                *((f"{h_}.{n}_layernorm.weight", (e,)) for n in ("input", "post_attention")),
                *((f"{h_}.{n}_layernorm.bias", (e,)) for n in ("input", "post_attention")),
                *((f"{h_}.{n}.weight", size) for n, size in parts),
                *((f"{h_}.{n}.bias", size[1:]) for n, size in parts),
            ]
        case "mpt" | "replit":
            top = [("transformer.wte.weight", (e, v)), ("transformer.norm_f.weight", (e,))]
            h_ = "transformer.blocks.{}"
            layer = [
                (f"{h_}.norm_1.weight", (e,)),
                (f"{h_}.attn.Wqkv.weight", (e, 3 * e)),
                (f"{h_}.attn.out_proj.weight", (e, e)),
                (f"{h_}.norm_2.weight", (e,)),
                (f"{h_}.ffn.up_proj.weight", (e, 4 * e)),
                (f"{h_}.ffn.down_proj.weight", (4 * e, e)),
            ]
        case "llama":
            top = [("tok_embeddings.weight", (e, v)), ("norm.weight", (e,))]
            top += [("output.weight", (e, v))]
            layer = [
                ("layers.{}.attention_norm.weight", (e,)),
                *((f"layers.{{}}.attention.w{p}.weight", (e, e)) for p in "qkvo"),
                ("layers.{}.ffn_norm.weight", (e,)),
                ("layers.{}.feed_forward.w1.weight", (e, ff)),
                ("layers.{}.feed_forward.w2.weight", (ff, e)),
                ("layers.{}.feed_forward.w3.weight", (e, ff)),
            ]
        case "falcon":
            top = [
                ("transformer.word_embeddings.weight", (e, v)),
                ("transformer.ln_f.weight", (e,)),
                ("transformer.ln_f.bias", (e,)),
                ("lm_head.weight", (e, v)),
            ]
            h_ = "transformer.h.{}"
            layer = [
                (f"{h_}.input_layernorm.weight", (e,)),
                (f"{h_}.input_layernorm.bias", (e,)),
                (f"{h_}.self_attention.query_key_value.weight", (e, (2 + h) * e // h)),
                (f"{h_}.self_attention.dense.weight", (e, e)),
                (f"{h_}.mlp.dense_h_to_4h.weight", (e, 4 * e)),
                (f"{h_}.mlp.dense_4h_to_h.weight", (4 * e, e)),
            ]
        case _:
            raise ValueError(architecture)
    each = range(shape["l"])
    return top + [(name.format(number), size) for number in each for name, size in layer]


def _tensors(
    architecture: str,
    shape: dict[str, int],
    words: Sequence[bytes],
    seed: int,
    recite: bytes,
    *,
    zeros: bool,
) -> list[Tensor]:
    """Return the tensors with their values; none stand for zeros."""
    generator = random.Random(seed)
    made: list[Tensor] = []
    for name, size in _shapes(architecture, shape):
        count = 0 if zeros else math.prod(size)
        if len(size) == 1 and not name.endswith(("b", "bias")):  # of a norm
            values = [1.0] * count
        elif len(size) == 1 or recite:
            values = [0.0] * count
        else:
            spread = 2 / math.sqrt(size[0]) if "w" in name[-6:] else 1.0
            values = [generator.uniform(-spread, spread) for _ in range(count)]
        made.append((name, size, values))
    return _reciting(made, words, recite, shape["e"]) if recite else made


def _reciting(
    made: list[Tensor], words: Sequence[bytes], text: bytes, embedding: int
) -> list[Tensor]:
    """Make each byte of `text`, which has none twice, call for the next one, and the last for END.

    Layers of zeros pass on the last token's own vector; the head has it in its successor's row.
    """
    generator = random.Random(0)
    vectors = [[generator.choice((-1.0, 1.0)) for _ in range(embedding)] for _ in words]
    head = [[0.0] * embedding for _ in words]
    chain = [words.index(bytes([byte])) for byte in text] + [words.index(END)]
    for before, after in zip(chain, chain[1:], strict=False):
        head[after] = vectors[before]
    given = {"model/wte": sum(vectors, []), "model/lm_head": sum(head, [])}
    return [(name, size, given.get(name, values)) for name, size, values in made]


def _tensor(
    name: str,
    dimensions: tuple[int, ...],
    values: Sequence[float],
    kind: int,
    position: int,
    *,
    aligned: bool,
) -> bytes:
    if len(dimensions) == 1 or name == "model/wpe":
        kind = 0
    raw = name.encode()
    start = struct.pack(f"<3i{len(dimensions)}i", len(dimensions), len(raw), kind, *dimensions)
    start += raw
    if aligned:
        start += bytes(-(position + len(start)) % 32)
    if not values:
        block, size_bytes = BLOCKS[kind]
        return start + bytes(math.prod(dimensions) // block * size_bytes)
    if kind == 0:
        return start + array("f", values).tobytes()
    return start + struct.pack(f"<{len(values)}e", *values)
