"""The main job on the sample model, shown step by step: `make demo`.

Starts a daemon on a data directory of its own, downloads the model with progress over a WebSocket,
loads it, streams an answer, unloads it, and stops the daemon. Exit status 0 if all of it worked.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil

MODEL = "smollm2:135m-instruct-q4_1"
QUESTION = "Where is the Eiffel Tower?"
MIB = 1024 * 1024


class DemoFailed(Exception):
    """A step did not do what it should."""


def say(text: str) -> None:
    print(text, flush=True)


def memory_of(pid: int) -> tuple[int, int]:
    """The resident MiB of the daemon and of all its children."""
    daemon = psutil.Process(pid)
    children = sum(child.memory_info().rss for child in daemon.children(recursive=True))
    return daemon.memory_info().rss // MIB, children // MIB


def show_memory(when: str, pid: int) -> int:
    daemon, children = memory_of(pid)
    say(f"   RAM {when}: daemon {daemon} MiB, workers {children} MiB")
    return children


async def wait_for_address(home: Path, process: subprocess.Popen[bytes]) -> str:
    file = home / "run" / "modeld" / "address"
    while not (file.is_file() and file.read_text(encoding="utf-8").endswith("\n")):
        if process.poll() is not None:
            raise DemoFailed(f"the daemon ended with status {process.returncode}")
        await asyncio.sleep(0.05)
    return file.read_text(encoding="utf-8").split("\n")[0]


async def download(session: aiohttp.ClientSession, model_id: str) -> None:
    say(f"1. Download {MODEL}, progress over the WebSocket:")
    async with session.ws_connect(f"/model/{model_id}/download/progress") as socket:
        async with session.post(f"/model/{model_id}/download") as answer:
            answer.raise_for_status()
        async for message in socket:
            frame = json.loads(message.data)
            say(f"   {frame['status']:12} {frame['percentage']:6.2f} %")
            if frame["status"] == "COMPLETED":
                return
            if frame["status"] in ("FAILED", "CANCELED"):
                raise DemoFailed("the download did not complete")


async def ask(session: aiohttp.ClientSession) -> str:
    say(f"3. Ask: {QUESTION}")
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text = ""
    async with session.post("/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        print("   ", end="")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                text += piece
                print(piece, end="", flush=True)
            if "usage" in chunk:
                say(f"\n   {json.dumps(chunk['usage'])}")
    return text


async def tour(home: Path, process: subprocess.Popen[bytes]) -> None:
    url = await wait_for_address(home, process)
    say(f"   modeld is at {url}")
    async with aiohttp.ClientSession(url) as session:
        async with session.get(f"/model/{MODEL}") as answer:
            model_id = (await answer.json())["id"]
        await download(session, model_id)
        say("2. Load it into memory:")
        before = show_memory("before", process.pid)
        async with session.post(f"/model/{model_id}/load") as answer:
            answer.raise_for_status()
            ram = (await answer.json())["ram"]["readable"]
        loaded = show_memory("loaded", process.pid)
        say(f"   modeld measured {ram} for the model")
        text = await ask(session)
        say("4. Unload it:")
        async with session.post(f"/model/{model_id}/unload") as answer:
            answer.raise_for_status()
        after = show_memory("after", process.pid)
        if "Paris" not in text or loaded <= before or after > before:
            raise DemoFailed("the answer is wrong, or memory did not come back")


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="modeld-demo-") as name:
        home = Path(name)
        (home / "run").mkdir()
        command = [sys.executable, "-m", "daemon", "serve", "--listen", "127.0.0.1:0"]
        process = subprocess.Popen(
            [*command, "--data-dir", str(home / "data")],
            env=os.environ | {"XDG_RUNTIME_DIR": str(home / "run")},
            stderr=(home / "log").open("wb"),
        )
        say("0. Start the daemon:")
        try:
            asyncio.run(asyncio.wait_for(tour(home, process), timeout=150))
        except (DemoFailed, OSError, TimeoutError, aiohttp.ClientError) as error:
            sys.stderr.write((home / "log").read_text(encoding="utf-8"))
            raise SystemExit(f"the demo failed: {error!r}") from error
        finally:
            process.terminate()
            status = process.wait(timeout=30)
        say(f"5. The daemon has stopped with status {status}.")
    say(f"That took {time.monotonic() - started:.1f} s.")


if __name__ == "__main__":
    main()
