"""What is found on computers that this is not: their files stand in tests/unit/hardware."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest
from computers import GIB, TREES, lay_out, no_nvml, no_sysctl, recorded_nvml, see, see_apple

from backends import hardware
from backends.hardware import darwin


def test_two_nvidia_cards(tmp_path):
    found = see(tmp_path, "two_nvidia")
    assert [(gpu.name, gpu.pci, gpu.compute_capability) for gpu in found.gpus] == [
        ("NVIDIA GeForce RTX 4090", "0000:17:00.0", "8.9"),
        ("NVIDIA GeForce RTX 3060", "0000:65:00.0", "8.6"),
    ]
    assert [gpu.total_bytes for gpu in found.gpus] == [25757220864, 12884901888]
    assert [gpu.free_bytes for gpu in found.gpus] == [25174736896, 9663676416]
    assert {gpu.driver for gpu in found.gpus} == {"550.107.02"}
    assert {gpu.integrated for gpu in found.gpus} == {False}
    assert found.gpus[0].sources["free_bytes"] == "NVML"
    assert found.problems == ()


def test_its_cpu_and_memory(tmp_path):
    found = see(tmp_path, "two_nvidia")
    assert found.cpu_model == "Intel(R) Xeon(R) w5-2455X"
    assert (found.physical_cores, found.installed_cores, found.logical_cores) == (4, 4, 8)
    assert found.affinity == tuple(range(8))
    assert {"avx2", "avx512", "avx512_vnni", "amx", "amx_int8"} <= set(found.cpu_features)
    assert found.installed_ram_bytes == found.ram_bytes == 131_665_432 * 1024
    assert found.swap_bytes == 8_388_604 * 1024
    assert found.memory_limit_bytes is None and found.cpu_quota is None
    assert found.memory_pressure and found.platform == "linux"


def test_nvml_is_closed_again(tmp_path):
    lay_out(tmp_path, "two_nvidia")
    nvml = recorded_nvml(tmp_path)
    hardware.detect(tmp_path, system="linux", open_nvml=lambda: nvml)
    assert nvml.open == 0


def test_without_nvml_s_package_nvidia_cards_are_named_and_it_is_said_what_to_install(tmp_path):
    found = see(tmp_path, "two_nvidia", nvml=no_nvml)
    assert [(gpu.name, gpu.total_bytes) for gpu in found.gpus] == [
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA GeForce RTX 3060", None),
    ]
    assert found.gpus[0].sources == {"name": "/proc/driver/nvidia/gpus/0000:17:00.0/information"}
    (problem,) = found.problems
    assert "pip install nvidia-ml-py" in problem


def test_without_nvml_nvidia_cards_are_named_and_nothing_is_loaded(tmp_path):
    lay_out(tmp_path, "two_nvidia")
    found = hardware.detect(tmp_path, system="linux")
    assert [gpu.id for gpu in found.gpus] == ["0000:17:00.0", "0000:65:00.0"]
    assert [gpu.free_bytes for gpu in found.gpus] == [None, None]
    assert found.problems == () and "pynvml" not in sys.modules


def test_a_gpu_has_the_same_id_with_and_without_nvml(tmp_path):
    assert [gpu.id for gpu in see(tmp_path, "two_nvidia").gpus] == ["0000:17:00.0", "0000:65:00.0"]


def test_a_card_with_the_free_driver_is_named_and_can_not_compute(tmp_path):
    device = tmp_path / "sys/class/drm/card0/device"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "device").write_text("0x2504\n")
    (device / "uevent").write_text("DRIVER=nouveau\nPCI_SLOT_NAME=0000:01:00.0\n")
    found = hardware.detect(tmp_path, system="linux", open_nvml=no_sysctl)
    (gpu,) = found.gpus
    assert (gpu.name, gpu.driver) == ("NVIDIA GPU 2504", "nouveau")
    assert "without NVIDIA's driver" in found.problems[0]


def test_a_card_whose_memory_nvml_does_not_tell(tmp_path):
    lay_out(tmp_path, "two_nvidia")
    nvml = recorded_nvml(tmp_path)
    del nvml.gpus[0]["total"]
    found = see(tmp_path, "two_nvidia", nvml=lambda: nvml)
    assert [gpu.total_bytes for gpu in found.gpus] == [None, 12884901888]
    assert found.problems == ("NVIDIA GeForce RTX 4090: NVML does not tell its memory",)


def test_old_nvml_answers_in_bytes(tmp_path):
    lay_out(tmp_path, "wsl")
    nvml = recorded_nvml(tmp_path)
    for gpu in nvml.gpus:
        gpu.update(name=gpu["name"].encode(), busId=gpu["busId"].encode())
    (gpu,) = see(tmp_path, "wsl", nvml=lambda: nvml).gpus
    assert (gpu.name, gpu.pci) == ("NVIDIA GeForce RTX 4070 Ti", "0000:01:00.0")


def test_an_amd_card(tmp_path):
    found = see(tmp_path, "amd_card")
    (gpu,) = found.gpus
    assert gpu.name == "AMD Navi 31 [Radeon RX 7900 XT/7900 XTX/7900 GRE/7900M]"
    assert (gpu.vendor, gpu.driver, gpu.integrated) == ("amd", "amdgpu", False)
    assert gpu.id == gpu.pci == "0000:03:00.0"
    assert gpu.total_bytes == 25753026560
    assert gpu.free_bytes == 25753026560 - 1326448640
    assert gpu.sources["name"] == "/usr/share/hwdata/pci.ids"
    assert gpu.sources["total_bytes"] == "/sys/class/drm/card1/device/mem_info_vram_total"
    assert (found.physical_cores, found.logical_cores) == (2, 4)
    assert found.problems == ()


def test_an_apu_computes_in_the_ram(tmp_path):
    found = see(tmp_path, "apu")
    (gpu,) = found.gpus
    assert gpu.name == "AMD Radeon Graphics (Phoenix)" and gpu.integrated
    assert gpu.total_bytes == 4294967296 + 14609971200
    assert gpu.free_bytes == (4294967296 - 536870912) + (14609971200 - 104857600)
    # Cpus_allowed_list names CPUs that could be plugged in
    assert found.affinity == (0, 1, 2, 3)


def test_an_apu_has_no_more_than_the_ram_that_is_available(tmp_path):
    lay_out(tmp_path, "apu")
    meminfo = tmp_path / "proc/meminfo"
    meminfo.write_text(meminfo.read_text().replace("20971520 kB", "1048576 kB"))
    found = hardware.detect(tmp_path, system="linux", open_nvml=no_nvml)
    assert found.gpus[0].free_bytes == (4294967296 - 536870912) + GIB


@pytest.mark.parametrize(
    ("header", "integrated"),
    [(b"\x78\x00\x01\x03", False), (b"\x98\x00\x02\x04", True), (b"\x00\x01\x03\x00", True),
     (b"", False), (b"\x98\x00", False)],
)  # fmt: skip
def test_an_apu_that_is_not_known_yet_is_told_by_its_metrics(tmp_path, header, integrated):
    lay_out(tmp_path, "apu")
    device = tmp_path / "sys/class/drm/card0/device"
    (device / "device").write_text("0xfff1\n")
    (device / "gpu_metrics").write_bytes(header + bytes(64) if len(header) == 4 else header)
    (gpu,) = hardware.detect(tmp_path, system="linux", open_nvml=no_nvml).gpus
    assert gpu.integrated is integrated
    assert gpu.sources["integrated"].endswith("gpu_metrics")


def test_intel_s_integrated_gpu_and_card(tmp_path):
    integrated, card = see(tmp_path, "intel").gpus
    assert integrated.integrated and integrated.total_bytes == 16_289_484 * 1024
    assert integrated.free_bytes == 12_000_000 * 1024
    assert not card.integrated and card.name == "Intel GPU 56a0"
    assert card.total_bytes == 16 * GIB and card.free_bytes is None
    assert card.sources["total_bytes"] == "/sys/class/drm/card1/device/resource BAR 2"


def test_apple_silicon(tmp_path):
    found = see_apple(tmp_path)
    assert found.cpu_model == "Apple M2 Pro" and found.platform == "darwin"
    # only the fast cores compute
    assert (found.physical_cores, found.installed_cores, found.logical_cores) == (8, 12, 12)
    assert found.cpu_features == ("bf16", "dotprod", "i8mm", "neon")
    assert found.ram_bytes == 32 * GIB
    (gpu,) = found.gpus
    assert (gpu.vendor, gpu.name, gpu.integrated) == ("apple", "Apple M2 Pro", True)
    assert gpu.total_bytes == 32 * GIB * 2 // 3 and 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.sources["total_bytes"] == "Metal's share of sysctl hw.memsize"


@pytest.mark.parametrize(
    ("gib", "limit_mb", "usable_mib"),
    [("16", "0", 10922), ("36", "0", 27648), ("64", "0", 49152), ("64", "57344", 57344),
     ("16", "999999", 16384)],
)  # fmt: skip
def test_what_the_gpu_of_a_mac_may_use(tmp_path, gib, limit_mb, usable_mib):
    changed = {"hw.memsize": str(int(gib) * GIB), "iogpu.wired_limit_mb": limit_mb}
    (gpu,) = see_apple(tmp_path, **changed).gpus
    assert gpu.total_bytes // 2**20 == usable_mib
    if limit_mb != "0":
        assert gpu.sources["total_bytes"] == "sysctl iogpu.wired_limit_mb"


@pytest.mark.skipif(sys.platform == "darwin", reason="there it answers")
def test_sysctl_where_there_is_none():
    assert darwin.sysctl("hw.memsize") is None


def test_a_mac_that_answers_nothing(tmp_path):
    found = hardware.detect(tmp_path, system="darwin", sysctl=lambda name: None)
    assert found.cpu_model == "unknown CPU" and found.physical_cores >= 1 and found.gpus == ()


@pytest.mark.parametrize(
    ("name", "affinity", "quota_file"),
    [
        ("container", tuple(range(8)), "/sys/fs/cgroup/cpu.max"),
        ("container_v1", (2, 3, 4, 5), "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"),
    ],
)
def test_a_container_with_2_gib_and_one_and_a_half_cpus(tmp_path, name, affinity, quota_file):
    found = see(tmp_path, name)
    assert found.cpu_quota == 1.5
    assert (found.physical_cores, found.installed_cores) == (1, 8)
    assert found.affinity == affinity and found.logical_cores == len(affinity)
    assert found.ram_bytes == found.memory_limit_bytes == 2 * GIB
    assert found.installed_ram_bytes == 65_842_220 * 1024
    assert hardware.ram_bytes(tmp_path) == 2 * GIB
    assert hardware.available_bytes(tmp_path) == 2 * GIB - GIB + GIB // 4
    assert found.sources["physical_cores"] == found.sources["cpu_quota"] == quota_file
    assert found.sources["ram_bytes"].startswith("/sys/fs/cgroup/memory")
    assert not found.memory_pressure and found.gpus == ()


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("50000 100000", 1), ("250000 100000", 2), ("1600000 100000", 8),
     ("100000 0", 8), ("0 100000", 8), ("-1 100000", 8), ("garbage", 8), ("", 8)],
)  # fmt: skip
def test_a_cpu_quota_is_rounded_down_but_never_to_nothing(tmp_path, quota, cores):
    lay_out(tmp_path, "container")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(quota)
    found = hardware.detect(tmp_path, system="linux", open_nvml=no_nvml)
    assert found.physical_cores == cores


def test_wsl_with_an_nvidia_card(tmp_path):
    found = see(tmp_path, "wsl")
    assert found.platform == "wsl" and not found.memory_pressure
    (gpu,) = found.gpus
    assert gpu.name == "NVIDIA GeForce RTX 4070 Ti" and gpu.total_bytes == 12878610432
    assert found.problems == ()


def test_a_board_with_an_arm_cpu(tmp_path):
    found = see(tmp_path, "arm_board")
    assert found.cpu_model == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.cpu_features == ("dotprod", "neon")
    assert (found.physical_cores, found.logical_cores) == (4, 4)


def test_nvml_is_not_asked_where_there_is_no_sign_of_it(tmp_path):
    asked = []
    hardware.detect(tmp_path, system="linux", open_nvml=lambda: asked.append(1))
    assert asked == []


@pytest.mark.parametrize("name", sorted(path.stem for path in TREES.glob("*.tree")))
def test_every_fact_says_where_it_came_from_and_goes_into_json(tmp_path, name):
    lay_out(tmp_path, name)
    answers = {}
    if name == "apple_silicon":
        lines = (tmp_path / "sysctl").read_text().splitlines()
        answers = dict(line.split(": ", 1) for line in lines)
    nvml = recorded_nvml(tmp_path) if (tmp_path / "nvml.json").exists() else None
    found = hardware.detect(
        tmp_path,
        system="darwin" if answers else "linux",
        sysctl=answers.get,
        open_nvml=lambda: nvml,
    )
    json.dumps(asdict(found))
    hash(found)
    for facts in (found, *found.gpus):
        without = {"sources", "problems", "gpus", "platform", "id", "vendor", "pci"}
        told = {
            key for key, value in asdict(facts).items() if value not in (None, "", (), 0, False)
        }
        # the kernel's driver is in the uevent that names the PCI address
        assert told - without - {"driver"} <= set(facts.sources), facts
