"""The JSON files beside an ONNX model: what they say of labels, lengths and pooling.

Owns where they are looked for, and how much of them is read. Knows no graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from daemon.artifacts import InvalidModelFile

MAX_CONFIG_BYTES = 1024 * 1024
MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
MAX_LABELS = 4096
MAX_LABEL_CHARS = 256
MAX_TEMPLATE_CHARS = 1024 * 1024
_INT32_MAX = 2**31 - 1

TOKENIZER = "tokenizer.json"
GENAI = "genai_config.json"
# Files that belong to a model; the first is needed, the others are read or handed on.
NAMES = (
    TOKENIZER,
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    GENAI,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class Configs:
    """The configuration of one model: files named in NAMES, at its root."""

    def __init__(self, folder: Path, names: Sequence[str], model: str) -> None:
        """Find the files that belong to `model`, one of `names`, all of them below `folder`."""
        self._folder = folder
        self._names = frozenset(names)
        directory = PurePosixPath(model).parent
        # Exporters put models into a folder `onnx` beneath their configuration.
        self._roots = ([directory.parent] if directory.name == "onnx" else []) + [directory]

    def find(self, name: str) -> str | None:
        """Return where the file `name` is, relative to the folder."""
        for root in self._roots:
            if (path := str(root / name)) in self._names:
                return path
        return None

    def present(self) -> list[str]:
        """Return the files that belong to the model, the tokenizer first."""
        wanted = [*NAMES, *(f"{path}/config.json" for path in self._module_paths())]
        return [path for name in wanted if (path := self.find(name))]

    def _module_paths(self) -> list[str]:
        paths = [module.get("path") for module in self.modules()]
        return [path for path in paths if isinstance(path, str) and path]

    def modules(self) -> list[dict[str, Any]]:
        """Return the steps of sentence-transformers' modules.json; none without that file."""
        value = self._load("modules.json", [])
        return [m for m in value if isinstance(m, dict)] if isinstance(value, list) else []

    def mapping(self, name: str) -> dict[str, Any]:
        """Return the object in the file `name`; an empty one if there is no such file."""
        value = self._load(name, {})
        if not isinstance(value, dict):
            raise InvalidModelFile(f"{self.find(name)} is damaged: it is not a JSON object")
        return value

    def text(self, name: str) -> str:
        """Return the text of the file `name`; empty if there is no such file."""
        path = self.find(name)
        return self._read(path).decode(errors="replace") if path else ""

    def check_tokenizer(self) -> int:
        """Return the size of the tokenizer in bytes. Raises InvalidModelFile if there is none."""
        path = self.find(TOKENIZER)
        if path is None:
            raise InvalidModelFile(
                f"{self._folder.name} has no {TOKENIZER}: put the model's into the folder (export "
                "it with transformers' AutoTokenizer.save_pretrained, a fast tokenizer)"
            )
        try:
            size = (self._folder / path).stat().st_size
            with (self._folder / path).open("rb") as file:
                head = file.read(4096)
        except OSError as error:
            raise InvalidModelFile(f"{path} cannot be read: {error.strerror}") from error
        if size > MAX_TOKENIZER_BYTES:
            raise InvalidModelFile(
                f"{path} has {size} bytes: at most {MAX_TOKENIZER_BYTES} are read"
            )
        if not head.lstrip().startswith(b"{"):
            raise InvalidModelFile(f"{path} is damaged: it is not a JSON object")
        return size

    def _load(self, name: str, default: Any) -> Any:
        path = self.find(name)
        if path is None:
            return default
        try:
            return json.loads(self._read(path))
        except (ValueError, RecursionError) as error:
            raise InvalidModelFile(f"{path} is damaged: it is not JSON ({error})") from error

    def _read(self, path: str) -> bytes:
        try:
            with (self._folder / path).open("rb") as file:
                raw = file.read(MAX_CONFIG_BYTES + 1)
        except OSError as error:
            raise InvalidModelFile(f"{path} cannot be read: {error.strerror}") from error
        if len(raw) > MAX_CONFIG_BYTES:
            raise InvalidModelFile(f"{path} has more than {MAX_CONFIG_BYTES} bytes")
        return raw


def count(config: Mapping[str, Any], *keys: str) -> int:
    """Return the first of `keys` that is a plausible count; 0 if none is."""
    for key in keys:
        value = config.get(key)
        if type(value) is int and 0 < value <= _INT32_MAX:
            return value
    return 0


def labels(config: Mapping[str, Any]) -> list[str]:
    """Return the label of each output of a classifier, by `id2label`; none if it does not say."""
    given = config.get("id2label")
    if not isinstance(given, dict) or not 0 < len(given) <= MAX_LABELS:
        return []
    found = [given.get(str(number)) for number in range(len(given))]
    if all(isinstance(label, str) and 0 < len(label) <= MAX_LABEL_CHARS for label in found):
        return [str(label) for label in found]
    return []


def pooling(config: Mapping[str, Any], path: str) -> str:
    """Return how sentence-transformers' pooling file at `path` makes one vector of many.

    `mean`, `cls`, `last` or `max`. Raises InvalidModelFile for another one.
    """
    old = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_lasttoken": "last",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
    }
    new = {"lasttoken": "last"}
    mode = config.get("pooling_mode")
    found = [new.get(mode, mode)] if isinstance(mode, str) else []
    found = found or [name for key, name in old.items() if config.get(key) is True] or ["mean"]
    if len(found) > 1 or found[0] not in ("mean", "cls", "last", "max"):
        raise InvalidModelFile(
            f"{path} asks for the pooling {' + '.join(found)}: only mean, cls, lasttoken and max "
            "are known"
        )
    return found[0]


def chat_template(configs: Configs) -> str:
    """Return the chat template that the tokenizer's files have; empty if they have none."""
    template: Any = configs.text("chat_template.jinja")
    template = template or configs.mapping("chat_template.json").get("chat_template")
    template = template or configs.mapping("tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and len(template) <= MAX_TEMPLATE_CHARS else ""
