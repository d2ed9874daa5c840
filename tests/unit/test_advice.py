"""What would make models run faster, on computers that this is not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from computers import see, see_apple

from backends.advice import advice
from backends.contract import Probe

XLLAMACPP = Probe(backend="xllamacpp", available=True, version="1", devices=("CPU",))
LLAMA_CPP = replace(XLLAMACPP, backend="llama_cpp")
ONNX = replace(XLLAMACPP, backend="onnx")


def test_an_engine_without_cuda_beside_an_nvidia_card(tmp_path):
    (text,) = advice(see(tmp_path, "two_nvidia"), [LLAMA_CPP])
    assert text == (
        "llama-cpp-python is installed without CUDA, and NVIDIA GeForce RTX 4080 SUPER is there: with "
        'the CUDA toolkit installed, build it anew: CMAKE_ARGS="-DGGML_CUDA=on" pip install '
        "--force-reinstall --no-cache-dir llama-cpp-python"
    )


@pytest.mark.parametrize(
    ("computer", "flag", "kind"),
    [("two_nvidia", "-DGGML_CUDA=on", "CUDA"), ("wsl", "-DGGML_CUDA=on", "CUDA"),
     ("amd_card", "-DGGML_HIP=on", "ROCm"), ("intel", "-DGGML_VULKAN=on", "Vulkan")],
)  # fmt: skip
def test_each_vendor_has_its_builds(tmp_path, computer, flag, kind):
    hardware = see(tmp_path, computer)
    compiled, wheel = advice(hardware, [LLAMA_CPP, XLLAMACPP])
    assert flag in compiled
    assert f"without {kind}" in wheel and "--index-url INDEX" in wheel
    # one engine that can use it is enough, since it is preferred
    vendor = next(gpu for gpu in hardware.gpus if not gpu.integrated).vendor
    assert advice(hardware, [LLAMA_CPP, replace(XLLAMACPP, gpu_vendors=(vendor,))]) == []


def test_a_mac(tmp_path):
    (text,) = advice(see_apple(tmp_path), [XLLAMACPP])
    assert "without Metal" in text and "pip install --force-reinstall xllamacpp" in text


def test_onnx_has_a_package_for_cuda_only(tmp_path):
    (text,) = advice(see(tmp_path / "a", "wsl"), [ONNX])
    assert "pip install onnxruntime-gpu" in text
    assert advice(see(tmp_path / "b", "amd_card"), [ONNX]) == []


@pytest.mark.parametrize("computer", ["apu", "arm_board"])
def test_where_a_gpu_would_not_help_there_is_no_advice(tmp_path, computer):
    assert advice(see(tmp_path, computer), [XLLAMACPP, ONNX]) == []


def test_an_engine_that_is_not_there_needs_no_other_build(tmp_path):
    gone = replace(XLLAMACPP, available=False, reason="not installed")
    assert advice(see(tmp_path, "two_nvidia"), [gone]) == []


def test_a_container_s_limits(tmp_path):
    cores, memory = advice(see(tmp_path, "container"), [XLLAMACPP])
    assert "1 of 8 cores" in cores and "1.5 CPUs (/sys/fs/cgroup/cpu.max)" in cores
    assert "2.0 of 5.8 GiB" in memory


def test_cores_that_a_process_may_not_run_on(tmp_path):
    hardware = replace(
        see(tmp_path, "amd_card"), physical_cores=3, installed_cores=8, affinity=(0, 1, 2, 8)
    )
    (text,) = advice(hardware, [])
    assert "3 of 8 cores" in text and "0-2,8" in text


def test_a_mac_s_slow_cores_are_no_limit(tmp_path):
    assert advice(see_apple(tmp_path), []) == []


def test_a_build_without_the_cpu_s_instructions(tmp_path):
    hardware = see(tmp_path, "container")
    assert "avx2" in hardware.cpu_features
    old, new = (replace(XLLAMACPP, features=names) for names in (("SSE3",), ("SSE3", "AVX2")))
    assert any("does not use AVX2" in text for text in advice(hardware, [old]))
    assert not any("AVX2" in text for text in advice(hardware, [new]))


def test_memory_pressure_and_what_was_not_found_out(tmp_path):
    hardware = replace(see(tmp_path, "arm_board"), problems=("NVML is missing",))
    assert advice(hardware, [], pressure_percent=3.0) == ["NVML is missing"]
    assert "waited for memory 42 %" in advice(hardware, [], pressure_percent=42.0)[1]


@pytest.mark.parametrize("computer", ["two_nvidia", "amd_card", "intel", "container", "wsl"])
def test_no_advice_names_a_host(tmp_path, computer):
    for text in advice(see(tmp_path, computer), [XLLAMACPP, LLAMA_CPP, ONNX]):
        assert not re.search(r"https?://|\.(com|org|io|dev)\b", text)
