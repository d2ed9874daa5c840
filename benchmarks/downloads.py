"""Downloads beside curl, from one server on this machine, side by side: `python benchmarks/downloads.py`.

A file of 2 GB is fetched by turns by modeld's fetcher, which hashes and journals it, and by curl,
which does neither: as fast as both can, and from a server that limits each connection to 50 MB/s.
Then what the fetcher's memory peaks at for a tenth of the size is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from aiohttp import web

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fetch_driver import Fetcher, Places  # noqa: E402
from gguf_files import Tensor, write_gguf  # noqa: E402

MIB = 1024**2
LIMIT_BYTES_S = 50_000_000
BLOCK = 256 * 1024


def make(path: Path, mib: int) -> None:
    """A valid GGUF of so much noise."""
    write_gguf(path, tensors=[Tensor(dimensions=(256, mib * 1024))])
    with path.open("r+b") as file:
        file.seek(-mib * MIB, os.SEEK_END)
        block = os.urandom(MIB)
        for _ in range(mib):
            file.write(block)


async def serve(folder: Path, address: Path) -> None:
    """Serve the files of `folder`: fast by sendfile, and below /slow by 50 MB/s a connection."""

    async def slow(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["name"]
        size = path.stat().st_size
        first, _, last = request.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, end = int(first or 0), min(int(last) + 1, size) if last else size
        response = web.StreamResponse(status=206 if first else 200)
        response.headers.update({"ETag": '"1"', "Content-Length": str(end - start)})
        if first:
            response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        await response.prepare(request)
        began, at = time.monotonic(), start
        with path.open("rb") as file:
            file.seek(start)
            while at < end:
                await response.write(chunk := file.read(min(BLOCK, end - at)))
                at += len(chunk)
                ahead = (at - start) / LIMIT_BYTES_S - (time.monotonic() - began)
                if ahead > 0:
                    await asyncio.sleep(ahead)
        return response

    app = web.Application()
    app.router.add_get("/slow/{name}", slow)
    app.router.add_static("/fast", folder)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address.write_text(f"http://127.0.0.1:{runner.addresses[0][1]}\n", encoding="utf-8")
    await asyncio.Event().wait()


def by_modeld(url: str, work: Path) -> tuple[float, float]:
    """Return the seconds that modeld's fetcher takes for it, and its peak memory in MiB."""
    places = Places(root=work / "store")
    began = time.monotonic()
    with Fetcher(places) as child:
        child.order(url)
        process, peak = psutil.Process(child.process.pid), [0]

        def watch() -> None:
            while child.process.poll() is None:
                try:
                    peak[0] = max(peak[0], process.memory_info().rss)
                except psutil.Error:
                    return
                time.sleep(0.05)

        threading.Thread(target=watch, daemon=True).start()
        outcome = child.outcome()
    took = time.monotonic() - began
    outcome.fetched  # noqa: B018  raises if it failed
    subprocess.run(["rm", "-rf", str(places.root)], check=True)
    return took, peak[0] / MIB


def by_curl(url: str, work: Path) -> float:
    """Return the seconds that one stream of curl takes for it."""
    target = work / "curl.out"
    began = time.monotonic()
    subprocess.run(["curl", "-sS", "-o", str(target), url], check=True)
    took = time.monotonic() - began
    target.unlink()
    return took


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mib", type=int, default=1907, help="size of the file; 1907 is 2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=("fast", "slow"), default=("fast", "slow"))
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(*options.serve))
        return
    with tempfile.TemporaryDirectory(prefix="modeld-bench-") as directory:
        work = Path(directory)
        (work / "files").mkdir()
        make(work / "files" / "large.gguf", options.mib)
        make(work / "files" / "small.gguf", max(1, options.mib // 10))
        address = work / "address"
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(work / "files"), str(address)]
        )
        try:
            while not (address.exists() and address.read_text().endswith("\n")):
                time.sleep(0.05)
            base = address.read_text().strip()
            size = (work / "files" / "large.gguf").stat().st_size
            peaks = []
            for kind in options.kinds:
                url = f"{base}/{kind}/large.gguf"
                ours, theirs = [], []
                for _ in range(options.rounds):
                    theirs.append(by_curl(url, work))
                    took, peak = by_modeld(url, work)
                    ours.append(took)
                    peaks.append(peak)
                mine, curl = statistics.median(ours), statistics.median(theirs)
                print(
                    f"{kind}: {size / 1e9:.2f} GB by modeld in {mine:.2f} s ({size / mine / 1e6:.0f} "
                    f"MB/s), by curl in {curl:.2f} s ({size / curl / 1e6:.0f} MB/s): "
                    f"{100 * curl / mine:.0f} % of curl's rate",
                    flush=True,
                )
            _, small = by_modeld(f"{base}/fast/small.gguf", work)
            print(f"peak memory: {max(peaks):.0f} MiB; for a tenth of the size {small:.0f} MiB")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
