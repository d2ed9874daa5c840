"""What limits a process's RAM, from /proc and /sys of systems that this is not."""

from __future__ import annotations

import psutil
import pytest

from backends import hardware

MIB = 1024 * 1024


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_service_of_cgroup_v2_has_the_limit_of_its_own_group(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/system.slice/modeld.service\n")
    group = "sys/fs/cgroup/system.slice/modeld.service"
    write(tmp_path, f"{group}/memory.max", f"{600 * MIB}\n")
    write(tmp_path, f"{group}/memory.current", f"{500 * MIB}\n")
    write(tmp_path, f"{group}/memory.stat", f"anon 1\nfile 2\ninactive_file {400 * MIB}\n")
    write(tmp_path, "sys/fs/cgroup/system.slice/memory.max", "max\n")
    assert hardware.ram_bytes(tmp_path) == 600 * MIB
    # page cache that can be given up is free
    assert hardware.available_bytes(tmp_path) == 500 * MIB


def test_the_smallest_limit_on_the_way_up_counts(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", f"{300 * MIB}\n")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", f"{700 * MIB}\n")
    assert hardware.ram_bytes(tmp_path) == 300 * MIB


def test_a_container_sees_its_limit_at_the_top(tmp_path):
    """Its /proc/self/cgroup may name a path of the host, which is not there."""
    write(tmp_path, "proc/self/cgroup", "0::/../../docker/abc\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{2048 * MIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", f"{48 * MIB}\n")
    assert hardware.ram_bytes(tmp_path) == 2048 * MIB
    assert hardware.available_bytes(tmp_path) == 2000 * MIB


def test_cgroup_v1(tmp_path):
    write(tmp_path, "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    group = "sys/fs/cgroup/memory/docker/abc"
    write(tmp_path, f"{group}/memory.limit_in_bytes", f"{512 * MIB}\n")
    write(tmp_path, f"{group}/memory.usage_in_bytes", f"{100 * MIB}\n")
    assert hardware.ram_bytes(tmp_path) == 512 * MIB
    assert hardware.available_bytes(tmp_path) == 412 * MIB


def test_page_cache_of_a_container_as_recorded(tmp_path):
    """GuillaumeGomez/sysinfo#1219."""
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "7864320000\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", "2481475584\n")
    write(tmp_path, "sys/fs/cgroup/memory.stat", "inactive_anon 0\ninactive_file 4096\n")
    write(tmp_path, "proc/meminfo", "MemTotal: 65842220 kB\nMemAvailable: 60000000 kB\n")
    assert hardware.available_bytes(tmp_path) == 7864320000 - (2481475584 - 4096)


def test_a_group_of_cgroup_v1_may_have_colons_in_its_name(tmp_path):
    """As those of containerd have it: duckdb/duckdb#16608."""
    group = "kubepods-burstable-pod0.slice:cri-containerd:6ef1"
    write(tmp_path, "proc/self/cgroup", f"13:cpuset:/{group}\n12:memory:/{group}\n")
    write(tmp_path, f"sys/fs/cgroup/memory/{group}/memory.limit_in_bytes", f"{512 * MIB}\n")
    assert hardware.ram_bytes(tmp_path) == 512 * MIB


@pytest.mark.parametrize("directory", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
@pytest.mark.parametrize("listed", ["cpu,cpuacct", "cpuacct,cpu"])
def test_controllers_of_cgroup_v1_come_in_any_order(tmp_path, directory, listed):
    """Some kernels list cpuacct first (pingcap/tiflash#4879), whatever the directory is called."""
    write(tmp_path, "proc/cpuinfo", "processor: 0\n\nprocessor: 1\n\n")
    write(tmp_path, "proc/self/cgroup", f"3:{listed}:/\n2:cpuset:/\n")
    write(tmp_path, "sys/fs/cgroup/cpuset/cpuset.cpus", "0-1\n")
    write(tmp_path, f"sys/fs/cgroup/{directory}/cpu.cfs_quota_us", "150000\n")
    write(tmp_path, f"sys/fs/cgroup/{directory}/cpu.cfs_period_us", "100000\n")
    found = hardware.detect(tmp_path, system="linux")
    assert found.cpu_quota == 1.5
    assert found.sources["cpu_quota"] == f"/sys/fs/cgroup/{directory}/cpu.cfs_quota_us"


MEMORY_OF_WSL_1 = """\
MemTotal:       33483712 kB
MemFree:        22743224 kB
Buffers:           34032 kB
Cached:           188576 kB
SwapFree:18014396678257232 kB
"""  # of two computers: heim-rs/heim#305 and microsoft/WSL#4829


def test_a_kernel_that_does_not_say_what_is_available(tmp_path, monkeypatch):
    """The library fails there, and knows only this computer's /proc/meminfo."""
    monkeypatch.delattr("backends.hardware.memory.psutil.virtual_memory")
    write(tmp_path, "proc/meminfo", MEMORY_OF_WSL_1)
    assert hardware.available_bytes(tmp_path) == (22743224 + 34032 + 188576) * 1024
    write(tmp_path, "proc/meminfo", "MemTotal: 33483712 kB\nMemFree: 22743224 kB\n")
    assert hardware.available_bytes(tmp_path) == 22743224 * 1024


@pytest.mark.parametrize("text", ["", "max\n", "garbage\n", "9223372036854771712\n"])
def test_without_a_limit_it_is_the_machine_s_own(tmp_path, text):
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", text)
    assert hardware.ram_bytes(tmp_path) == psutil.virtual_memory().total


def test_a_system_without_cgroups(tmp_path):
    assert hardware.ram_bytes(tmp_path) == psutil.virtual_memory().total
    assert hardware.available_bytes(tmp_path) > 0


def test_this_machine():
    found = hardware.detect()
    assert 1 <= found.physical_cores <= found.logical_cores
    assert found.cpu_model and 0 < found.ram_bytes <= psutil.virtual_memory().total
