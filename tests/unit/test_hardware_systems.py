"""What is found on computers that this is not: their files stand in tests/unit/hardware."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from fnmatch import fnmatch

import pytest
from computers import (
    GIB,
    TREES,
    RecordedNvml,
    lay_out,
    no_nvml,
    no_sysctl,
    recorded_nvml,
    see,
    see_apple,
)

from backends import hardware
from backends.hardware import darwin

MIB = 1024**2


def test_two_nvidia_cards(tmp_path):
    found = see(tmp_path, "two_nvidia")
    assert [(gpu.name, gpu.pci, gpu.compute_capability) for gpu in found.gpus] == [
        ("NVIDIA GeForce RTX 4080 SUPER", "0000:01:00.0", "8.9"),
        ("NVIDIA GeForce RTX 2080 SUPER", "0000:0c:00.0", "7.5"),
    ]
    assert [gpu.total_bytes for gpu in found.gpus] == [17171480576, 8589934592]
    assert [gpu.free_bytes for gpu in found.gpus] == [16093544448, 7938768896]
    assert {gpu.driver for gpu in found.gpus} == {"595.71.05"}
    assert {gpu.integrated for gpu in found.gpus} == {False}
    assert found.gpus[0].sources["free_bytes"] == "NVML"
    assert found.problems == ()


def test_its_cpu_and_memory(tmp_path):
    found = see(tmp_path, "two_nvidia")
    assert found.cpu_model == "Intel(R) Xeon(R) w5-2455X"
    assert (found.physical_cores, found.installed_cores, found.logical_cores) == (4, 4, 8)
    assert found.affinity == (0, 1, 2, 3, 12, 13, 14, 15)
    assert {"avx2", "avx512", "avx512_vnni", "amx", "amx_int8"} <= set(found.cpu_features)
    assert found.installed_ram_bytes == found.ram_bytes == 65_333_248 * 1024
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
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 2080 SUPER", None),
    ]
    assert found.gpus[0].sources == {"name": "/proc/driver/nvidia/gpus/0000:01:00.0/information"}
    (problem,) = found.problems
    assert "pip install nvidia-ml-py" in problem


def test_without_nvml_nvidia_cards_are_named_and_nothing_is_loaded(tmp_path):
    lay_out(tmp_path, "two_nvidia")
    found = hardware.detect(tmp_path, system="linux")
    assert [gpu.id for gpu in found.gpus] == ["0000:01:00.0", "0000:0c:00.0"]
    assert [gpu.free_bytes for gpu in found.gpus] == [None, None]
    assert found.problems == () and "pynvml" not in sys.modules


def test_a_gpu_has_the_same_id_with_and_without_nvml(tmp_path):
    assert [gpu.id for gpu in see(tmp_path, "two_nvidia").gpus] == ["0000:01:00.0", "0000:0c:00.0"]


def test_a_card_of_a_virtual_machine_is_one_card(tmp_path):
    """NVML writes a PCI domain of 8 digits, the driver its last 4 (NVIDIA/nvidia-docker#1316)."""
    directory = tmp_path / "proc/driver/nvidia/gpus/cfdd:00:00.0"
    directory.mkdir(parents=True)
    (directory / "information").write_text("Model: \t\t Tesla K80\n")
    nvml = RecordedNvml(
        "450.51.06", [{"name": "Tesla K80", "busId": "03f8cfdd:00:00.0", "capability": (3, 7)}]
    )
    (gpu,) = hardware.detect(tmp_path, system="linux", open_nvml=lambda: nvml).gpus
    assert (gpu.id, gpu.compute_capability) == ("cfdd:00:00.0", "3.7")


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
    assert [gpu.total_bytes for gpu in found.gpus] == [None, 8589934592]
    assert found.problems == ("NVIDIA GeForce RTX 4080 SUPER: NVML does not tell its memory",)


def test_old_nvml_answers_in_bytes(tmp_path):
    lay_out(tmp_path, "wsl")
    nvml = recorded_nvml(tmp_path)
    for gpu in nvml.gpus:
        gpu.update(name=gpu["name"].encode(), busId=gpu["busId"].encode())
    (gpu,) = see(tmp_path, "wsl", nvml=lambda: nvml).gpus
    assert (gpu.name, gpu.pci) == ("Quadro RTX 4000", "0000:73:00.0")


def test_an_amd_card(tmp_path):
    found = see(tmp_path, "amd_card")
    (gpu,) = found.gpus
    assert gpu.name == "AMD Navi 21 [Radeon RX 6800/6800 XT / 6900 XT]"
    assert (gpu.vendor, gpu.driver, gpu.integrated) == ("amd", "amdgpu", False)
    assert gpu.id == gpu.pci == "0000:03:00.0"
    assert gpu.total_bytes == 17163091968
    assert gpu.free_bytes == 17163091968 - 668274688
    assert gpu.sources["name"] == "/usr/share/hwdata/pci.ids"
    assert gpu.sources["total_bytes"] == "/sys/class/drm/card0/device/mem_info_vram_total"
    assert (found.physical_cores, found.logical_cores) == (2, 4)
    assert found.affinity == (0, 1, 16, 17)
    assert found.problems == ()


def test_an_apu_computes_in_the_ram(tmp_path):
    found = see(tmp_path, "apu")
    (gpu,) = found.gpus
    assert gpu.name == "AMD Radeon Graphics (Cezanne)" and gpu.integrated
    assert gpu.total_bytes == 536870912 + 8068792320
    assert gpu.free_bytes == (536870912 - 155189248) + (8068792320 - 1051754496)
    # Cpus_allowed_list names CPUs that could be plugged in
    assert found.affinity == (0, 1, 2, 3)


def test_an_apu_has_no_more_than_the_ram_that_is_available(tmp_path):
    lay_out(tmp_path, "apu")
    meminfo = tmp_path / "proc/meminfo"
    meminfo.write_text(meminfo.read_text().replace("10485760 kB", "1048576 kB"))
    found = hardware.detect(tmp_path, system="linux", open_nvml=no_nvml)
    assert found.gpus[0].free_bytes == (536870912 - 155189248) + GIB


def test_an_apu_has_no_more_than_the_ram_whatever_its_limit(tmp_path):
    """A computer of 128 GB with 96 for the GPU, whose limit is as much again (ROCm/ROCm#5444)."""
    lay_out(tmp_path, "apu")
    device = tmp_path / "sys/class/drm/card0/device"
    (device / "device").write_text("0x1586\n")
    for name in ("vram_total", "gtt_total"):
        (device / f"mem_info_{name}").write_text("103079215104\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 32646368 kB\nMemAvailable: 30000000 kB\n")
    (gpu,) = hardware.detect(tmp_path, system="linux", open_nvml=no_nvml).gpus
    assert gpu.total_bytes == 103079215104 + 32646368 * 1024
    assert gpu.free_bytes == (103079215104 - 155189248) + 30000000 * 1024


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
    assert integrated.integrated and integrated.total_bytes == 16_386_136 * 1024
    assert integrated.free_bytes == 9_457_836 * 1024
    assert not card.integrated and card.name == "Intel GPU 56a5"
    assert card.total_bytes is None and card.free_bytes is None
    assert card.sources["total_bytes"] == "not told by the driver"


# BAR 2 of an A750, which has 8 GB, on two computers: raspberrypi/linux#6621, xCuri0/ReBarUEFI#11
@pytest.mark.parametrize("bar_bytes", [256 * MIB, GIB])
def test_what_the_cpu_sees_of_an_intel_card_is_not_its_memory(tmp_path, bar_bytes):
    lay_out(tmp_path, "intel")
    device = tmp_path / "sys/class/drm/card1/device"
    (device / "device").write_text("0x56a1\n")
    nothing = f"{0:#018x} {0:#018x} {0:#018x}\n"
    start = 0x1800000000
    (device / "resource").write_text(
        f"{0x1B00000000:#018x} {0x1B00FFFFFF:#018x} {0x140204:#018x}\n"
        f"{nothing}{start:#018x} {start + bar_bytes - 1:#018x} {0x14220C:#018x}\n"
    )
    card = hardware.detect(tmp_path, system="linux", open_nvml=no_nvml).gpus[1]
    assert card.name == "Intel GPU 56a1" and card.total_bytes is None


def test_intel_s_own_driver_tells_the_memory_beside_the_device(tmp_path):
    lay_out(tmp_path, "intel")
    (tmp_path / "sys/class/drm/card1/lmem_total_bytes").write_text(f"{6 * GIB}\n")
    card = hardware.detect(tmp_path, system="linux", open_nvml=no_nvml).gpus[1]
    assert card.total_bytes == 6 * GIB and card.free_bytes is None
    assert card.sources["total_bytes"] == "/sys/class/drm/card1/lmem_total_bytes"


def test_apple_silicon(tmp_path):
    found = see_apple(tmp_path)
    assert found.cpu_model == "Apple M4 Max" and found.platform == "darwin"
    # only the fast cores compute
    assert (found.physical_cores, found.installed_cores, found.logical_cores) == (12, 16, 16)
    assert found.cpu_features == ("bf16", "dotprod", "i8mm", "neon", "sme")
    assert found.ram_bytes == 64 * GIB
    (gpu,) = found.gpus
    assert (gpu.vendor, gpu.name, gpu.integrated) == ("apple", "Apple M4 Max", True)
    assert gpu.total_bytes == 64 * GIB * 3 // 4 and 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.sources["total_bytes"] == "Metal's share of sysctl hw.memsize"


@pytest.mark.parametrize(
    ("gib", "limit_mb", "usable_mib"),
    [("16", "0", 10922), ("32", "0", 21845), ("36", "0", 27648), ("64", "0", 49152), ("64", "57344", 57344),
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
    ("name", "installed_kib", "affinity", "quota_file"),
    [
        ("container", 6_067_396, tuple(range(8)), "/sys/fs/cgroup/cpu.max"),
        ("container_v1", 16_386_136, (2, 3, 4, 5), "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"),
    ],
)
def test_a_container_with_2_gib_and_one_and_a_half_cpus(
    tmp_path, name, installed_kib, affinity, quota_file
):
    found = see(tmp_path, name)
    assert found.cpu_quota == 1.5
    assert (found.physical_cores, found.installed_cores) == (1, 8)
    assert found.affinity == affinity and found.logical_cores == len(affinity)
    assert found.ram_bytes == found.memory_limit_bytes == 2 * GIB
    assert found.installed_ram_bytes == installed_kib * 1024
    assert hardware.ram_bytes(tmp_path) == 2 * GIB
    # less what is in use, but for the page cache, both halves of it
    assert hardware.available_bytes(tmp_path) == 2 * GIB - GIB + GIB // 4 + GIB // 4
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
    assert gpu.name == "Quadro RTX 4000" and gpu.total_bytes == 8589934592
    assert found.problems == ()


@pytest.mark.parametrize(
    ("cores", "physical", "source"),
    [("cpu cores\t: 2\n", 2, "/proc/cpuinfo cpu cores"),
     ("cpu cores\t: 64\n", 4, "/proc/cpuinfo cpu cores"),
     ("", 4, "one for each CPU: no topology is known")],
)  # fmt: skip
def test_wsl_1_gives_every_cpu_the_ids_of_the_first(tmp_path, cores, physical, source):
    """4 CPUs of 2 cores, as in microsoft/WSL#1256."""
    one = f"physical id\t: 0\nsiblings\t: 4\ncore id\t\t: 0\n{cores}apicid\t\t: 0\n\n"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "".join(f"processor\t: {number}\n{one}" for number in range(4))
    )
    found = hardware.detect(tmp_path, system="linux", open_nvml=no_nvml)
    assert (found.physical_cores, found.logical_cores) == (physical, 4)
    assert found.installed_cores == physical
    assert found.sources["physical_cores"] == source


def test_a_board_with_an_arm_cpu(tmp_path):
    found = see(tmp_path, "arm_board")
    # not its "Hardware", which names an older chip than this board has
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
            key for key, value in asdict(facts).items() if value not in (None, "", (), {}, 0, False)
        }
        # the kernel's driver is in the uevent that names the PCI address
        assert told - without - {"driver"} <= set(facts.sources), facts


def test_every_file_of_every_computer_says_where_it_was_recorded():
    """The README has a table for each computer: files, whether recorded or written, and where."""
    told: dict[str, list[str]] = {}
    for line in (TREES / "README.md").read_text().splitlines():
        if line.startswith("### "):
            patterns = told.setdefault(line.removeprefix("### ").strip("`"), [])
        elif told and re.fullmatch(r"\| `.+ \| (recorded|in part|written) \| .+ \|", line):
            patterns.extend(re.findall(r"`([^`]+)`", line.split(" | ")[0]))
    assert sorted(told) == sorted(path.stem for path in TREES.glob("*.tree"))
    for name, patterns in told.items():
        paths = re.findall(r"^=== (.+)$", (TREES / f"{name}.tree").read_text(), re.MULTILINE)
        for path in paths:
            assert any(fnmatch(path, pattern) for pattern in patterns), (name, path)
        for pattern in patterns:
            assert any(fnmatch(path, pattern) for path in paths), (name, pattern)
