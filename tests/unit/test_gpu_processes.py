"""What a process has of GPUs' own memory, as kernels and NVML tell it."""

from __future__ import annotations

import json

import pytest
from computers import lay_out, recorded_nvml

from backends import hardware

# Documentation/gpu/xe/xe-drm-usage-stats.rst of Linux, without the keys of engines
XE = """\
pos:\t0
flags:\t0100002
drm-driver:\txe
drm-client-id:\t3
drm-pdev:\t0000:03:00.0
drm-total-system:\t0
drm-resident-system:\t4 MiB
drm-total-gtt:\t192 KiB
drm-resident-gtt:\t192 KiB
drm-total-vram0:\t23992 KiB
drm-shared-vram0:\t16 MiB
drm-resident-vram0:\t23992 KiB
drm-resident-stolen:\t0
"""
AMDGPU = """\
drm-driver:\tamdgpu
drm-client-id:\t{client}
drm-pdev:\t0000:0B:00.0
drm-memory-vram:\t{vram} KiB
drm-memory-gtt: \t512 KiB
"""


def open_files(root, *texts, pid=7):
    folder = root / f"proc/{pid}/fdinfo"
    folder.mkdir(parents=True)
    for number, text in enumerate(("pos:\t0\nflags:\t02\n", *texts)):
        (folder / str(number)).write_text(text)


def test_intel_s_driver_tells_it(tmp_path):
    open_files(tmp_path, XE)
    assert hardware.gpu_bytes(7, tmp_path) == {"0000:03:00.0": 23992 * 1024}


def test_amd_s_driver_tells_it_in_its_own_words(tmp_path):
    open_files(tmp_path, AMDGPU.format(client=1, vram=100), AMDGPU.format(client=2, vram=11))
    assert hardware.gpu_bytes(7, tmp_path) == {"0000:0b:00.0": 111 * 1024}


def test_a_descriptor_that_was_copied_counts_once(tmp_path):
    open_files(tmp_path, *[AMDGPU.format(client=1, vram=100)] * 3)
    assert hardware.gpu_bytes(7, tmp_path) == {"0000:0b:00.0": 100 * 1024}


def test_what_rocm_has_is_told_by_its_own_driver(tmp_path):
    open_files(tmp_path, AMDGPU.format(client=1, vram=4))
    node = tmp_path / "sys/class/kfd/kfd/topology/nodes/1"
    node.mkdir(parents=True)
    (node / "gpu_id").write_text("50128\n")
    (node / "properties").write_text("cpu_cores_count 0\nlocation_id 2816\ndomain 0\n")
    process = tmp_path / "sys/class/kfd/kfd/proc/7"
    process.mkdir(parents=True)
    (process / "vram_50128").write_text("2147483648\n")
    assert hardware.gpu_bytes(7, tmp_path) == {"0000:0b:00.0": 2**31}


@pytest.mark.parametrize("text", ["drm-pdev:\tx\ndrm-resident-vram0:\tmany KiB\n", "", "\0"])
def test_what_can_not_be_read_is_nothing(tmp_path, text):
    open_files(tmp_path, text)
    assert not any(hardware.gpu_bytes(7, tmp_path).values())
    assert hardware.gpu_bytes(8, tmp_path) == {}


def test_nvml_tells_what_each_process_has(tmp_path):
    lay_out(tmp_path, "two_nvidia")
    told = json.loads((tmp_path / "nvml.json").read_text())
    told["gpus"][0]["processes"] = {"7": 123, "8": None}
    (tmp_path / "nvml.json").write_text(json.dumps(told))
    nvml = recorded_nvml(tmp_path)
    found = hardware.detect(tmp_path, system="linux", open_nvml=lambda: nvml)
    assert [gpu.processes for gpu in found.gpus] == [{7: 123}, {}]
