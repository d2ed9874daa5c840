"""What both GGUF backends need to know of a GGUF file: facts, settings, memory. Pure."""

from backends.gguf.cache import kv_bytes_per_token, window_length
from backends.gguf.header import (
    CACHE_TYPES,
    infill_tokens,
    pools,
    tasks,
)
from backends.gguf.memory import Footprint, estimate, repacked_types
from backends.gguf.sequences import refitted
from backends.gguf.settings import (
    MAX_BATCH,
    MAX_CHARS_PER_TOKEN,
    OPTIONS,
    batch_size,
    check,
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
    "Footprint",
    "batch_size",
    "check",
    "estimate",
    "infill_tokens",
    "kv_bytes_per_token",
    "pools",
    "prefill_batch",
    "refitted",
    "refuse_hopeless",
    "repacked_types",
    "settle_context_length",
    "settle_slots",
    "tasks",
    "window_length",
]
