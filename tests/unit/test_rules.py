"""Rules of the code that no linter holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from daemon.cli.main import _commands

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for part in ("daemon", "backends") for path in (ROOT / part).rglob("*.py")]


def names_in(path: Path) -> set[str]:
    """Every name and attribute that a module uses or imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.name for alias in node.names)
    return names


def test_only_one_module_starts_processes():
    starters = {"create_subprocess_exec", "create_subprocess_shell", "Popen", "fork", "spawnv"}
    starting = [path for path in SOURCES if names_in(path) & starters]
    assert starting == [ROOT / "daemon" / "workers" / "child.py"]


def test_no_module_has_global_state():
    for path in SOURCES:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not [node for node in nodes if isinstance(node, ast.Global)], path


def test_the_readme_names_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`modeld ([a-z]+)", text))
    assert named == set(_commands()) | {"serve", "doctor"}


def test_the_architecture_page_names_only_files_that_are_there():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:daemon|backends|configs|tests|systemd)/[\w./]*)`", text)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
