"""Which layers go to which GPU, on computers that this is not and on any that could be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from computers import GIB, see, see_apple
from hypothesis import given
from hypothesis import strategies as st

from backends.contract import Gpu, Placement
from backends.placement import (
    CONTEXT_BYTES,
    HEADROOM_BYTES,
    MIN_SHARE,
    Demand,
    device_ids,
    engine_split,
    place,
)

MIB = 1024**2


def model(gib: float, layers: int = 32, *, kv_mib: int = 16) -> Demand:
    """A model of this many GiB, with an output layer like that of an 8B model."""
    output = 400 * MIB
    each = int((gib * GIB - 2 * output) / layers)
    return Demand(
        layers=(each,) * layers,
        kv_cache=(kv_mib * MIB,) * layers,
        output=output,
        embedding=output,
        compute=300 * MIB,
    )


def total(plan) -> int:
    """All weights and KV cache, wherever they are."""
    parts = [plan.ram_parts, *plan.gpu_parts.values()]
    return sum(part["weights"] + part["kv_cache"] for part in parts)


def test_a_model_that_fits_on_one_of_two_cards_goes_to_the_one_with_more_free_memory(tmp_path):
    gpus = see(tmp_path, "two_nvidia").gpus
    demand = model(8)
    plan = place(demand, gpus)
    assert plan.placement.layers == (("0000:01:00.0", 33),)
    assert plan.placement.gpu_layers == 33
    assert plan.placement.reason == (
        "33 of 33 layers on NVIDIA GeForce RTX 4080 SUPER (8.8 GiB of 15.0 GiB free)"
    )
    (parts,) = plan.gpu_parts.values()
    assert parts == {
        "weights": sum(demand.layers) + demand.output,
        "kv_cache": sum(demand.kv_cache),
        "compute": demand.compute,
        "runtime": CONTEXT_BYTES,
    }
    assert plan.ram_parts["weights"] == demand.embedding and plan.ram_parts["kv_cache"] == 0


def test_a_larger_one_is_split_over_both_by_their_free_memory(tmp_path):
    plan = place(model(18, 64), see(tmp_path, "two_nvidia").gpus)
    (first, many), (second, few) = plan.placement.layers
    assert (first, second) == ("0000:01:00.0", "0000:0c:00.0")  # in the order of the PCI bus
    assert many + few == plan.placement.gpu_layers == 65
    assert 1.8 < many / few < 2.4  # 15.0 and 7.4 GiB are free
    assert "RTX 4080" in plan.placement.reason and "RTX 2080" in plan.placement.reason


def test_of_one_that_is_too_large_the_last_layers_go_to_the_gpus(tmp_path):
    demand = model(28, 80)
    plan = place(demand, see(tmp_path, "two_nvidia").gpus)
    assert 50 < plan.placement.gpu_layers < 80
    in_ram = 81 - plan.placement.gpu_layers
    assert plan.ram_parts["weights"] == sum(demand.layers[:in_ram]) + demand.embedding
    assert total(plan) == sum(demand.units) + demand.embedding


def test_a_card_of_amd(tmp_path):
    plan = place(model(8), see(tmp_path, "amd_card").gpus)
    assert plan.placement.layers == (("0000:03:00.0", 33),)


def test_an_apu_shares_the_ram_so_the_cpu_computes(tmp_path):
    gpus = see(tmp_path, "apu").gpus
    plan = place(model(2), gpus)
    assert plan.placement.gpu_layers == 0 and plan.gpu_parts == {}
    assert "shares the computer's RAM" in plan.placement.reason
    # but who asks for it gets it, and the RAM is counted
    asked = place(model(2), gpus, gpu_layers=99)
    assert asked.placement.gpu_layers == 33 and asked.gpu_parts == {}
    assert asked.ram_parts["weights"] == plan.ram_parts["weights"]
    assert "gpu_layers" in asked.placement.reason


def test_intel_s_card_does_not_tell_what_is_free(tmp_path):
    plan = place(model(2), see(tmp_path, "intel").gpus)
    assert plan.placement.gpu_layers == 0
    assert "not known how much memory of Intel GPU 56a5 is free" in plan.placement.reason
    assert place(model(2), see(tmp_path, "intel").gpus, gpu_layers=5).placement.layers == (
        ("0000:0b:00.0", 5),
    )


def test_apple_takes_all_or_nothing(tmp_path):
    (gpu,) = see_apple(tmp_path).gpus
    gpu = replace(gpu, free_bytes=20 * GIB)
    fits, not_fits = place(model(8), [gpu]), place(model(26, 64), [gpu])
    assert fits.placement.layers == (("metal:0", 33),)
    assert fits.gpu_parts == {} and total(fits) == sum(model(8).units) + model(8).embedding
    assert not_fits.placement.gpu_layers == 0
    assert "may use 20.0 GiB of the RAM now" in not_fits.placement.reason


def test_without_a_gpu_everything_is_on_the_cpu(tmp_path):
    demand = model(4)
    plan = place(demand, see(tmp_path, "container").gpus)
    assert plan.placement.layers == () and "no GPU that this engine can use" in (
        plan.placement.reason
    )
    assert sum(plan.ram_parts.values()) == sum(demand.units) + demand.embedding + demand.compute


def card(free: float | None, number: int = 1, vendor: str = "nvidia", **facts) -> Gpu:
    pci = f"0000:{number:02x}:00.0"
    free_bytes = None if free is None else int(free * GIB)
    return Gpu(
        id=pci, pci=pci, vendor=vendor, name=f"{vendor} {number}", free_bytes=free_bytes, **facts
    )


def test_too_few_layers_to_matter_stay_on_the_cpu():
    plan = place(model(30, 60), [card(3.0)])
    assert plan.placement.gpu_layers == 0
    assert "too few to be faster" in plan.placement.reason and "of 61 layers" in (
        plan.placement.reason
    )


def test_a_card_that_is_full_is_left_alone():
    plan = place(model(4), [card(0.9)])
    assert plan.placement.reason == "all on the CPU: not one layer fits on nvidia 1 (0.9 GiB free)"


def test_cards_of_different_vendors_are_not_mixed():
    plan = place(model(20, 40), [card(10, 1, "nvidia"), card(12, 2, "amd"), card(6, 3, "nvidia")])
    assert {gpu for gpu, _ in plan.placement.layers} == {"0000:01:00.0", "0000:03:00.0"}


def test_no_more_cards_than_are_needed():
    plan = place(model(16, 40), [card(12, 1), card(12, 2), card(4, 3), card(4, 4)])
    assert [gpu for gpu, _ in plan.placement.layers] == ["0000:01:00.0", "0000:02:00.0"]


@pytest.mark.parametrize(("asked", "given_"), [(1, 1), (20, 20), (33, 33), (10_000, 33)])
def test_who_asks_for_layers_gets_them(asked, given_):
    plan = place(model(8), [card(2.0)], gpu_layers=asked)
    assert plan.placement.gpu_layers == given_
    assert sum(count for _, count in plan.placement.layers) == given_
    assert plan.placement.reason.endswith("as the option gpu_layers asks")


def test_who_asks_for_none_gets_none():
    plan = place(model(1), [card(24)], gpu_layers=0)
    assert plan.placement.layers == () and "gpu_layers is 0" in plan.placement.reason


# what holds for any model and any GPUs

SIZES = st.integers(0, 3 * GIB)
DEMANDS = st.integers(1, 12).flatmap(
    lambda n: st.builds(
        Demand,
        layers=st.lists(SIZES, min_size=n, max_size=n).map(tuple),
        kv_cache=st.lists(SIZES, min_size=n, max_size=n).map(tuple),
        output=SIZES,
        embedding=SIZES,
        compute=SIZES,
    )
)
GPUS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.floats(0, 40)),
        st.sampled_from(["nvidia", "amd", "intel", "apple"]),
        st.booleans(),
    ),
    max_size=5,
).map(
    lambda facts: [
        card(free, number, vendor, integrated=shared or vendor == "apple")
        for number, (free, vendor, shared) in enumerate(facts, 1)
    ]
)


@given(DEMANDS, GPUS, st.one_of(st.none(), st.integers(0, 20)))
def test_every_byte_is_somewhere_and_layers_add_up(demand, gpus, asked):
    plan = place(demand, gpus, gpu_layers=asked)
    assert sum(count for _, count in plan.placement.layers) == plan.placement.gpu_layers
    assert all(count > 0 for _, count in plan.placement.layers)
    assert plan.placement.gpu_layers <= len(demand.units)
    assert total(plan) == sum(demand.units) + demand.embedding
    assert min(min(parts.values()) for parts in (plan.ram_parts, *plan.gpu_parts.values())) >= 0
    used = [gpu for gpu, _ in plan.placement.layers]
    assert len(set(used)) == len(used)
    vendors = {gpu.vendor for gpu in gpus if gpu.id in used}
    assert len(vendors) <= 1
    if asked is not None and gpus:
        assert plan.placement.gpu_layers == min(asked, len(demand.units))


@given(DEMANDS, GPUS)
def test_no_gpu_gets_more_than_is_free(demand, gpus):
    plan = place(demand, gpus)
    free = {gpu.id: gpu.free_bytes for gpu in gpus}
    for gpu_id, parts in plan.gpu_parts.items():
        assert free[gpu_id] is not None
        assert sum(parts.values()) + HEADROOM_BYTES <= free[gpu_id]
    if plan.gpu_parts:
        on_gpus = sum(part["weights"] + part["kv_cache"] for part in plan.gpu_parts.values())
        assert on_gpus >= MIN_SHARE * sum(demand.units)


@given(DEMANDS, GPUS.filter(bool), st.floats(0.1, 30), st.data())
def test_more_free_memory_never_means_fewer_layers(demand, gpus, more, data):
    index = data.draw(st.integers(0, len(gpus) - 1))
    before = place(demand, gpus).placement.gpu_layers
    if gpus[index].vendor == "apple" or any(gpu.vendor == "apple" for gpu in gpus):
        gpus = [gpu for gpu in gpus if gpu.vendor == "apple"][:1]
        before, index = place(demand, gpus).placement.gpu_layers, 0
    bigger = list(gpus)
    free = (bigger[index].free_bytes or 0) + int(more * GIB)
    bigger[index] = replace(bigger[index], free_bytes=free)
    assert place(demand, bigger).placement.gpu_layers >= before


# what llama.cpp is told


def as_llama_cpp_does(n_gpu_layers: int, split: tuple[float, ...], layers: int) -> list[int]:
    """Count each device's layers as llama-model.cpp does, in 32-bit floats."""
    import ctypes

    def single(value: float) -> float:
        return ctypes.c_float(value).value

    edges, reached = [], 0.0
    for share in split:
        reached = single(reached + share)
        edges.append(reached)
    edges = [single(edge / reached) for edge in edges]
    active = min(n_gpu_layers, layers + 1)
    counts = [0] * len(split)
    for layer in range(active):
        at = single(single(layer) / active)
        counts[next(i for i, edge in enumerate(edges) if edge > at)] += 1
    return counts


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any))
def test_counts_of_layers_come_out_of_llama_cpp_as_they_are(counts):
    ids = [f"0000:{number:02x}:00.0" for number in range(len(counts))]
    placement = Placement(
        gpu_layers=sum(counts),
        layers=tuple((gpu, count) for gpu, count in zip(ids, counts, strict=True) if count),
    )
    layers, split = engine_split(placement, ids)
    assert as_llama_cpp_does(layers, split, sum(counts) + 5) == counts


def test_the_split_is_in_the_order_of_the_engine():
    placement = Placement(gpu_layers=33, layers=(("0000:17:00.0", 23), ("0000:65:00.0", 10)))
    devices = device_ids([("CUDA0", "0000:65:00.0"), ("CUDA1", "0000:17:00.0"), ("Vulkan0", "")])
    assert engine_split(placement, devices) == (33, (10.0, 23.0, 0.0))
    assert engine_split(placement) == (33, (23.0, 10.0))
    assert engine_split(Placement(), devices) == (0, (0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"does not see the GPU 0000:17:00\.0; it sees: none"):
        engine_split(placement, [])


def test_metal_has_one_device_without_an_address():
    assert device_ids([("MTL0", "")]) == ["metal:0"]
    assert device_ids([("CUDA0", "0000:0A:00.0")]) == ["0000:0a:00.0"]
