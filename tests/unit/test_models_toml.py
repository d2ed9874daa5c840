"""The form of the built-in catalog: what a wrong line in it would do is seen only by its users."""

from __future__ import annotations

import re

import pytest

from daemon import sources
from daemon.api.pieces.enums import FOUNDATIONS, KINDS, PROVIDERS, USAGES
from daemon.catalog.record import SeedRecord
from daemon.catalog.seed import builtin

MODELS = builtin()
# Bits that weights of these quantizations take; small models, and image encoders, have more.
BITS = {
    "Q4_0": (4, 6.5),
    "Q4_1": (4.5, 7),
    "Q4_K_S": (4, 7),
    "Q4_K_M": (4.3, 7.5),
    "Q8_0": (8, 10.5),
}
CLIENTS = """
    smollm2:135m-instruct-q4_1 qwen2.5-coder:0.5b-instruct-q4_K_S llama3.2:1b-instruct-q4_K_S
    phi3:3.8b-mini-4k-instruct-q4_K_S gemma2:2b-instruct-q4_K_S
""".split()


def test_there_are_enough_of_each_kind():
    assert len(MODELS) >= 25
    assert {model.format for model in MODELS} == {"gguf", "onnx", "ggml"}
    assert {"CODE_CONVERSATION", "TEXT_EMBEDDING"} <= {model.usage for model in MODELS}


def test_names_are_unique_and_what_clients_look_for_is_there():
    names = [model.unique for model in MODELS]
    assert len({name.lower() for name in names}) == len(names)
    assert set(CLIENTS) <= set(names)
    shown = [model.name for model in MODELS]
    assert len(set(shown)) == len(shown), "clients of Pieces keep models by name"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.unique)
def test_an_entry_is_well_formed(model: SeedRecord):
    assert sources.UNIQUE_NAME.fullmatch(model.unique)
    source = sources.parse(model.source)
    if isinstance(source, sources.HubSource):
        suffix = {"gguf": ".gguf", "ggml": ".bin", "onnx": (".onnx", "/")}[model.format]
        assert source.file.endswith(suffix), (
            "a file or a folder is named: nothing is left to choose"
        )
    assert model.kind in KINDS and model.usage in USAGES and model.provider in PROVIDERS
    assert model.foundation == "" or model.foundation in FOUNDATIONS
    assert re.fullmatch(r"[A-Za-z0-9.+-]{2,60}", model.license)
    assert 10 < len(model.description) <= 200 and model.description.endswith(".")
    assert 256 <= model.context_length <= 2**20
    assert model.size_bytes < model.ram_bytes < 4 * model.size_bytes + 2**30
    bits = 8 * model.size_bytes / model.parameters
    least, most = BITS.get(model.quantization, (2, 33))
    assert least <= bits <= most, (model.unique, bits)
