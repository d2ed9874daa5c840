"""How a GGUF model is loaded: engine options, context, slots, batches; and what never fits. Pure.

Lengths are tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backends.contract import (
    Artifact,
    BackendError,
    ChatRequest,
    CompleteRequest,
    LoadOptions,
    Option,
    check_options,
)
from backends.gguf.cache import cache
from backends.gguf.header import CACHE_TYPES, pools

MIB = 1024 * 1024
DEFAULT_CONTEXT_LENGTH = 4096
_DEFAULT_SLOTS = (4, 2, 1)
_QUANTIZED = frozenset(CACHE_TYPES) - {"f32", "f16", "bf16"}
OPTIONS: Mapping[str, Option] = {
    "cache_type_k": Option(
        kind="choice", choices=tuple(CACHE_TYPES), help="element type of the KV cache's keys (f16)"
    ),
    "cache_type_v": Option(
        kind="choice",
        choices=tuple(CACHE_TYPES),
        help="element type of the KV cache's values (f16); a quantized one needs flash attention",
    ),
    "flash_attention": Option(
        kind="choice",
        choices=("auto", "on", "off"),
        help="the attention kernel that does not write out its scores (auto: where it is faster)",
    ),
    "adapter_scale": Option(
        kind="number", minimum=-10, maximum=10, help="strength of the model's LoRA adapters (1)"
    ),
    "gpu_layers": Option(
        kind="integer",
        minimum=0,
        maximum=10_000,
        help="layers on the GPU (as many as fit); 0: none",
    ),
}

# A batch of the prompt must not take over 1 s, since it can't be interrupted. Reading a token costs
# 2 floating-point operations a parameter; one thread did 31e9 a second on a quiet machine and 15e9
# on a busy one (SmolLM2-135M, batches of 64), and half a second is aimed at.
_PREFILL_SECONDS = 0.5
_FLOPS_PER_THREAD = 20e9
_MIN_BATCH = 4  # the default slots: an engine must be able to decode one token for each at a time
MAX_BATCH = 256
MAX_CHARS_PER_TOKEN = 128  # of any real tokenizer; 64 were seen, for runs of spaces


def check(backend: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine options in `given`. Raises BackendError that names the first wrong one."""
    options = check_options(backend, OPTIONS, given)
    if options.get("cache_type_v") in _QUANTIZED and options.get("flash_attention") == "off":
        raise BackendError(
            "invalid_request",
            f"option cache_type_v is {options['cache_type_v']}, which needs flash attention: set "
            "flash_attention to auto or on, or cache_type_v to f16",
        )
    return options


def batch_size(artifact: Artifact, threads: int, context_length: int, slots: int) -> int:
    """Return how many tokens the engine is to compute at a time.

    A model that pools needs a whole text in one batch. Other models read prompts in batches that
    a request can be cancelled between; each slot has at least one token in it.
    """
    if pools(artifact):
        return context_length
    return max(slots, prefill_batch(artifact, threads))


def prefill_batch(artifact: Artifact, threads: int) -> int:
    """Return how many prompt tokens to read at a time, so that a batch takes at most 1 s.

    Never less than 4: a machine that needs a quarter of a second for one token takes longer.
    """
    flops_per_token = 2 * max(1, artifact.parameters)
    tokens = _PREFILL_SECONDS * _FLOPS_PER_THREAD * max(1, threads) / flops_per_token
    batch = _MIN_BATCH
    while batch * 2 <= min(tokens, MAX_BATCH):
        batch *= 2
    return batch


def _size_chars(request: ChatRequest | CompleteRequest) -> int:
    if isinstance(request, CompleteRequest):
        return len(request.prompt) + len(request.suffix or "")
    size = 0
    for message in request.messages:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        size += sum(len(part) for part in parts)
        for call in message.get("tool_calls") or ():
            size += len(call["function"]["name"]) + len(call["function"]["arguments"])
    return size + sum(len(json.dumps(tool)) for tool in request.tools)


def refuse_hopeless(request: ChatRequest | CompleteRequest, context_length: int) -> None:
    """Raise BackendError for a prompt that is far too long, before it is tokenized.

    Engines can't be interrupted while they tokenize, and take a hundred bytes a character for it.
    """
    size = _size_chars(request)
    if size > MAX_CHARS_PER_TOKEN * context_length:
        raise BackendError(
            "context_length_exceeded",
            f"the prompt has {size} characters, which cannot fit a context_length of "
            f"{context_length} tokens: shorten it or load the model with a larger context_length",
            tokens=-(-size // MAX_CHARS_PER_TOKEN),
        )


def settle_context_length(artifact: Artifact, options: LoadOptions) -> int:
    """Return what one request may use: the user's choice, else 4096; at most the model's own."""
    wanted = options.context_length or DEFAULT_CONTEXT_LENGTH
    return min(wanted, artifact.context_length or wanted)


def settle_slots(artifact: Artifact, options: LoadOptions, context_length: int) -> int:
    """Return how many requests run at once.

    The user's choice, else the largest of 4, 2, 1 whose KV cache stays under the larger of 512 MiB
    and half the weights.
    """
    if options.slots:
        return options.slots
    bound = max(512 * MIB, artifact.weights_bytes // 2)
    one = cache(
        artifact,
        options.engine,
        context_length=context_length,
        slots=1,
        batch=MAX_BATCH,
        full_windows=True,
    )
    slot_bytes = sum(one.layers)
    return next((n for n in _DEFAULT_SLOTS if n * slot_bytes <= bound), 1)
