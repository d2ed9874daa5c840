"""Asks an application in this process for downloads, and makes the files for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_files import Tensor, write_gguf

MIB = 1024**2
REPO = "owner/tiny"
NAMES = ("a", "b", "c", "d")  # of its models
Jobs = dict[str, dict[str, Any]]


def model(folder: Path, mib: int, seed: int) -> bytes:
    """Return a GGUF file of so much, unlike that of any other seed."""
    path = write_gguf(folder / f"{seed}.gguf", tensors=[Tensor(dimensions=(256, mib * 1024))])
    return path.read_bytes()[:-8] + seed.to_bytes(8, "big")


async def post(client: Any, path: str, body: Any = None, status: int = 200) -> Any:
    """Return the JSON of an answer of the native surface, which must have this status."""
    response = await client.post(f"/modeld/v1/{path}", json=body)
    assert response.status == status, await response.text()
    return json.loads(await response.text() or "null")


async def add(client: Any, *names: str) -> None:
    """Add models of the hub's REPO, each the file of its name."""
    for name in names:
        body = {"source": f"hf:{REPO}/{name}.gguf", "unique": name}
        await post(client, "models", body, 201)


async def jobs(client: Any) -> Jobs:
    """Return all downloads by the names of their models."""
    response = await client.get("/modeld/v1/downloads")
    return {job["unique"]: job for job in (await response.json())["downloads"]}


async def until(client: Any, holds: Callable[[Jobs], Any], within_s: float = 30) -> Jobs:
    """Return the downloads once that holds of them."""
    async with asyncio.timeout(within_s):
        while not holds(found := await jobs(client)):
            await asyncio.sleep(0.02)
    return found
