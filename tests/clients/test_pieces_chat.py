"""The real chat clients of Pieces, unpatched: PiecesClient of the Python SDK, and pieces-cli.

They look for the daemon at the ports of Pieces OS, so it listens at one of them, and nothing else may.
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from running import SAMPLE, RunningDaemon, environment

ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / ".venv" / "pieces-cli" / "bin" / "pieces"
QUESTION = "Where is the Eiffel Tower?"
ALIASES = ["GPT-3.5-turbo Chat Model", "GPT-4o Chat Model", "Gemini 2.0 Flash Lite Chat Model"]
WAIT_S = 60.0
pytestmark = pytest.mark.alone  # a server of another test may be given one of the ports by chance

# Ends with os._exit: closing its sockets takes the client some seconds.
DRIVE = """
import json, os, sys, time
from pieces_os_client.wrapper import PiecesClient

def text(frames):
    return "".join(a.text for f in frames if f.question for a in f.question.answers.iterable)

client = PiecesClient()
assert client.is_pieces_running(maxium_retries=8)  # of itself it waits for 0.1 s
seen = {"models": client.available_models_names, "version": client.version,
        "health": client.health}
PiecesClient.wait_for_cache()
frames = list(client.copilot.stream_question(sys.argv[1]))
seen |= {"text": text(frames), "statuses": [frame.status for frame in frames]}
chat = client.copilot.chat
seen["name"] = chat.name
more = list(client.copilot.stream_question("Name a fruit."))
seen["same"] = more[-1].conversation == frames[-1].conversation
while len(client.copilot.chat.messages()) < 4:
    time.sleep(0.1)
seen["messages"] = [[m.role, m.raw_content] for m in client.copilot.chat.messages()]
seen["question"] = client.copilot.question(sys.argv[1]).answers.iterable[0].text
chat.name = "renamed"
client.copilot.chat = None
other = list(client.copilot.stream_question("Name a color."))
seen["other"] = other[-1].conversation != frames[-1].conversation
client.model_name = sys.argv[2]
seen["chosen"] = text(list(client.copilot.stream_question(sys.argv[1])))
seen["chats"] = len(client.copilot.chats())
print(json.dumps(seen), flush=True)
os._exit(0)
"""


def free_port() -> int:
    """A port of Pieces OS that nobody listens at."""
    for port in range(39300, 39334):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("all ports of Pieces OS are taken")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("pieces")
    daemon = RunningDaemon(home, "--listen", f"127.0.0.1:{free_port()}")
    try:
        daemon.start().download()
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture
def clean(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has used no client yet."""
    return environment(tmp_path / "home", TERM="xterm", COLUMNS="100")


def openai_text(daemon: RunningDaemon) -> str:
    """The answer of a model that has just been loaded: what is cached changes the last digits."""
    daemon.json("POST", "/models/unload")
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": SAMPLE, "messages": messages, "temperature": 0}
    answer = daemon.json("POST", "/v1/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.timeout(180)
def test_the_sdk_s_client_chats(daemon: RunningDaemon, clean: dict[str, str]) -> None:
    driven = subprocess.run(
        [sys.executable, "-c", DRIVE, QUESTION, "GPT-4o Chat Model"],
        env=clean,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert driven.returncode == 0, driven.stderr
    seen: dict[str, Any] = json.loads(driven.stdout.splitlines()[-1])
    assert seen["models"] == ["SmolLM2 135M Instruct", *ALIASES]
    assert seen["version"].startswith("12.") and seen["health"].startswith("ok")
    text = openai_text(daemon)
    assert "Paris" in text and seen["text"] == text
    assert "Paris" in seen["question"] and "Paris" in seen["chosen"]
    assert set(seen["statuses"][:-1]) == {"IN-PROGRESS"} and seen["statuses"][-1] == "COMPLETED"
    assert seen["same"] and seen["other"] and seen["name"] == QUESTION
    assert seen["messages"][:2] == [["USER", QUESTION], ["ASSISTANT", text]]
    assert seen["messages"][2] == ["USER", "Name a fruit."] and seen["messages"][3][1]
    kept = daemon.json("GET", "/conversations")["iterable"]
    assert len(kept) == seen["chats"]
    assert "renamed" in {conversation["name"] for conversation in kept}


def test_conversations_outlive_the_daemon(daemon: RunningDaemon) -> None:
    """Killed twice: what was said is there after it, and what was deleted is not."""
    kept, deleted = (
        daemon.json("POST", "/conversations/create", {"type": "COPILOT", "name": name})["id"]
        for name in ("kept", "deleted")
    )

    async def ask() -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{daemon.url}/qgpt/stream") as socket,
        ):
            for key in (kept, deleted):
                await socket.send_json({"question": {"query": QUESTION}, "conversation": key})
                while (await socket.receive_json(timeout=60))["status"] != "COMPLETED":
                    pass

    asyncio.run(ask())
    before = daemon.json("GET", "/conversations")
    said = daemon.json("GET", f"/conversation/{kept}/messages")
    texts = [message["fragment"]["string"]["raw"] for message in said["iterable"]]
    assert texts[0] == QUESTION and "Paris" in texts[1] and len(texts) == 2
    daemon.kill()
    daemon.start()
    assert daemon.json("GET", "/conversations") == before
    assert daemon.json("GET", f"/conversation/{kept}/messages") == said
    assert daemon.request("POST", f"/conversations/{deleted}/delete")[0] == 204
    daemon.kill()
    daemon.start()
    assert daemon.request("GET", f"/conversation/{deleted}")[0] == 410
    assert daemon.json("GET", f"/conversation/{kept}/messages") == said


@pytest.fixture
def cli() -> Path:
    if not CLI.exists():
        pytest.skip("pieces-cli is not installed: run `make .venv/pieces`")
    return CLI


def test_pieces_ask_answers(daemon: RunningDaemon, clean: dict[str, str], cli: Path) -> None:
    for number in range(2):
        done = subprocess.run(
            [cli, "ask", QUESTION],
            env=clean,
            input="" if number else "skip\n",  # its question to who is here for the first time
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout


def test_pieces_list_models_shows_them(
    daemon: RunningDaemon, clean: dict[str, str], cli: Path
) -> None:
    assert daemon.alive
    main, side = pty.openpty()
    process = subprocess.Popen(
        [cli, "list", "models"], stdin=side, stdout=side, stderr=side, env=clean, close_fds=True
    )
    os.close(side)
    shown = b""
    deadline = time.monotonic() + WAIT_S
    told: set[bytes] = set()
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([main], [], [], 0.2)[0]:
                try:
                    shown += os.read(main, 65536)
                except OSError:  # it has ended
                    break
            for words, answer in ((b"y/n/skip", b"skip\n"), (ALIASES[-1].encode(), b"\x03")):
                if words in shown and words not in told:
                    told.add(words)
                    os.write(main, answer)
        process.wait(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait(timeout=10)
        os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    for name in ("SmolLM2 135M Instruct", *ALIASES):
        assert name in text


def test_the_version_that_clients_see_is_a_setting(tmp_path: Path) -> None:
    daemon = RunningDaemon(tmp_path, MODELD_SERVER_PIECES_VERSION="12.3.4")
    try:
        daemon.start()
        assert daemon.request("GET", "/.well-known/version")[2] == "12.3.4"
        application = {"name": "VS_CODE", "platform": "LINUX", "version": "1"}
        connected = daemon.json("POST", "/connect", {"application": application})
        assert connected["health"]["os"]["version"] == "12.3.4"
    finally:
        daemon.stop()
