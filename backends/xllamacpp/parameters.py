"""What the engine is started with."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from backends import builds, gguf, thinking
from backends.contract import BackendError, LoadSpec, Placement, Task
from backends.placement import device_ids, engine_split
from backends.xllamacpp.listener import Listener

MIB = 1024 * 1024
# How many copies a slot keeps of what can't be cut back to an earlier token (windows, states), to
# go on from. The last one, just before the end of a prompt, is what the next turn needs; the
# engine's own choice of 32 can be many times the model.
_CHECKPOINTS = 1
# Measured on SmolLM2-135M and on models of other widths and vocabularies.
FOOTPRINT = gguf.Footprint(
    runtime_bytes=25 * MIB,
    string_bytes=28,
    hole_bytes=7 * MIB,
    cell_bytes=280,
    slot_bytes=MIB // 4,
    candidates=1,
    full_windows=False,
    checkpoints=_CHECKPOINTS,
    pools_together=False,
    image_batch=0,
    repacked_types=gguf.repacked_types(platform.machine()),
)
_KERNELS = {
    "auto": "LLAMA_FLASH_ATTN_TYPE_AUTO",
    "on": "LLAMA_FLASH_ATTN_TYPE_ENABLED",
    "off": "LLAMA_FLASH_ATTN_TYPE_DISABLED",
}


def parameters(spec: LoadSpec, options: Mapping[str, Any], listener: Listener) -> Any:
    """Return the engine's parameters for a load with these engine options.

    The engine's own defaults would take the model's longest context, offload what fits, keep a
    prompt cache of 8 GiB, and let one slot's overflow fail the others.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = spec.artifact.path
    params.fit_params = False
    params.n_ctx = spec.context_length * spec.slots
    params.n_parallel = spec.slots
    params.n_batch = params.n_ubatch = gguf.batch_size(
        spec.artifact, spec.threads, spec.context_length, spec.slots
    )
    params.kv_unified = False
    params.n_gpu_layers, shares = gpu_split(spec.placement, xllamacpp.get_device_info())
    params.tensor_split = [*shares, *params.tensor_split[len(shares) :]]
    params.no_extra_bufts = not builds.lays_out_anew(str(xllamacpp.get_system_info()))
    params.cache_ram_mib = 0
    params.n_ctx_checkpoints = _CHECKPOINTS
    params.warmup = False
    params.verbosity = 1
    params.ui = False
    # Which slots hold how much, and files of what they hold: in this folder alone.
    params.endpoint_slots = True
    params.slot_save_path = f"{spec.scratch_dir}/"
    # A conversation keeps its slot from another one with the same system prompt, unless that is
    # most of the other's prompt: then it costs more to read it again.
    params.slot_prompt_similarity = 0.5
    params.endpoint_metrics = True
    params.embedding = gguf.pools(spec.artifact)
    if Task.RERANK in gguf.tasks(spec.artifact):  # the header's own pooling is not enough for this
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
    types = xllamacpp.ggml_type
    for name in ("cache_type_k", "cache_type_v"):
        if name in options:
            setattr(params, name, getattr(types, f"GGML_TYPE_{options[name].upper()}"))
    params.flash_attn_type = getattr(
        xllamacpp.llama_flash_attn_type, _KERNELS[options.get("flash_attention", "auto")]
    )
    params.lora_adapters = [
        _adapter(path, options.get("adapter_scale", 1.0)) for path in spec.artifact.paths("adapter")
    ]
    for path in spec.artifact.paths("mmproj"):
        params.mmproj.path = path
        params.mmproj_use_gpu = False  # it is booked as RAM
    own = spec.artifact.chat_template
    template = thinking.switchable(own)
    if spec.artifact.metadata.get("modeld.chat_template") or template != own:
        params.chat_template = template
    params.hostnames = [listener.path]
    params.api_keys = [listener.key]
    return params


def gpu_split(where: Placement, devices: Sequence[Mapping[str, Any]]) -> tuple[int, list[float]]:
    """Return `n_gpu_layers` and the shares of the engine's GPUs, in its own order of them.

    `devices` are what `get_device_info` tells. Raises BackendError if a GPU of the placement is not
    among them.
    """
    # llama.cpp takes integrated GPUs only where there is no other.
    gpus = _of_type(devices, "TYPE_GPU") or _of_type(devices, "TYPE_IGPU")
    try:
        layers, shares = engine_split(where, device_ids(gpus))
    except ValueError as error:
        raise BackendError("load_failed", str(error)) from error
    return layers, list(shares)


def _of_type(devices: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[str, str]]:
    return [(d["name"], d["device_id"]) for d in devices if kind in str(d["type"])]


def _adapter(path: str, scale: float) -> Any:
    import xllamacpp

    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = path, scale
    return adapter
