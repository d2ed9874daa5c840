"""What a build of llama.cpp says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backends import builds
from backends.contract import Gpu, Hardware, Probe

INFO = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | AVX512 = 0 | OPENMP = 1 | REPACK = 1 | "


def test_only_a_build_for_amx_keeps_weights_as_they_are():
    assert builds.lays_out_anew(INFO)
    assert builds.lays_out_anew(INFO + "AMX_INT8 = 0 | ")
    assert not builds.lays_out_anew(INFO + "AMX_INT8 = 1 | ")


def test_the_instruction_sets_are_those_that_are_on():
    assert builds.instruction_sets(INFO) == ("SSE3", "AVX", "AVX2", "OPENMP", "REPACK")


@pytest.mark.parametrize(
    ("devices", "vendors"),
    [
        (("CPU",), ()),
        (("CUDA0", "CUDA1", "CPU"), ("nvidia",)),
        (("ROCm0", "CPU"), ("amd",)),
        (("Vulkan0", "CPU"), ("amd", "intel", "nvidia")),
        (("Metal", "BLAS", "CPU"), ("apple",)),
        ((), ()),
    ],
)
def test_the_devices_tell_whose_gpus_a_build_can_use(devices, vendors):
    assert builds.gpu_vendors(devices) == vendors


def test_a_build_for_a_gpu_that_is_there_scores_more():
    machine = Hardware(
        cpu_model="x",
        physical_cores=4,
        logical_cores=8,
        ram_bytes=1,
        gpus=(Gpu(id="0", vendor="nvidia", name="RTX 3060"),),
    )
    cuda = Probe(backend="x", available=True, gpu_vendors=("nvidia",))
    rocm = Probe(backend="x", available=True, gpu_vendors=("amd",))
    assert builds.gpu_bonus(cuda, machine) == (30, ", can use RTX 3060")
    assert builds.gpu_bonus(rocm, machine) == (0, "")
    shared = Gpu(id="1", vendor="amd", name="Radeon 780M", integrated=True)
    assert builds.gpu_bonus(rocm, replace(machine, gpus=(shared,))) == (0, "")
