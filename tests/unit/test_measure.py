"""What a worker really uses: its anonymous memory, and its own weight files in full."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from daemon.memory.measure import parse_private, parse_smaps, private_bytes, worker_use

MB = 1_000_000
WEIGHTS = "/data/models/my model.gguf"


def mapping(path: str, *, rss: int, anonymous: int = 0, swap: int = 0, flags: str = "r--p") -> str:
    """Return one mapping of /proc/PID/smaps, as the kernel writes it; sizes are in kB."""
    inode = 1234 if path.startswith("/") else 0
    return (
        f"7f0000000000-7f0000100000 {flags} 00000000 fe:01 {inode:<26} {path}\n"
        f"Size:               9000 kB\n"
        f"KernelPageSize:        4 kB\n"
        f"Rss:           {rss:>9} kB\n"
        f"Pss:                   1 kB\n"
        f"Shared_Clean:          2 kB\n"
        f"Private_Dirty: {anonymous:>9} kB\n"
        f"Referenced:            3 kB\n"
        f"Anonymous:     {anonymous:>9} kB\n"
        f"KSM:                   5 kB\n"
        f"LazyFree:              6 kB\n"
        f"AnonHugePages:      2048 kB\n"
        f"ShmemPmdMapped:        7 kB\n"
        f"Swap:          {swap:>9} kB\n"
        f"SwapPss:               9 kB\n"
        f"THPeligible:           0\n"
        f"VmFlags: rd mr mw me ac\n"
    )


def used(*mappings: str, files: tuple[str, ...] = (WEIGHTS,)) -> int:
    """Return what these mappings count, in kB."""
    return parse_smaps("".join(mappings).encode(), files).total_bytes // 1024


def test_anonymous_memory_counts():
    assert used(mapping("[heap]", rss=300, anonymous=300), mapping("", rss=50, anonymous=40)) == 340


def test_the_resident_pages_of_its_own_weights_count_in_full():
    assert used(mapping(WEIGHTS, rss=5000, flags="r--s")) == 5000


def test_written_pages_of_a_private_mapping_of_its_weights_count_once():
    assert used(mapping(WEIGHTS, rss=5000, anonymous=1200, flags="rw-p")) == 5000


def test_of_other_files_only_written_pages_count():
    library = "/usr/lib/libc.so.6"
    assert used(mapping(library, rss=1500), mapping(library, rss=16, anonymous=12)) == 12


def test_a_file_that_is_mapped_in_parts_counts_with_all_of_them():
    parts = [mapping(WEIGHTS, rss=size) for size in (100, 20, 3)]
    assert used(*parts) == 123


def test_only_the_very_files_are_its_weights():
    for other in (f"{WEIGHTS}.old", f"{WEIGHTS} (deleted)", "/other/my model.gguf"):
        assert used(mapping(other, rss=5000)) == 0
    assert used(mapping(WEIGHTS, rss=5000), files=()) == 0


def test_mappings_do_not_run_into_each_other():
    assert (
        used(
            mapping(WEIGHTS, rss=1000),
            mapping("/usr/lib/libc.so.6", rss=700, anonymous=7),
            mapping("/models/second.gguf", rss=400),
            mapping("[stack]", rss=50, anonymous=50),
            mapping("[vdso]", rss=4),
            files=(WEIGHTS, "/models/second.gguf"),
        )
        == 1000 + 7 + 400 + 50
    )


def test_what_is_swapped_out_is_still_its_own():
    assert used(mapping("[heap]", rss=300, anonymous=300, swap=70)) == 370


def test_what_is_shared_is_told_from_what_is_its_own():
    text = mapping(WEIGHTS, rss=5000, anonymous=1200) + mapping("[heap]", rss=30, anonymous=30)
    use = parse_smaps(text.encode(), (WEIGHTS, "/not/mapped"))
    assert use.private_bytes == 1230 * 1024
    assert use.files == {WEIGHTS: 3800 * 1024}


def test_its_own_memory_alone_is_known_from_its_status():
    status = b"Name:\tpython\nVmRSS:\t  900 kB\nRssAnon:\t  300 kB\nRssFile:\t  600 kB\nVmSwap:\t   5 kB\n"
    assert parse_private(status) == 305 * 1024
    assert parse_private(b"") == 0


def test_nothing_is_zero():
    assert parse_smaps(b"", (WEIGHTS,)).total_bytes == 0


# for real

USES_MEMORY = """
import mmap, sys
print("started", flush=True)
sys.stdin.readline()
with open(sys.argv[1], "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(weights[at] for at in range(0, len(weights), mmap.PAGESIZE))
anonymous = mmap.mmap(-1, int(sys.argv[2]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(anonymous), mmap.PAGESIZE):
    anonymous[at] = 1
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_maps_20_mb_and_touches_30_mb_uses_50_mb_more(tmp_path):
    weights = tmp_path / "weights.gguf"
    weights.write_bytes(os.urandom(20 * MB))
    files = [os.path.realpath(weights)]
    with subprocess.Popen(
        [sys.executable, "-c", USES_MEMORY, str(weights), str(30 * MB)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "started\n"
            bare = worker_use(process.pid, files).total_bytes
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            use = worker_use(process.pid, files)
            quick = private_bytes(process.pid)
        finally:
            process.kill()
    assert use.total_bytes - bare == pytest.approx(50 * MB, rel=0.1)
    assert use.files == {files[0]: pytest.approx(20 * MB, rel=0.1)}
    assert quick == pytest.approx(use.private_bytes, rel=0.1)
    assert 0 < bare < 20 * MB


def test_a_process_that_has_gone_uses_nothing():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait(timeout=10)
    assert not psutil.pid_exists(process.pid)
    assert worker_use(process.pid, []).total_bytes == 0
    assert private_bytes(process.pid) == 0
