"""What the daemon costs over its engine, side by side in one run: `make bench`.

The same greedy requests go, in turn, to the engine in this process and to a daemon over HTTP. Both
have the same settings. Prints the median of each figure and of the ratio pair by pair; the machine
may be noisy, the ratios are what counts.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from running import SAMPLE, RunningDaemon  # noqa: E402

from backends import contract, hardware  # noqa: E402
from backends.registry import BUILTIN, load_class  # noqa: E402
from daemon.artifacts import gguf  # noqa: E402

TOKENS = 128


def question(number: int) -> list[dict[str, str]]:
    """A prompt that no cache has seen."""
    return [{"role": "user", "content": f"Number {number}: write a long story about a dog."}]


def direct(backend: contract.Backend, number: int) -> Iterator[None]:
    """Yield at every delta of the engine itself."""
    sampling = contract.Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    request = contract.ChatRequest(messages=tuple(question(number)), sampling=sampling)
    for _ in backend.chat(request, lambda: False):
        yield


def through(daemon: RunningDaemon, number: int) -> Iterator[None]:
    """Yield at every delta of the daemon's stream."""
    body = {
        "model": SAMPLE,
        "messages": question(number),
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection(*daemon.host_port, timeout=120)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    with connection.getresponse() as response:
        while line := response.readline():
            if b'"content":"' in line and b'"role"' not in line:
                yield
    connection.close()


def timed(deltas: Iterator[None]) -> tuple[float, float]:
    """Return milliseconds to the first delta, and deltas a second after it."""
    start = time.perf_counter()
    next(deltas)
    first = time.perf_counter()
    count = sum(1 for _ in deltas)
    return (first - start) * 1e3, count / (time.perf_counter() - first)


def load_direct(engine: str, path: str) -> contract.Backend:
    """Load the engine in this process as a worker would."""
    stat = Path(path).stat()
    file = contract.ModelFile(
        path=path, size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=""
    )
    artifact = gguf.to_artifact(gguf.read(path), (file,))
    cls = load_class(BUILTIN[engine])
    threads = hardware.detect().physical_cores
    settled = cls.estimate(artifact, contract.LoadOptions(threads=threads))
    backend = cls()
    backend.load(
        contract.LoadSpec(
            artifact=artifact,
            context_length=settled.context_length,
            slots=settled.slots,
            threads=threads,
            scratch_dir=".",
        ),
        lambda _: None,
    )
    return backend


def measure(engine: str, rounds: int, home: Path) -> None:
    """Run the comparison for one engine and print it."""
    daemon = RunningDaemon(home, MODELD_MODELS_BACKEND=engine).start()
    try:
        daemon.download()
        daemon.json("POST", f"/modeld/v1/models/{SAMPLE}/load")
        os.chdir(home)
        backend = load_direct(engine, daemon.model()["files"][0])
        pairs = []
        for number in range(rounds + 1):
            pairs.append((timed(direct(backend, number)), timed(through(daemon, number))))
        pairs = pairs[1:]  # the first round warms both up
    finally:
        daemon.stop()
    print(f"{engine}, {rounds} rounds of {TOKENS} tokens (median)")
    for index, name in enumerate(("first token, ms", "tokens a second")):
        ours = [pair[1][index] for pair in pairs]
        engines = [pair[0][index] for pair in pairs]
        ratios = [a / b for a, b in zip(ours, engines, strict=True)]
        print(
            f"  {name:16} engine {statistics.median(engines):8.1f}   "
            f"modeld {statistics.median(ours):8.1f}   ratio {statistics.median(ratios):.3f}"
        )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="xllamacpp", choices=sorted(BUILTIN))
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(options.engine, options.rounds, Path(name))
    sys.stdout.flush()
    os._exit(0)  # engines leave threads behind that abort an ordinary exit


if __name__ == "__main__":
    main()
