"""Which layers of a model go to which GPU, and what RAM still has to hold. Pure.

Written for engines that split a model by layers, as llama.cpp does: its last layers go to the GPUs,
in the order of the devices, and each GPU that is used has a compute buffer of its own. Knows no
file format: it is given bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from backends.contract import Gpu, Placement

GIB = 1024**3
# What a process takes of a GPU before it has loaded anything: Ollama counts 457 MiB for CUDA and
# for ROCm (github.com/ollama/ollama, discover/gpu.go).
CONTEXT_BYTES = 457 * 1024**2
# Left alone for displays and for what estimates miss. With the context this is near the 1024 MiB
# that llama.cpp leaves free on each device when it fits a model by itself (common.h).
HEADROOM_BYTES = 512 * 1024**2
# Time for a token is what the CPU reads plus what the GPU reads, so a share s on the GPU makes it
# at most 1 / (1 - s) faster. Below an eighth that is 14 % at best, and copies between the two and a
# context cost some of it. A rule of thumb.
MIN_SHARE = 1 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a load needs, in bytes.

    `layers` and `kv_cache` have an entry for each layer, the first one first; the KV cache is that
    of all slots. `output` is the last matrix with its norm, `embedding` the table of tokens, which
    stays in RAM. `compute` is needed on each GPU that is used, and in RAM.
    """

    layers: tuple[int, ...]
    kv_cache: tuple[int, ...]
    output: int
    embedding: int
    compute: int

    @property
    def units(self) -> tuple[int, ...]:
        """What each layer takes where it is computed; the output layer is the last."""
        pairs = zip(self.layers, self.kv_cache, strict=True)
        return (*(weights + cache for weights, cache in pairs), self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a load's layers go, and its bytes by purpose: of RAM, and of each GPU's own memory."""

    placement: Placement
    ram_parts: dict[str, int]
    gpu_parts: dict[str, dict[str, int]] = field(default_factory=dict)


def place(demand: Demand, gpus: Sequence[Gpu], *, gpu_layers: int | None = None) -> Plan:
    """Say where the layers of a model go.

    `gpus` are those that the engine can use, with their free memory. `gpu_layers` is what a user
    asked for: 0 is the CPU alone, and more than there are is all of them; it is taken as given,
    whether it fits or not. Without it, layers go where they fit and make sense.
    """
    if gpu_layers == 0:
        return _on_cpu(demand, "the option gpu_layers is 0")
    if not gpus:
        return _on_cpu(demand, Placement().reason)
    apple = next((gpu for gpu in gpus if gpu.vendor == "apple"), None)
    if gpu_layers is not None:
        return _as_asked(demand, gpus, min(gpu_layers, len(demand.units)))
    if apple is not None:
        return _all_or_nothing(demand, apple)
    own = [gpu for gpu in gpus if not gpu.integrated]
    if not own:
        return _on_cpu(
            demand,
            f"{gpus[0].name} shares the computer's RAM, where the CPU reads the weights as fast; "
            "the option gpu_layers puts layers there all the same",
        )
    known = [gpu for gpu in own if gpu.free_bytes is not None]
    if not known:
        return _on_cpu(demand, f"it is not known how much memory of {own[0].name} is free")
    return _where_it_fits(demand, known)


def _where_it_fits(demand: Demand, gpus: Sequence[Gpu]) -> Plan:
    vendors = sorted({gpu.vendor for gpu in gpus})
    chosen: list[tuple[Gpu, int]] = []
    for vendor in vendors:
        found = _best(demand, [gpu for gpu in gpus if gpu.vendor == vendor])
        if _count(found) > _count(chosen) or (
            _count(found) == _count(chosen) and len(found) < len(chosen)
        ):
            chosen = found
    layers = _count(chosen)
    roomiest = max(gpus, key=lambda gpu: gpu.free_bytes or 0)
    free = f"{roomiest.name} ({_gib(roomiest.free_bytes or 0)} free)"
    if not layers:
        return _on_cpu(demand, f"not one layer fits on {free}")
    units = demand.units
    if sum(units[len(units) - layers :]) < MIN_SHARE * sum(units):
        return _on_cpu(
            demand,
            f"only {layers} of {len(units)} layers would fit on {free}, too few to be faster",
        )
    return _on_gpus(demand, chosen, "")


def _count(split: Sequence[tuple[Gpu, int]]) -> int:
    return sum(layers for _, layers in split)


def _room(demand: Demand, gpu: Gpu) -> int:
    """Return the bytes of a GPU that layers may take."""
    return (gpu.free_bytes or 0) - CONTEXT_BYTES - HEADROOM_BYTES - demand.compute


def _by_room(demand: Demand, gpus: Sequence[Gpu]) -> list[Gpu]:
    return sorted(gpus, key=lambda gpu: (-_room(demand, gpu), gpu.pci))


def _best(demand: Demand, gpus: Sequence[Gpu]) -> list[tuple[Gpu, int]]:
    """Put as many layers as fit on as few of these GPUs as can hold them, the roomiest first."""
    roomy = _by_room(demand, gpus)
    counts = range(len(demand.units), 0, -1)
    most = next((count for count in counts if _fits(demand, gpus, count)), 0)
    for number in range(1, len(roomy) + 1):
        if used := _fits(demand, roomy[:number], most):
            return _even(demand, [gpu for gpu, _ in used], most) or used
    return []


def _fits(demand: Demand, gpus: Sequence[Gpu], layers: int) -> list[tuple[Gpu, int]] | None:
    """Fill the GPUs, one after the other, with the last `layers`; None if they do not fit."""
    units = demand.units[len(demand.units) - layers :]
    split, start = [], 0
    for gpu in _in_order(gpus):
        room, count = _room(demand, gpu), 0
        for size in units[start:]:
            room -= size
            if room < 0:
                break
            count += 1
        if count:
            split.append((gpu, count))
        start += count
    return split if start == layers else None


def _even(demand: Demand, gpus: Sequence[Gpu], layers: int) -> list[tuple[Gpu, int]] | None:
    """Share the last `layers` out in proportion to the room; None if one GPU would overflow."""
    units = demand.units[len(demand.units) - layers :]
    rooms = [max(1, _room(demand, gpu)) for gpu in gpus]
    bounds = [edge / sum(rooms) for edge in itertools.accumulate(rooms)]
    total = max(1, sum(units))
    counts, taken, before = [0] * len(gpus), [0] * len(gpus), 0
    for size in units:
        middle = (before + size / 2) / total
        index = next((i for i, bound in enumerate(bounds) if middle < bound), len(gpus) - 1)
        counts[index] += 1
        taken[index] += size
        before += size
    if any(size > room for size, room in zip(taken, rooms, strict=True)) or not all(counts):
        return None
    return list(zip(gpus, counts, strict=True))


def _in_order(gpus: Sequence[Gpu]) -> list[Gpu]:
    return sorted(gpus, key=lambda gpu: (gpu.pci, gpu.id))


def _as_asked(demand: Demand, gpus: Sequence[Gpu], layers: int) -> Plan:
    """Put as many layers on GPUs as a user wants, over as few of them as can hold these."""
    why = ", as the option gpu_layers asks"
    preferred = [gpu for gpu in gpus if not gpu.integrated or gpu.vendor == "apple"] or gpus
    vendor = max(preferred, key=lambda gpu: gpu.free_bytes or 0).vendor
    roomy = _by_room(demand, [gpu for gpu in preferred if gpu.vendor == vendor])
    for number in range(1, len(roomy) + 1):
        if split := _fits(demand, roomy[:number], layers):
            even = _even(demand, [gpu for gpu, _ in split], layers)
            return _on_gpus(demand, even or split, why)
    held = _in_order(roomy[:layers])
    return _on_gpus(demand, _even_regardless(demand, held, layers), why)


def _even_regardless(demand: Demand, gpus: Sequence[Gpu], layers: int) -> list[tuple[Gpu, int]]:
    """Share layers out in proportion to the room, at least one each, whether they fit or not."""
    rooms = [max(1, _room(demand, gpu)) for gpu in gpus]
    spare = layers - len(gpus)
    edges = [round(spare * edge / sum(rooms)) for edge in itertools.accumulate(rooms)]
    starts = [0, *edges[:-1]]
    return [(gpu, 1 + end - start) for gpu, start, end in zip(gpus, starts, edges, strict=True)]


def _all_or_nothing(demand: Demand, gpu: Gpu) -> Plan:
    """Apple's GPU reads the same RAM as the CPU: what does not fit as a whole gains nothing."""
    need = sum(demand.units) + demand.compute
    if gpu.free_bytes is None or need > gpu.free_bytes:
        free = "an unknown part" if gpu.free_bytes is None else _gib(gpu.free_bytes)
        return _on_cpu(
            demand,
            f"the GPU of {gpu.name} may use {free} of the RAM now, and {_gib(need)} is needed",
        )
    return _on_gpus(demand, [(gpu, len(demand.units))], "")


def _on_cpu(demand: Demand, reason: str) -> Plan:
    return Plan(
        placement=Placement(reason=f"all on the CPU: {reason}"),
        ram_parts={
            "weights": sum(demand.layers) + demand.output + demand.embedding,
            "kv_cache": sum(demand.kv_cache),
            "compute": demand.compute,
        },
    )


def _on_gpus(demand: Demand, split: Sequence[tuple[Gpu, int]], why: str) -> Plan:
    """Return the plan of a split whose GPUs are in the order of the layers."""
    weights, caches = (*demand.layers, demand.output), (*demand.kv_cache, 0)
    start = len(weights) - _count(split)
    ram = {
        "weights": sum(weights[:start]) + demand.embedding,
        "kv_cache": sum(caches[:start]),
        "compute": demand.compute,
    }
    parts: dict[str, dict[str, int]] = {}
    texts = []
    for gpu, layers in split:
        end = start + layers
        on_gpu = {
            "weights": sum(weights[start:end]),
            "kv_cache": sum(caches[start:end]),
            "compute": demand.compute,
        }
        free = "" if gpu.free_bytes is None else f" of {_gib(gpu.free_bytes)} free"
        if gpu.integrated:  # its memory is the RAM
            ram = {name: ram[name] + size for name, size in on_gpu.items()}
        else:
            parts[gpu.id] = on_gpu | {"runtime": CONTEXT_BYTES}
        used = sum((parts.get(gpu.id) or on_gpu).values())
        texts.append(f"{layers} of {len(weights)} layers on {gpu.name} ({_gib(used)}{free})")
        start = end
    return Plan(
        placement=Placement(
            gpu_layers=_count(split),
            layers=tuple((gpu.id, layers) for gpu, layers in split),
            reason=f"{', '.join(texts)}{why}",
        ),
        ram_parts=ram,
        gpu_parts=parts,
    )


def engine_split(
    placement: Placement, devices: Sequence[str] | None = None
) -> tuple[int, tuple[float, ...]]:
    """Return llama.cpp's `n_gpu_layers` and `tensor_split` for a placement.

    `devices` are the `Gpu.id` of the engine's GPUs in its own order: `device_ids` finds them. None
    is for a binding that does not tell: then the engine must see the GPUs of the placement only and
    in its order, which the environment of its worker sees to for CUDA. llama.cpp gives layer i of n
    to the first device whose share of the split, added to those before it, is over i / n: counts of
    layers therefore come out as they are. Raises ValueError that names a GPU the engine lacks.
    """
    if devices is None:
        return placement.gpu_layers, tuple(float(count) for _, count in placement.layers)
    missing = [gpu_id for gpu_id, _ in placement.layers if gpu_id not in devices]
    if missing:
        seen = ", ".join(devices) or "none"
        raise ValueError(f"the engine does not see the GPU {missing[0]}; it sees: {seen}")
    counts = dict(placement.layers)
    return placement.gpu_layers, tuple(float(counts.get(device, 0)) for device in devices)


def device_ids(devices: Sequence[tuple[str, str]]) -> list[str]:
    """Return the `Gpu.id` of an engine's GPUs, given as (name, PCI address) in the engine's order.

    ggml has the PCI address of CUDA, ROCm and Vulkan devices as `device_id`; Metal has none, and
    just the one GPU.
    """
    return [
        "metal:0" if name.startswith(("MTL", "Metal")) else pci.lower() for name, pci in devices
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
