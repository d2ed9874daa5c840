"""The example of a third-party backend: installed by pip, found, explained, loaded, asked."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from gguf_files import Tensor, write_gguf
from running import RunningDaemon

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "tests" / "plugin"
PAGE = (ROOT / "backends" / "README.md").read_text(encoding="utf-8")
TEXT = "a stitch in time saves nine"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that pip has installed the example into."""
    target = tmp_path_factory.mktemp("site")
    build = tmp_path_factory.mktemp("build") / "plugin"
    build.mkdir()
    for file in PLUGIN.iterdir():
        if file.is_file():
            (build / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target), str(build)]
    subprocess.run([*command, *options], check=True, timeout=100)
    return target


@pytest.fixture
def plugged(installed, start_daemon, tmp_path) -> RunningDaemon:
    """A daemon that has the example, and a model that only the example can run."""
    model = tmp_path / "recital.gguf"
    facts = {"general.architecture": "llama", "general.description": TEXT}
    write_gguf(model, facts, [Tensor(name="w", dimensions=(32, 4))])
    daemon = start_daemon(PYTHONPATH=str(installed), MODELD_MODELS_BACKEND="recital")
    body = {"source": str(model), "unique": "proverb", "options": {"repeat": 2}}
    daemon.json("POST", "/modeld/v1/models", body)
    daemon.download("proverb")
    return daemon


def test_it_is_found_explained_and_answers(plugged):
    (probe,) = [
        b
        for b in plugged.json("GET", "/modeld/v1/backends")["backends"]
        if b["backend"] == "recital"
    ]
    assert probe["available"] and probe["version"] == "1.0"
    explained = plugged.json("GET", "/modeld/v1/models/proverb/explain")
    assert explained["chosen"] == "recital"
    asked = {"model": "proverb", "messages": [{"role": "user", "content": "Well?"}]}
    answer = plugged.json("POST", "/v1/chat/completions", asked)
    assert answer["choices"][0]["message"]["content"] == f"{TEXT} {TEXT}"
    short = plugged.json("POST", "/v1/chat/completions", asked | {"max_tokens": 2})
    assert short["choices"][0]["message"]["content"] == "a stitch"
    assert short["choices"][0]["finish_reason"] == "length"


def test_its_options_are_checked_by_name(plugged, tmp_path):
    body = {"source": str(tmp_path / "recital.gguf"), "unique": "other", "backend": "recital"}
    for options, words in (
        ({"volume": 1}, "recital has no option 'volume'; it has: repeat"),
        ({"repeat": 10}, "option repeat of recital is 10, but must be an integer of at least 1"),
    ):
        status, _, text = plugged.request("POST", "/modeld/v1/models", body | {"options": options})
        assert status == 400 and words in text


def test_the_page_fits_on_a_page_and_is_true_to_the_example():
    assert len(PAGE.splitlines()) <= 60
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    own = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))
    shown = tomllib.loads(block)["project"]["entry-points"]
    assert shown == own["project"]["entry-points"]
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    code = (PLUGIN / "modeld_recital.py").read_text(encoding="utf-8")
    members = set(re.findall(r"^    (?:def )?([a-z]\w*)(?:\(|: ClassVar)", code, re.MULTILINE))
    assert members <= named
    others = {"complete", "embed", "rerank", "classify", "save_state", "restore_state"}
    assert named - members == others
