"""One loaded model: its weights, its context, its adapters and its image encoder.

Owns the engine's memory and the parameters of a load. Knows no requests.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

from backends import builds, gguf
from backends.contract import BackendError, LoadSpec, Placement, Progress
from backends.llama_cpp import log
from backends.llama_cpp.vision import Vision
from backends.llama_cpp.vocabulary import Vocabulary
from backends.placement import engine_split

# ggml.h, enum ggml_type
_CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
_MIB = 1024 * 1024
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_NVIDIA = Path("/proc/driver/nvidia/gpus")
# How many texts a batch of an embedding model may hold: each is a sequence of its own.
MAX_TEXTS = 32
# The most tokens that one image takes in models that need a whole image in one batch.
_IMAGE_TOKENS = 1024
# Measured on SmolLM2-135M and on models of other widths and vocabularies.
FOOTPRINT = gguf.Footprint(
    runtime_bytes=32 * _MIB,
    string_bytes=24,
    hole_bytes=2 * _MIB,
    cell_bytes=420,
    slot_bytes=_MIB // 4,
    candidates=0,
    full_windows=True,
    checkpoints=0,
    pools_together=True,
    image_batch=_IMAGE_TOKENS,
    repacked_types=gguf.repacked_types(platform.machine()),
)


class Model:
    """The model that `spec` describes, loaded. Raises BackendError("load_failed").

    `close` it. Its `context` belongs to one thread at a time; its `vocabulary` to all.
    """

    def __init__(self, spec: LoadSpec, options: dict[str, Any], progress: Progress) -> None:
        if spec.placement.gpu_layers == 0:
            builds.hide_gpus()
        import llama_cpp

        self.engine: Any = llama_cpp
        self.pointer: Any = None
        self.context: Any = None
        self.vision: Vision | None = None
        self.pools = gguf.pools(spec.artifact)
        self.context_length = spec.context_length
        self.scratch_dir = spec.scratch_dir
        self.batch_tokens = gguf.batch_size(
            spec.artifact, spec.threads, spec.context_length, spec.slots
        )
        try:
            with log.everything(), log.overheard() as errors:
                self._open(spec, options, progress, errors)
        except BaseException:
            self.close()
            raise
        self.vocabulary = Vocabulary(self.pointer)
        self.memory = self.engine.llama_get_memory(self.context)
        # How many tokens back most layers look; 0: all.
        self.window: int = self.engine.llama_model_n_swa(self.pointer)

    def _open(
        self, spec: LoadSpec, options: dict[str, Any], progress: Progress, errors: list[str]
    ) -> None:
        path = spec.artifact.path
        self.engine.llama_backend_init()
        self.pointer = self.engine.llama_model_load_from_file(
            path.encode(), _model_params(spec.placement, progress)
        )
        if not self.pointer:
            raise _failed(f"{path} cannot be loaded", errors)
        for encoder in spec.artifact.paths("mmproj")[:1]:
            self.vision = Vision(encoder, self.pointer, threads=spec.threads)
        self.context = self.engine.llama_init_from_model(
            self.pointer, self._context_params(spec, options)
        )
        if not self.context:
            raise _failed(
                f"the engine can't compute {path} with context_length {spec.context_length} and "
                f"{spec.slots} slots",
                errors,
            )
        self._adapt(spec.artifact.paths("adapter"), options.get("adapter_scale", 1.0), errors)

    def _context_params(self, spec: LoadSpec, options: dict[str, Any]) -> Any:
        params = self.engine.llama_context_default_params()
        params.n_threads = params.n_threads_batch = spec.threads
        params.n_batch = params.n_ubatch = self.batch_tokens
        params.no_perf = True
        if self.pools:
            params.embeddings = True
            # A batch holds whole texts and is all that the KV cache ever has to hold.
            params.n_ctx = spec.context_length
            params.n_seq_max = MAX_TEXTS
            params.kv_unified = True
            params.n_outputs_max = params.n_outputs_max_per_seq = 0
        else:
            params.n_ctx = spec.context_length * spec.slots
            params.n_seq_max = spec.slots
            params.kv_unified = False
            params.n_outputs_max = spec.slots
            if self.vision and self.vision.attends_to_whole_images:
                params.n_batch = params.n_ubatch = max(self.batch_tokens, _IMAGE_TOKENS)
        params.type_k = _CACHE_TYPES[options.get("cache_type_k", "f16")]
        params.type_v = _CACHE_TYPES[options.get("cache_type_v", "f16")]
        # Layers with a sliding window keep what has left it, so that a prompt can part from what is
        # held anywhere. It is booked like that.
        params.swa_full = True
        params.flash_attn_type = _FLASH_ATTENTION[options.get("flash_attention", "auto")]
        return params

    def _adapt(self, paths: tuple[str, ...], scale: float, errors: list[str]) -> None:
        if not paths:
            return
        kind = self.engine.llama_adapter_lora_p_ctypes
        adapters = (kind * len(paths))()
        for at, path in enumerate(paths):
            errors.clear()
            adapter = self.engine.llama_adapter_lora_init(self.pointer, path.encode())
            if not adapter:
                raise _failed(f"the adapter {path} does not fit this model", errors)
            adapters[at] = adapter
        scales = (ctypes.c_float * len(paths))(*[scale] * len(paths))
        if self.engine.llama_set_adapters_lora(self.context, adapters, len(paths), scales):
            raise _failed("the adapters cannot be used", errors)

    def close(self) -> None:
        """Free everything. May be called twice; nothing of the model may be in use."""
        if self.context:
            self.engine.llama_free(self.context)
        if self.vision:
            self.vision.free()
        if self.pointer:  # frees its adapters too
            self.engine.llama_model_free(self.pointer)
        self.context = self.vision = self.pointer = None


def gpu_split(where: Placement, nvidia: Path) -> tuple[int, tuple[float, ...]]:
    """Return `n_gpu_layers` and the shares of the engine's GPUs, in its own order of them.

    This binding does not tell that order. CUDA's is that of the PCI addresses, since the worker's
    environment has CUDA_DEVICE_ORDER=PCI_BUS_ID, and NVIDIA's driver lists them in the folder
    `nvidia`. Where there is no such list, the GPUs of the placement are taken to be all that there
    are. Raises BackendError if a GPU of the placement is not in the list.
    """
    try:
        devices = sorted(entry.name.lower() for entry in nvidia.iterdir())
    except OSError:
        devices = []
    try:
        return engine_split(where, devices or None)
    except ValueError as error:
        raise BackendError("load_failed", str(error)) from error


def _model_params(placement: Placement, progress: Progress) -> Any:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, shares = gpu_split(placement, _NVIDIA)
    split = (ctypes.c_float * llama_cpp.llama_max_devices())(*shares)
    params.tensor_split = ctypes.cast(split, type(params.tensor_split))
    said = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
    params.use_extra_bufts = builds.lays_out_anew(said)
    told = -1

    def report(fraction: float, _: object) -> bool:
        nonlocal told
        if int(fraction * 100) > told:
            told = int(fraction * 100)
            progress(min(1.0, fraction))
        return True

    params.progress_callback = llama_cpp.llama_progress_callback(report)
    return params


def _failed(what: str, errors: list[str]) -> BackendError:
    said = errors[0] if errors else "the engine gave no reason"
    return BackendError("load_failed", f"{what}: {said}")
