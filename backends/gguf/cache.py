"""What a GGUF model keeps of the tokens that it has read: keys and values, windows, states. Pure.

Sizes are bytes, lengths are tokens. Sources in llama.cpp: `src/llama-model.cpp` (`create_memory`:
which layers keep what), `llama-kv-cache.cpp` and `llama-kv-cache-iswa.cpp` (how long a cache is),
`llama-hparams.cpp` (`n_embd_r`, `n_embd_s`: how large a state is), `src/models/` (which layers of
an architecture look back through a window, where the header does not say).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from backends.contract import Artifact
from backends.gguf.header import (
    CACHE_TYPES,
    head_lengths,
    layer_count,
    layers,
    number,
)

_CELLS = 256  # a cache is as long as a multiple of this (`llama-context.cpp`)

# These keep nothing: each text is read at one go.
_NOTHING = frozenset(
    """
    bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert
    gemma-embedding gemma-embedding2 wavtokenizer-dec dream llada llada-moe rnd1 clef
    """.split()
)
# All layers have a state, and no layer has keys.
_STATES_ALONE = frozenset("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7".split())
# All layers have both.
_BOTH = frozenset(["falcon-h1"])
# A layer without KV heads has a state.
_BY_KV_HEADS = frozenset(
    """
    jamba plamo2 granitehybrid lfm2 lfm2moe nemotron_h nemotron_h_moe kimi-linear kimi-k3
    bailingmoe3 glm5-next
    """.split()
)
# One layer of so many has keys, if the header does not list those that have a state.
_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
# Only the first layers have keys, which the others use as well.
_SHARING = {"gemma3n": 20}


class _Windows(NamedTuple):
    """The window of an architecture whose header does not say more.

    The last of `period` layers looks back all the way, or the first, if `first`. `length` is that
    of a header without one; 0: then there are no windows.
    """

    period: int
    length: int = 0
    first: bool = False


_WINDOWS = {
    "afmoe": _Windows(4),
    "cohere2": _Windows(4),
    "cohere2moe": _Windows(4, first=True),
    "deepseek4": _Windows(0),
    "dots3note": _Windows(1),
    "exaone-moe": _Windows(4, 128),
    "exaone4": _Windows(4, 4096),
    "gemma2": _Windows(2, 4096),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "gemma4": _Windows(1),
    "gpt-oss": _Windows(2),
    "granite_swa": _Windows(1),
    "laguna": _Windows(4, first=True),
    "lfm2": _Windows(0),
    "lfm2moe": _Windows(0),
    "llama4": _Windows(4, 8192),
    "maple": _Windows(1),
    "mellum": _Windows(4),
    "mimo2": _Windows(1),
    "muse-glimmer": _Windows(4),
    "olmo2": _Windows(4),
    "plamo3": _Windows(8),
    "smallthinker": _Windows(4, first=True),
    "spark2_5": _Windows(1),
    "step35": _Windows(1),
}
_EXAONE4_LAYERS = 64  # smaller models of that family have no windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """What is kept, in bytes: of each layer for all slots together.

    `cells` counts the tokens that there is room for, all caches and slots together, and `longest`
    those that one batch can attend to, all caches together. `rewound` is the part of one
    conversation that can't be cut back to an earlier token.
    """

    layers: tuple[int, ...]
    cells: int
    longest: int
    rewound: int


def cache(
    artifact: Artifact,
    engine: Mapping[str, Any],
    *,
    context_length: int,
    slots: int,
    batch: int,
    full_windows: bool,
) -> Cache:
    """Return what a load keeps: each slot its own, as llama.cpp does without `kv_unified`.

    A layer that looks back through a window needs room for the window and a batch; for all of the
    context with `full_windows` (llama.cpp's `swa_full`).
    """
    if artifact.architecture in _NOTHING:
        return Cache(layers=(0,) * layer_count(artifact), cells=0, longest=batch, rewound=0)
    room = _padded(context_length)
    window = window_length(artifact)
    windowed_room = min(room, _padded(window + batch)) if window and not full_windows else room
    windowed, recurrent = _windowed(artifact), recurrent_layers(artifact)
    full_bytes = _token_bytes(artifact, engine, windowed=False)
    windowed_bytes = _token_bytes(artifact, engine, windowed=True)
    state_bytes = _state_bytes(artifact)
    sizes, rewound = [], 0
    for layer in range(layer_count(artifact)):
        kept = (
            windowed_bytes[layer] * windowed_room if windowed[layer] else full_bytes[layer] * room
        )
        state = state_bytes if recurrent[layer] else 0
        sizes.append(slots * round(kept + state))
        if windowed[layer] and not full_windows:
            rewound += round(windowed_bytes[layer] * min(window, windowed_room))
        rewound += state
    attends, looks_back = any(full_bytes), any(windowed)
    longest = (room if attends else 0) + (windowed_room if looks_back else 0)
    return Cache(layers=tuple(sizes), cells=slots * longest, longest=longest, rewound=rewound)


def kv_bytes_per_token(artifact: Artifact, engine: Mapping[str, Any] | None = None) -> int:
    """Return the bytes that one token takes in the KV cache, over all layers."""
    if artifact.architecture in _NOTHING:
        return 0
    pairs = zip(
        _windowed(artifact),
        _token_bytes(artifact, engine or {}, windowed=True),
        _token_bytes(artifact, engine or {}, windowed=False),
        strict=True,
    )
    return round(sum(short if windowed else full for windowed, short, full in pairs))


def window_length(artifact: Artifact) -> int:
    """Return how far back layers with a window look; 0 if there are none."""
    known = _WINDOWS.get(artifact.architecture)
    if known is None:
        return 0
    if artifact.architecture == "exaone4" and layer_count(artifact) != _EXAONE4_LAYERS:
        return 0
    told = number(artifact, "attention.sliding_window", known.length)
    # llama4 has chunks of 8192 whatever its header says, unless that is 0.
    return min(told, 1) * known.length if artifact.architecture == "llama4" else told


def _padded(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS


def _windowed(artifact: Artifact) -> list[bool]:
    """Return for each layer whether it looks back through a window."""
    count = layer_count(artifact)
    if not window_length(artifact):
        return [False] * count
    known = _WINDOWS[artifact.architecture]
    told = artifact.metadata.get(f"{artifact.architecture}.attention.sliding_window_pattern")
    if isinstance(told, list):
        return [layer < len(told) and bool(told[layer]) for layer in range(count)]
    period = told if isinstance(told, int) and not isinstance(told, bool) else known.period
    if period <= 0:
        return [not recurrent for recurrent in recurrent_layers(artifact)]
    full = 0 if known.first else period - 1
    return [layer % period != full for layer in range(count)]


def recurrent_layers(artifact: Artifact) -> list[bool]:
    """Return for each layer whether it has a state of fixed size."""
    architecture, count = artifact.architecture, layer_count(artifact)
    if architecture in _STATES_ALONE or architecture in _BOTH:
        return [True] * count
    if architecture in _BY_KV_HEADS:
        # Of nemotron's layers, those with a feed-forward network have nothing else.
        wide = layers(artifact, "feed_forward_length", 0)
        alone = architecture.startswith("nemotron")
        heads = layers(artifact, "attention.head_count_kv", 1)
        return [not kv and not (alone and ff) for kv, ff in zip(heads, wide, strict=True)]
    if architecture in _INTERVALS:
        told = artifact.metadata.get(f"{architecture}.attention.recurrent_layers")
        if isinstance(told, list) and len(told) >= count:
            return [bool(each) for each in told[:count]]
        interval = max(1, number(artifact, "full_attention_interval", _INTERVALS[architecture]))
        return [(layer + 1) % interval != 0 for layer in range(count)]
    return [False] * count


def _token_bytes(artifact: Artifact, engine: Mapping[str, Any], *, windowed: bool) -> list[float]:
    """Return the bytes of one token in each layer's cache, all of them with windows, or none.

    KV heads × (key length × bytes of a key's element + the same of values). With latent attention
    (MLA) values are read out of the keys. An indexer has a key of its own for each token. Without
    flash attention all layers have room for the widest values.
    """
    architecture = artifact.architecture
    count = layer_count(artifact)
    heads = layers(artifact, "attention.head_count", 1)
    most = number(artifact, "attention.head_count", 1)
    kv_heads = layers(artifact, "attention.head_count_kv", most, otherwise=heads)
    key, value = head_lengths(artifact, windowed=windowed)
    key_bytes = CACHE_TYPES[engine.get("cache_type_k", "f16")]
    value_bytes = CACHE_TYPES[engine.get("cache_type_v", "f16")]
    if number(artifact, "attention.key_length_mla", 0):
        value = 0
    indexed = number(artifact, "attention.indexer.key_length", 0) * key_bytes
    recurrent = recurrent_layers(artifact)
    keep = count - number(artifact, "nextn_predict_layers", 0)
    keep = min(keep, _SHARING.get(architecture, keep))
    if architecture == "gemma4":
        keep -= number(artifact, "attention.shared_kv_layers", 0)
    if architecture in _STATES_ALONE:
        keep = 0
    widest = max(kv_heads, default=0) if engine.get("flash_attention") == "off" else 0
    sizes = []
    for layer in range(count):
        states = recurrent[layer] and architecture not in _BOTH
        if layer >= keep or states or not kv_heads[layer]:
            sizes.append(0.0)
            continue
        values = max(widest, kv_heads[layer]) * value * value_bytes
        sizes.append(kv_heads[layer] * key * key_bytes + values + indexed)
    return sizes


def _state_bytes(artifact: Artifact) -> int:
    """Return the bytes of one conversation's state in a layer that has one, of float32."""
    width = number(artifact, "embedding_length", 0)
    heads = number(artifact, "attention.head_count", 0)
    kernel = number(artifact, "ssm.conv_kernel", 0)
    if size := number(artifact, "wkv.head_size", 0):
        return 4 * width * (number(artifact, "token_shift_count", 2) + size)
    if length := number(artifact, "shortconv.l_cache", 0):
        return 4 * width * (length - 1)
    if size := number(artifact, "kda.head_dim", 0):
        return 4 * heads * size * (3 * (kernel - 1 if kernel else 3) + size)
    inner, state = number(artifact, "ssm.inner_size", 0), number(artifact, "ssm.state_size", 0)
    if artifact.architecture == "minimax-01":
        return 4 * heads * number(artifact, "attention.key_length", 0) ** 2
    groups = number(artifact, "ssm.group_count", 0)
    return 4 * (max(0, kernel - 1) * (inner + 2 * groups * state) + state * inner)
