"""Which files of a repository a source means."""

from __future__ import annotations

import pytest

from daemon.downloads.selection import select
from daemon.errors import InvalidRequest
from daemon.sources import HubSource

REPO = "owner/tiny"
GIB = 1024**3
FILES = [
    "README.md",
    "tiny-Q4_K_M.gguf",
    "tiny-Q4_K.gguf",
    "tiny-IQ4_XS.gguf",
    "tiny.q8_0.gguf",
    "big-F16-00001-of-00002.gguf",
    "big-F16-00002-of-00002.gguf",
]
PARTS = FILES[-2:]
ENCODER = [
    "1_Pooling/config.json",
    "README.md",
    "config.json",
    "model.safetensors",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/model_O2.onnx",
    "onnx/model_qint8_avx512.onnx",
    "onnx/model_quantized.onnx",
    "openvino/openvino_model.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "vocab.txt",
]
CONFIGS = [
    "1_Pooling/config.json",
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "vocab.txt",
]


def chosen(
    files: list[str] | dict[str, int], file: str = "", quantization: str = "", memory: int = 0
) -> list[str]:
    source = HubSource(repo=REPO, file=file, quantization=quantization)
    sizes = files if isinstance(files, dict) else dict.fromkeys(files, 1000)
    return [each.path for each in select(sizes, source, memory)]


@pytest.mark.parametrize(
    ("files", "file", "quantization", "expected"),
    [
        (FILES, "", "", ["tiny-Q4_K_M.gguf"]),
        (FILES, "", "q4_k_m", ["tiny-Q4_K_M.gguf"]),
        (FILES, "", "Q4_K", ["tiny-Q4_K.gguf"]),
        (FILES, "", "Q8_0", ["tiny.q8_0.gguf"]),
        (FILES, "", "F16", PARTS),
        (FILES, PARTS[1], "", PARTS),
        ([*FILES, "mmproj-Q8_0.gguf"], "mmproj-Q8_0.gguf", "", ["mmproj-Q8_0.gguf"]),
        (["README.md", "only.gguf"], "", "", ["only.gguf"]),
        (["one-00001-of-00001.gguf"], "", "", ["one-00001-of-00001.gguf"]),
        (["sub/dir/x-Q4_0.gguf", "x-Q5_0.gguf"], "", "q4_0", ["sub/dir/x-Q4_0.gguf"]),
        (["UD-Q4_K_XL/x-00001-of-00001.gguf", "Q8_0/x-00001-of-00001.gguf"], "", "Q8_0",
         ["Q8_0/x-00001-of-00001.gguf"]),
        (["a-Q8_0.gguf", "a-Q6_K.gguf"], "", "", ["a-Q6_K.gguf"]),
        (["x.gguf", "mmproj-Q8_0.gguf", "mmproj-f16.gguf"], "", "", ["x.gguf", "mmproj-f16.gguf"]),
        (["a/x-Q4_0.gguf", "b/mmproj-F16.gguf"], "", "", ["a/x-Q4_0.gguf"]),
        (ENCODER, "", "", ["onnx/model.onnx", "onnx/model.onnx_data", *CONFIGS]),
        (ENCODER, "", "int8", ["onnx/model_quantized.onnx", *CONFIGS]),
        (ENCODER, "onnx/model_O2.onnx", "", ["onnx/model_O2.onnx", *CONFIGS]),
        (["config.json", "ggml-model-q4_0.bin"], "", "", ["ggml-model-q4_0.bin", "config.json"]),
        (["a-q4_0.bin", "a-q5_1.bin"], "", "q5_1", ["a-q5_1.bin"]),
        (["a/genai_config.json", "a/model.onnx", "b/x.txt"], "a/", "",
         ["a/genai_config.json", "a/model.onnx"]),
        (["gpu/genai_config.json", "cpu/genai_config.json", "cpu/model.onnx", "config.json"], "", "",
         ["cpu/genai_config.json", "cpu/model.onnx"]),
    ],
)  # fmt: skip
def test_chooses(files, file, quantization, expected):
    assert chosen(files, file, quantization) == expected


def test_names_in_the_model_are_flat_but_where_they_mean_something():
    def names(files: list[str], file: str = "") -> list[str]:
        source = HubSource(repo=REPO, file=file)
        return [each.name for each in select(dict.fromkeys(files, 1), source)]

    assert names(["sub/x.gguf"]) == ["x.gguf"]
    assert names(ENCODER)[:1] == ["onnx/model.onnx"]
    assert names(["a/genai_config.json", "a/model.onnx"], "a/") == [
        "genai_config.json",
        "model.onnx",
    ]


@pytest.mark.parametrize(
    ("memory_gib", "expected"),
    [(0, "m-Q4_K_M.gguf"), (16, "m-Q4_K_M.gguf"), (5, "m-Q3_K_M.gguf"), (3.2, "m-Q2_K.gguf")],
)
def test_takes_what_fits_where_nothing_is_named(memory_gib, expected):
    files = {
        "m-F16.gguf": 14 * GIB,
        "m-Q8_0.gguf": 7 * GIB,
        "m-Q4_K_M.gguf": 4 * GIB,
        "m-Q3_K_M.gguf": 3 * GIB,
        "m-Q2_K.gguf": 2 * GIB,
    }
    assert chosen(files, memory=int(memory_gib * GIB)) == [expected]
    assert chosen(files, quantization="F16", memory=GIB) == ["m-F16.gguf"], "it was named"


def test_says_so_where_nothing_fits():
    files = {"m-Q4_K_M.gguf": 4 * GIB, "m-Q2_K.gguf": 2 * GIB}
    with pytest.raises(InvalidRequest, match=r"nothing that fits the 2.0 GiB .* m-Q2_K.gguf with"):
        chosen(files, memory=2 * GIB)


@pytest.mark.parametrize(
    ("files", "file", "quantization", "words"),
    [
        (FILES, "", "Q4_XS", ["no file of quantization Q4_XS", "tiny-IQ4_XS.gguf"]),
        (PARTS[1:], PARTS[1], "", ["lacks parts of", PARTS[0]]),
        (FILES, "nothing.gguf", "", ["no file 'nothing.gguf'", "tiny-Q4_K_M.gguf"]),
        (FILES, "sub/", "", ["no folder 'sub/'"]),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "", "Q8_0", ["several files", "a-Q8_0.gguf, b-Q8_0.gguf"]),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "", "", ["several files of quantization Q4_K_M"]),
        (["a-x.gguf", "b-y.gguf"], "", "", ["no file of quantization Q4_K_M", "b-y.gguf"]),
        (["model.safetensors"], "", "", ["no model of a known format"]),
        (["a/x.onnx", "b/y.onnx"], "", "", ["several files", "a/x.onnx, b/y.onnx"]),
        (["c1/cpu/genai_config.json", "c2/cpu/genai_config.json"], "", "", ["c1/cpu/, c2/cpu/"]),
        ([f"m-{n:03}.gguf" for n in range(99)], "", "", ["m-029.gguf and 69 more"]),
    ],
)  # fmt: skip
def test_says_what_there_is_to_choose(files, file, quantization, words):
    with pytest.raises(InvalidRequest) as caught:
        chosen(files, file, quantization)
    assert all(word in caught.value.message for word in words), caught.value.message
