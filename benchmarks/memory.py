"""What loads take, beside what was estimated from headers alone: `make memory-table`.

Loads each case in a worker, uses it as far as it goes (prompts that fill the context in all slots at
once), and writes `benchmarks/memory.md`. Takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import contract_cases  # noqa: E402
import gguf_architectures  # noqa: E402
import gguf_models  # noqa: E402
import onnx_files  # noqa: E402
from peaks import MIB, Load, Peak, peak, picture  # noqa: E402

TABLE = ROOT / "benchmarks" / "memory.md"
ENGINES = {
    "xllamacpp": "xllamacpp",
    "llama_cpp": "llama-cpp-python",
    "onnx": "onnxruntime",
    "ctransformers": "ctransformers",
}
GGUF = ("xllamacpp", "llama_cpp")
MADE = (
    ("qwen3", "Q8_0", ""),
    ("gemma3", "Q4_0", ""),
    ("gpt2", "F16", ""),
    ("phi3", "Q4_K", "Q6_K"),
    ("starcoder2", "Q4_0", "Q8_0"),
    ("mamba", "Q8_0", ""),
    ("deepseek2", "Q4_K", "Q6_K"),
    ("lfm2", "Q4_0", "Q8_0"),
    ("granitehybrid", "Q8_0", ""),
)
INTRODUCTION = """# Memory: estimated and measured

Estimates are made before a load, from a model's headers alone. The peak is what the worker held after
it was used: its anonymous memory and the resident pages of its model files, with prompts that filled
the context in all slots at once (of a model that pools: batches of texts of full length).

SmolLM2-135M and MiniLM are real; the others have the shape of small published models (grouped and
single KV heads, windows, latent attention, experts, states) and random weights. What the two
llama.cpp engines take beside what headers tell was measured on SmolLM2-135M, on the model of Qwen3's
shape and on vocabularies alone, so that the other models of theirs check it; what onnxruntime and
ctransformers take was measured on the models of this table.

Written by `make memory-table` on {machine} with {versions}.

"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table. `build` writes or finds the model's files in a folder."""

    model: str
    build: Callable[[Path], Path]
    load: Load


def cases() -> Iterator[Case]:
    for engine in GGUF:
        for context_length in (512, 2048, 8192):
            for slots in (1, 4):
                load = Load(backend=engine, context_length=context_length, slots=slots)
                yield Case(model="SmolLM2-135M Q4_1", build=contract_cases.sample, load=load)
    load = Load(backend="onnx")
    yield Case(model="MiniLM-L6 int8", build=contract_cases.onnx_embedder, load=load)
    for name, kind, output in MADE:
        for engine in GGUF:
            yield Case(
                model=f"{name} {kind}",
                build=made(name, kind, output),
                load=Load(backend=engine, context_length=1024, slots=2),
            )
    for engine in GGUF:
        load = Load(backend=engine, context_length=1024, slots=2)
        yield Case(model="SmolLM2-135M, 8-bit cache", build=contract_cases.sample, load=Load(
            backend=engine, context_length=1024, slots=2,
            engine={"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
        ))  # fmt: skip
        yield Case(model="SmolLM2-135M and an adapter", build=with_adapter, load=load)
        yield Case(model="SmolLM2-135M and images", build=with_images, load=Load(
            backend=engine, context_length=1024, slots=2, image=picture(),
        ))  # fmt: skip
        load = Load(backend=engine, slots=2)
        yield Case(model="MiniLM-L6 F16", build=gguf_models.embedder, load=load)
    yield Case(model="a decoder (genai)", build=decoder, load=Load(backend="onnx"))
    for name in ("gpt2", "llama", "falcon"):
        load = Load(backend="ctransformers", threads=1)
        yield Case(model=f"a small GGML {name}", build=ggml(name), load=load)


def made(name: str, kind: str, output: str) -> Callable[[Path], Path]:
    recipe = getattr(gguf_architectures, name)
    return lambda folder: gguf_architectures.write(folder, recipe(), kind, output)


def ggml(name: str) -> Callable[[Path], Path]:
    return lambda folder: contract_cases.ggml(folder, name)


def decoder(folder: Path) -> Path:
    return onnx_files.decoder(folder / "decoder", context_length=512)


def with_adapter(folder: Path) -> Path:
    shutil.copy(contract_cases.sample(folder), folder)
    gguf_models.adapter(folder)
    return folder


def with_images(folder: Path) -> Path:
    shutil.copy(contract_cases.sample(folder), folder)
    gguf_models.image_encoder(folder)
    return folder


def row(case: Case, found: Peak) -> str:
    settled = found.estimate
    return (
        f"| {case.model} | {case.load.backend} | {settled.context_length} | {settled.slots} "
        f"| {settled.total_bytes / MIB:.1f} | {found.measured_bytes / MIB:.1f} "
        f"| {100 * found.error:+.1f} |"
    )


def installed() -> dict[str, str]:
    """Return the versions of the engines that are there."""
    found = {}
    for engine, distribution in ENGINES.items():
        try:
            found[engine] = f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            print(f"{distribution} is not installed: its rows are left out", file=sys.stderr)
    return found


def main() -> None:
    """Parse the command line, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure rows with this in them, write nothing")
    only = parser.parse_args().only
    versions = installed()
    lines = [
        "| model | engine | context | slots | estimate MiB | measured peak MiB | error % |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for case in cases():
        wanted = only in f"{case.model} {case.load.backend}"
        if not wanted or case.load.backend not in versions:
            continue
        with tempfile.TemporaryDirectory() as name:
            artifact = contract_cases.artifact_of(case.build(Path(name)))
            found = asyncio.run(peak(artifact, case.load))
        lines.append(row(case, found))
        print(lines[-1], flush=True)
    if not only:
        machine = f"{platform.system()} {platform.machine()}, 2 threads"
        text = INTRODUCTION.format(machine=machine, versions=", ".join(versions.values()))
        TABLE.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
