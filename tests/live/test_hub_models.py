"""Models of several files from a hub: looked at, brought, loaded and asked by a real daemon."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_models
import onnx_files
import pytest
from hub import Faults, LocalHub
from pictures import png
from running import RunningDaemon

TOKEN = "hf_a-token-of-a-reader"
PARTED, ENCODER, SEEING = "owner/parted-GGUF", "owner/encoder-ONNX", "owner/seeing-GGUF"
SOURCES = {"parted": f"hf:{PARTED}:F32", "encoder": f"hf:{ENCODER}", "seeing": f"hf:{SEEING}"}
ABOUT = {"tags": ["license:apache-2.0"]}


def files_in(folder: Path) -> dict[str, bytes | Path]:
    """The files in a folder, by their paths in it."""
    return {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models: in parts, whole, an encoder of texts, and one with an encoder of images."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("whole", "parts", "encoder", "seeing"):
        (folder / name).mkdir()
    gguf_models.tiny_llama(folder / "whole")
    gguf_models.tiny_llama(folder / "parts", tensors_a_file=8)
    for path in list((folder / "parts").iterdir()):
        path.rename(path.with_name(path.name.replace("fim", "F32")))
    onnx_files.embedder(folder / "encoder")
    (folder / "seeing" / "model-Q4_1.gguf").hardlink_to(gguf_models.smollm2())
    encoder = gguf_models.image_encoder(folder / "seeing")
    encoder.rename(encoder.with_name("mmproj-model-F16.gguf"))
    return folder


@pytest.fixture(scope="module")
def hub(shelf: Path) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        page = {"README.md": b"# A model", ".gitattributes": b"*.gguf lfs"}
        hub.add(PARTED, page | files_in(shelf / "parts"), about=ABOUT)
        hub.add(ENCODER, page | files_in(shelf / "encoder"), about=ABOUT)
        hub.add(SEEING, page | files_in(shelf / "seeing"), about=ABOUT)
        yield hub


@pytest.fixture(scope="module")
def daemon(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    daemon = RunningDaemon(tmp_path_factory.mktemp("hub"), HF_ENDPOINT=hub.url)
    try:
        yield daemon.start()
    finally:
        daemon.stop()


def pull(daemon: RunningDaemon, name: str) -> None:
    pulled = daemon.command("pull", SOURCES[name], "--name", name)
    assert pulled.returncode == 0, pulled.stderr


def ask(daemon: RunningDaemon, model: str, content: Any = "Hello", **fields: Any) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
        **fields,
    }
    return dict(daemon.json("POST", "/v1/chat/completions", body)["choices"][0])


def take_in(daemon: RunningDaemon, path: Path, name: str) -> None:
    taken = daemon.command("import", str(path), "--name", name)
    assert taken.returncode == 0, taken.stderr


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("parted", ["tiny-llama-F32-00001-of-00003.gguf", "tiny-llama-F32-00003-of-00003.gguf"]),
        ("encoder", ["model.onnx", "tokenizer.json", "config.json"]),
        ("seeing", ["model-Q4_1.gguf", "mmproj-model-F16.gguf"]),
    ],
)
def test_what_there_is_and_what_it_would_take_is_told_before_anything_is_fetched(
    daemon: RunningDaemon, hub: LocalHub, name: str, names: list[str]
) -> None:
    before = hub.sent_bytes
    shown = daemon.command("pull", SOURCES[name], "--dry-run")
    assert shown.returncode == 0, shown.stderr
    for words in (*names, "together", "licence: apache-2.0", "free, enough", "it fits now"):
        assert words in shown.stdout, shown.stdout
    assert "README" not in shown.stdout
    answer = daemon.json("POST", "/modeld/v1/estimate", {"source": SOURCES[name]})
    download = answer["download"]
    assert download["size_bytes"] == sum(file["size_bytes"] for file in download["files"])
    assert answer["fits"] == "now" and answer["estimate_bytes"] > 0
    told = daemon.command("estimate", SOURCES[name], "--json")
    assert json.loads(told.stdout)["estimate_bytes"] == answer["estimate_bytes"]
    assert hub.sent_bytes - before < download["size_bytes"] / 2 or download["size_bytes"] < 2**20
    listed = {model["unique"] for model in daemon.json("GET", "/modeld/v1/models")["models"]}
    assert name not in listed
    assert not any((daemon.data_dir / "store" / "partial").iterdir())


def test_a_model_in_parts_says_what_the_whole_one_says(daemon: RunningDaemon, shelf: Path) -> None:
    pull(daemon, "parted")
    (whole,) = (shelf / "whole").iterdir()
    take_in(daemon, whole, "whole")
    assert len(daemon.model("parted")["files"]) == 3
    said = ask(daemon, "parted")["message"]["content"]
    assert len(said) > 8 and said == ask(daemon, "whole")["message"]["content"]
    parted, one = (
        daemon.json("GET", f"/modeld/v1/models/{name}/estimate")["parts"]
        for name in ("parted", "whole")
    )
    assert 0 <= parted["weights"] - one["weights"] < 64 * 1024, "its parts are counted together"


def test_an_encoder_comes_with_its_tokenizer_and_settings(
    daemon: RunningDaemon, shelf: Path
) -> None:
    pull(daemon, "encoder")
    take_in(daemon, shelf / "encoder", "own-encoder")
    texts = ["A cat sits on a mat.", "Katzen mögen Matten 🐈."]
    vectors = [
        [entry["embedding"] for entry in answer["data"]]
        for answer in (
            daemon.json("POST", "/v1/embeddings", {"model": name, "input": texts})
            for name in ("encoder", "own-encoder")
        )
    ]
    assert vectors[0] == vectors[1] and len(vectors[0][0]) == 384


def test_an_image_encoder_comes_with_its_model(daemon: RunningDaemon) -> None:
    pull(daemon, "seeing")

    def look(shade: int) -> float:
        url = f"data:image/png;base64,{base64.b64encode(png(shade)).decode()}"
        parts = [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        answer = ask(daemon, "seeing", parts, max_tokens=1, logprobs=True)
        return float(answer["logprobs"]["content"][0]["logprob"])

    assert abs(look(10) - look(250)) > 1e-3, "the picture is seen"


def test_a_gated_model_comes_with_a_token_alone(
    hub: LocalHub, start_daemon: Any, shelf: Path
) -> None:
    usual = hub.faults, hub.token
    hub.faults, hub.token = replace(Faults(), gated=403), TOKEN
    try:
        stranger = start_daemon(HF_ENDPOINT=hub.url)
        refused = stranger.command("pull", SOURCES["parted"], "--name", "parted")
        assert refused.returncode == 1 and "set HF_TOKEN" in refused.stderr
        assert f"accept its licence at {hub.url}/{PARTED}" in refused.stderr
        dry = stranger.command("pull", SOURCES["parted"], "--dry-run")
        assert dry.returncode == 1 and "set HF_TOKEN" in dry.stderr
        stranger.stop()
        reader = start_daemon(HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        pull(reader, "parted")
        assert ask(reader, "parted")["message"]["content"]
        assert TOKEN not in reader.log
    finally:
        hub.faults, hub.token = usual


@pytest.mark.parametrize("switch", [{"HF_HUB_OFFLINE": "1"}, {"MODELD_DOWNLOADS_OFFLINE": "true"}])
def test_offline_what_is_here_works_and_nothing_is_asked_of_the_hub(
    hub: LocalHub, start_daemon: Any, switch: dict[str, str]
) -> None:
    daemon = start_daemon(HF_ENDPOINT=hub.url)
    pull(daemon, "parted")
    said = ask(daemon, "parted")["message"]["content"]
    daemon.stop()
    asked = len(hub.requests)
    daemon = start_daemon(HF_ENDPOINT=hub.url, **switch)
    assert ask(daemon, "parted")["message"]["content"] == said
    again = daemon.command("pull", "parted")
    assert again.returncode == 0, "it is here already"
    refused = daemon.command("pull", SOURCES["encoder"], "--name", "encoder")
    assert refused.returncode == 1 and "offline" in refused.stderr.lower()
    assert len(hub.requests) == asked
