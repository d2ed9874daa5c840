"""What both GGUF backends need to know of a GGUF file: facts, settings, memory. Pure."""

from backends.gguf.header import (
    CACHE_TYPES,
    infill_tokens,
    kv_bytes_per_token,
    pools,
    tasks,
)
from backends.gguf.memory import estimate
from backends.gguf.settings import (
    MAX_BATCH,
    MAX_CHARS_PER_TOKEN,
    OPTIONS,
    batch_size,
    check,
    context_exceeded,
    prefill_batch,
    refuse_hopeless,
    settle_context_length,
    settle_slots,
)

__all__ = [
    "CACHE_TYPES",
    "MAX_BATCH",
    "MAX_CHARS_PER_TOKEN",
    "OPTIONS",
    "batch_size",
    "check",
    "context_exceeded",
    "estimate",
    "infill_tokens",
    "kv_bytes_per_token",
    "pools",
    "prefill_batch",
    "refuse_hopeless",
    "settle_context_length",
    "settle_slots",
    "tasks",
]
