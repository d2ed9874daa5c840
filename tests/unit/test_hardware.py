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
