"""`modeld doctor`: asks the running daemon, or looks by itself where none runs, and prints."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from daemon.cli.client import FAILED, NO_DAEMON, Client, CommandError, find
from daemon.cli.output import as_json, table
from daemon.errors import ConfigError
from daemon.units import size

_FEATURES = ("avx2", "avx512", "avx512_vnni", "amx", "dotprod", "i8mm", "sve")


def doctor(arguments: Namespace) -> int:
    """Print the report and return the exit status: 0 if anything can run here, else 1."""
    try:
        found = Client(find()).call("GET", "/modeld/v1/doctor")
    except CommandError as error:
        if error.status != NO_DAEMON:
            raise
        found = _look()
    print(as_json(found) if arguments.json else "\n".join(_lines(found)))
    return 0 if found["ok"] else FAILED


def _look() -> dict[str, Any]:
    """Make the report without a daemon; the catalog is read from a copy, and nothing is changed."""
    from daemon import config, service

    logging.getLogger("daemon").addHandler(logging.NullHandler())  # the report says it all
    settings = config.load(config.default_file(), os.environ, {})
    settings = msgspec.structs.replace(settings, remote={})  # nobody's network is asked
    catalog = service.data_dir_default(os.environ) / "catalog.db"
    with tempfile.TemporaryDirectory(prefix="modeld-doctor-") as scratch:
        copied = Path(scratch) / "copy"
        copied.mkdir()
        try:
            for name in (catalog.name, f"{catalog.name}-wal"):
                if (file := catalog.with_name(name)).is_file():
                    shutil.copy(file, copied / name)
            return asyncio.run(_report(settings, copied))
        except (OSError, ConfigError) as error:
            empty = Path(scratch) / "empty"
            empty.mkdir()
            found = asyncio.run(_report(settings, empty))
            found["advice"].insert(0, f"the catalog {catalog} cannot be read: {error}")
            return found


async def _report(settings: Any, data_dir: Path) -> dict[str, Any]:
    from backends.registry import Registry
    from daemon import service
    from daemon.api.doctor import facts
    from daemon.doctor import report

    async with service.running_services(settings, data_dir, Registry.installed()) as parts:
        return report(await facts(parts, running=False))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    if found["running"]:
        yield f"modeld {found['version']} is running."
    else:
        yield f"modeld {found['version']} is not running: start it with `modeld serve`."
    yield from ("", "COMPUTER", *_computer(found["hardware"], found["memory"]))
    yield from ("", "ENGINES", *_engines(found["engines"]))
    yield from ("", "DOWNLOADED MODELS", *_models(found["models"]))
    yield from ("", "WHAT WOULD HELP", *_advice(found["advice"]))


def _computer(hardware: dict[str, Any], memory: dict[str, Any]) -> Iterator[str]:
    cores, installed = hardware["physical_cores"], hardware["installed_cores"]
    known = [name for name in _FEATURES if name in hardware["cpu_features"]]
    quota = hardware["cpu_quota"]
    yield (
        f"  CPU   {hardware['cpu_model']}: {cores} of {max(cores, installed)} cores"
        + (f", a quota of {quota:g} CPUs" if quota else "")
        + (f"; {' '.join(known)}" if known else "")
    )
    limit = hardware["memory_limit_bytes"]
    yield (
        f"  RAM   {size(hardware['installed_ram_bytes'])}"
        + (f", of which modeld may use {size(limit)}" if limit else "")
        + f"; models may take {size(memory['budget_bytes'])}, "
        f"{size(memory['available_bytes'])} of it now"
    )
    pressure = memory["pressure_percent"]
    told = "" if pressure is None else f"; programs wait for memory {pressure:.0f} % of the time"
    swap = size(hardware["swap_bytes"]) if hardware["swap_bytes"] else "none"
    yield f"  swap  {swap}{told}"
    for gpu in hardware["gpus"]:
        free, total = gpu["free_bytes"], gpu["total_bytes"]
        if total is None:
            memory_text = "memory not known"
        elif free is None:
            memory_text = f"{size(total)}, how much is free is not known"
        else:
            memory_text = f"{size(free)} of {size(total)} free"
        shared = ", shared with the CPU" if gpu["integrated"] else ""
        yield f"  GPU   {gpu['name']} ({gpu['driver'] or 'no driver'}): {memory_text}{shared}"
    if not hardware["gpus"]:
        yield "  GPU   none"


def _engines(engines: list[dict[str, Any]]) -> Iterator[str]:
    rows = [
        (
            engine["backend"],
            engine["version"] or "-",
            ", ".join(engine["devices"]) or "-",
            " ".join(engine["features"]) if engine["available"] else "not available",
        )
        for engine in engines
    ]
    yield from _indented(table(("NAME", "VERSION", "COMPUTES ON", "BUILT WITH"), rows))
    for engine in engines:
        if not engine["available"]:
            yield f"  {engine['backend']}: {engine['reason']}"


def _models(models: list[dict[str, Any]]) -> Iterator[str]:
    if not models:
        yield "  none; `modeld list` shows what there is, `modeld pull MODEL` downloads"
    for model in models:
        yield f"  {model['unique']}"
        if model["problem"]:
            yield f"    cannot run: {model['problem']}"
        if not model["backend"]:
            continue
        yield f"    engine   {model['backend']}: {model['reason']}"
        yield f"    where    {model['placement']}; {model['threads']} threads"
        yield (
            f"    settings a context of {model['context_length']} tokens for each of "
            f"{model['slots']} requests at once"
        )
        needs = {"RAM": model["parts"]} | model["gpu_parts"]
        for where, parts in needs.items():
            text = ", ".join(f"{size(part)} {name}" for name, part in parts.items() if part)
            yield f"    needs    {size(sum(parts.values()))} of {where}: {text}"
        if model["fits"] == "alone":
            yield "    fits     not now: too little RAM is free"


def _advice(texts: list[str]) -> Iterator[str]:
    if not texts:
        yield "  nothing that modeld knows of"
    for text in texts:
        yield f"  - {text}"


def _indented(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield f"  {line}"
