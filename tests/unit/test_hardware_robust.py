"""Detection answers in time and never raises, whatever it finds."""

from __future__ import annotations

import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import hardware

PATHS = """
proc/cpuinfo proc/meminfo proc/self/status proc/self/cgroup proc/pressure/memory
proc/sys/kernel/osrelease proc/device-tree/model proc/driver/nvidia/gpus/0000:01:00.0/information
sys/fs/cgroup/memory.max sys/fs/cgroup/memory.current sys/fs/cgroup/memory.stat
sys/fs/cgroup/cpu.max sys/devices/system/cpu/cpu0/topology/core_cpus_list
sys/class/drm/card0/device/vendor sys/class/drm/card0/device/device
sys/class/drm/card0/device/uevent sys/class/drm/card0/lmem_total_bytes
sys/class/drm/card0/device/mem_info_vram_total sys/class/drm/card0/device/mem_info_vram_used
sys/class/drm/card0/device/mem_info_gtt_total sys/class/drm/card0/device/gpu_metrics
sys/class/drm/card0/device/product_name usr/share/hwdata/pci.ids
""".split()
WORDS = [
    "0::/", "4:memory:/a", "2:cpu:/", ":::", "processor : 0", "processor: 99999999999999999999",
    "flags :", "Features: asimd", "core id : x", "MemTotal: 1 kB", "MemTotal: -5 kB", "MemTotal:",
    "MemAvailable: 9 MB", "Cpus_allowed_list: 0-", "Cpus_allowed_list: 9-1,,x,0-99999999",
    "0x1002", "0x8086", "0x10de", "0x15bf", "DRIVER=amdgpu", "PCI_SLOT_NAME=0000:00:02.0", "-1",
    "max", "0", "100000 0", "1e9", "\u0665", "1_0", "inactive_file x", "inactive_file", "NaN",
]  # fmt: skip
LINES = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=20)), max_size=6)
CONTENT = st.one_of(LINES.map(lambda lines: "\n".join(lines).encode("utf-8", "replace")),
                    st.binary(max_size=40))  # fmt: skip


def put(root, path, content):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def look(root, **options):
    options = {"system": "linux", "open_nvml": broken_nvml, "deadline_s": 5.0, **options}
    found = hardware.detect(root, **options)
    assert 1 <= found.physical_cores <= found.logical_cores
    assert found.cpu_model and found.ram_bytes >= 0
    assert hardware.ram_bytes(root) == found.ram_bytes
    assert hardware.available_bytes(root) >= 0
    return found


def broken_nvml():
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(PATHS), CONTENT, max_size=12))
def test_garbage(tmp_path_factory, contents):
    root = tmp_path_factory.mktemp("root")
    for path, content in contents.items():
        put(root, path, content)
    look(root)


def test_nothing_at_all(tmp_path):
    assert look(tmp_path / "missing").gpus == ()


@pytest.mark.parametrize("path", PATHS)
def test_a_directory_a_pipe_or_a_loop_where_a_file_should_be(tmp_path, path):
    (tmp_path / "a" / path).mkdir(parents=True)
    look(tmp_path / "a")
    pipe = tmp_path / "b" / path
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    look(tmp_path / "b")
    loop = tmp_path / "c" / path
    loop.parent.mkdir(parents=True)
    loop.symlink_to(loop)
    look(tmp_path / "c")


@pytest.mark.alone
def test_huge_files_are_read_only_in_part(tmp_path):
    for path in PATHS:
        put(tmp_path, path, b"")
        os.truncate(tmp_path / path, 50 * 1024**3)
    start = time.monotonic()
    look(tmp_path)
    assert time.monotonic() - start < 2


@pytest.mark.alone
def test_a_computer_of_many_cpus_and_cards(tmp_path):
    cpuinfo = "".join(f"processor: {n}\ncore id: {n}\nflags: avx2\n\n" for n in range(2048))
    put(tmp_path, "proc/cpuinfo", cpuinfo.encode())
    for number in range(200):
        put(tmp_path, f"sys/class/drm/card{number}/device/vendor", b"0x1002")
        put(tmp_path, f"sys/class/drm/card{number}/device/device", b"0x744c")
    start = time.monotonic()
    found = look(tmp_path)
    assert time.monotonic() - start < 2
    assert found.logical_cores == 2048 and len(found.gpus) == 64


def test_permission_denied(tmp_path, monkeypatch):
    def refused(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    for path in PATHS:
        put(tmp_path, path, b"1")
    monkeypatch.setattr("backends.hardware.files.os.open", refused)
    monkeypatch.setattr("backends.hardware.files.os.scandir", refused)
    look(tmp_path)


def test_the_library_fails_too(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("couldn't find line 'MemTotal'")

    monkeypatch.setattr("backends.hardware.memory.psutil.virtual_memory", broken)
    monkeypatch.setattr("backends.hardware.memory.psutil.swap_memory", broken)
    assert look(tmp_path).ram_bytes == 0


@pytest.fixture
def hanging():
    """Give a call that hangs until the test is over."""
    over = threading.Event()
    yield lambda *_: over.wait(30)
    over.set()


class HangingNvml:
    """Hangs in one of its functions."""

    def __init__(self, function, hang):
        setattr(self, function, hang)

    def __getattr__(self, name):
        return lambda *_: 1


@pytest.mark.alone
@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo"])
def test_nvml_that_hangs_is_left_behind(tmp_path, hanging, function):
    put(tmp_path, "dev/nvidiactl", b"")
    put(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", b"Model: \t RTX 3090\n")
    put(tmp_path, "sys/class/drm/card1/device/vendor", b"0x1002")
    put(tmp_path, "sys/class/drm/card1/device/device", b"0x744c")
    nvml = HangingNvml(function, hanging)
    start = time.monotonic()
    found = look(tmp_path, open_nvml=lambda: nvml, deadline_s=0.1)
    assert time.monotonic() - start < 1
    assert [gpu.vendor for gpu in found.gpus] == ["nvidia", "amd"]
    assert found.gpus[0].name == "RTX 3090" and found.gpus[0].total_bytes is None
    assert found.problems == (
        "NVML did not answer in time: the memory of NVIDIA's GPUs is not known",
    )


def test_a_package_that_hangs_on_import(tmp_path, hanging):
    put(tmp_path, "dev/nvidiactl", b"")
    found = look(tmp_path, open_nvml=hanging, deadline_s=0.1)
    assert "did not answer in time" in found.problems[0]


def test_the_default_deadline_leaves_room_below_2_s():
    assert hardware.detect.__kwdefaults__["deadline_s"] <= 1.5


@pytest.mark.parametrize(
    "nvml",
    [None, object(), HangingNvml("nvmlDeviceGetCount", lambda: -3),
     HangingNvml("nvmlDeviceGetCount", lambda: 10**9),
     HangingNvml("nvmlDeviceGetHandleByIndex", lambda _: 1 / 0),
     HangingNvml("nvmlShutdown", lambda: 1 / 0)],
)  # fmt: skip
def test_nvml_that_answers_nonsense(tmp_path, nvml):
    put(tmp_path, "dev/nvidiactl", b"")
    found = look(tmp_path, open_nvml=lambda: nvml)
    assert len(found.gpus) <= 64


def test_no_thread_can_be_started(tmp_path, monkeypatch):
    def refused(_thread):
        raise RuntimeError("can't start new thread")

    put(tmp_path, "dev/nvidiactl", b"")
    monkeypatch.setattr(threading.Thread, "start", refused)
    found = look(tmp_path)
    assert len(found.problems) == 2 and found.gpus == ()
