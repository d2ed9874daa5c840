"""What the onnx backend makes of a model's facts: tasks, options, memory, providers, pooling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backends.contract import (
    Artifact,
    BackendError,
    Gpu,
    Hardware,
    LoadOptions,
    ModelFile,
    Placement,
    Probe,
    Sampling,
    Task,
)
from backends.onnx import Onnx, pooling, settings
from backends.onnx.generation import search_options

MIB = 1024 * 1024
NVIDIA = Gpu(id="GPU-1", vendor="nvidia", name="RTX", free_bytes=8000 * MIB)
ON_GPU = Placement(gpu_layers=6, layers=(("GPU-1", 6),))
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def artifact(task: str = "embed", *, template: str = "", context: int = 512, **facts) -> Artifact:
    given = {"hidden_size": 384, "layers": 6, "heads": 12, "intermediate_size": 1536}
    return Artifact(
        format="onnx",
        files=(ModelFile(path="/m.onnx", size_bytes=1, mtime_ns=1, sha256=""),),
        architecture="bert",
        parameters=22_700_000,
        quantization="F32",
        context_length=context,
        weights_bytes=90_000_000,
        chat_template=template,
        metadata={f"onnx.{k}": v for k, v in (given | {"task": task, **facts}).items()},
    )


def probe(*features: str, vendors: tuple[str, ...] = ()) -> Probe:
    return Probe(
        backend="onnx", available=True, version="1.32", features=features, gpu_vendors=vendors
    )


HARDWARE = Hardware(cpu_model="x", physical_cores=2, logical_cores=4, ram_bytes=8 << 30)


# fit


@pytest.mark.parametrize(
    ("task", "expected"),
    [("embed", Task.EMBED), ("rerank", Task.RERANK), ("classify", Task.CLASSIFY)],
)
def test_the_task_is_what_the_model_is_for(task, expected):
    fit = Onnx.fit(artifact(task), probe(), HARDWARE)
    assert fit.score > 0 and fit.tasks == (expected,)


def test_generation_needs_its_package_and_chat_a_template():
    refused = Onnx.fit(artifact("generate"), probe(), HARDWARE)
    assert refused.score == 0 and "pip install onnxruntime-genai" in refused.reason
    assert Onnx.fit(artifact("generate"), probe("generate"), HARDWARE).tasks == (Task.COMPLETE,)
    chats = Onnx.fit(artifact("generate", template="{{ x }}"), probe("generate"), HARDWARE)
    assert chats.tasks == (Task.CHAT, Task.COMPLETE)


def test_a_model_that_is_for_nothing_is_refused():
    assert Onnx.fit(artifact("juggle"), probe(), HARDWARE).score == 0


# settled settings and memory


def test_a_context_is_never_longer_than_the_model_s():
    assert Onnx.estimate(artifact(context=256), LoadOptions()).context_length == 256
    longer = Onnx.estimate(artifact(context=256), LoadOptions(context_length=9000))
    assert longer.context_length == 256
    assert Onnx.estimate(artifact(), LoadOptions(context_length=64)).context_length == 64
    assert Onnx.estimate(artifact(context=8192), LoadOptions()).context_length == 4096
    assert Onnx.estimate(artifact(context=0), LoadOptions()).context_length == 512


def test_requests_run_together_but_generation_runs_alone():
    assert Onnx.estimate(artifact(), LoadOptions()).slots == 32
    assert Onnx.estimate(artifact(), LoadOptions(slots=3)).slots == 3
    assert Onnx.estimate(artifact("generate"), LoadOptions(slots=3)).slots == 1


def test_weights_are_counted_as_the_engine_holds_them():
    grown = Onnx.estimate(artifact(resident_bytes=400_000_000), LoadOptions())
    assert grown.parts["weights"] == 400_000_000
    assert Onnx.estimate(artifact(), LoadOptions()).parts["weights"] == 90_000_000


def test_a_longer_context_and_a_larger_cache_need_more():
    short, long = (
        Onnx.estimate(artifact(context=n), LoadOptions()).parts["compute"] for n in (512, 4096)
    )
    assert long > 8 * short  # attention grows with the square
    facts = {"kv_heads": 2, "head_size": 64}
    cache = Onnx.estimate(artifact("generate", context=1000, **facts), LoadOptions())
    assert cache.parts["kv_cache"] == 1000 * 6 * 2 * 2 * 64 * 4


def test_batches_take_half_a_second_and_no_more_tokens_than_help():
    small, large = artifact(), artifact(vocabulary=0)
    assert settings.batch_tokens(small, 2) == 440
    assert settings.batch_tokens(artifact(vocabulary=30522), 2) == 512
    assert settings.batch_tokens(large, 1) == 220
    assert settings.batch_tokens(artifact(alone=True), 2) == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"provider": "tpu"}, "option provider of onnx is 'tpu', but must be one of auto, cpu"),
        ({"pooling": "median"}, "option pooling of onnx is 'median'"),
        ({"normalize": "yes"}, "option normalize of onnx is 'yes', but must be true or false"),
        ({"n_gpu": 1}, "onnx has no option 'n_gpu'; it has: normalize, pooling, provider"),
    ],
)
def test_bad_options_are_refused_by_name(given, expected):
    with pytest.raises(BackendError, match="^" + expected) as error:
        Onnx.estimate(artifact(), LoadOptions(engine=given))
    assert error.value.code == "invalid_request"


# where to compute


def test_a_model_that_fits_is_on_the_gpu():
    settled = Onnx.estimate(artifact(), LoadOptions(gpus=(NVIDIA,)))
    assert settled.placement.layers == (("GPU-1", 6),)
    assert settled.gpu_parts["GPU-1"]["weights"] == 90_000_000
    assert "weights" not in settled.parts


def test_a_model_that_does_not_fit_is_not_and_says_why():
    full = Gpu(id="GPU-1", vendor="nvidia", name="RTX", free_bytes=50 * MIB)
    settled = Onnx.estimate(artifact(), LoadOptions(gpus=(full,)))
    assert settled.placement.gpu_layers == 0 and not settled.gpu_parts
    assert "RTX has 50 MiB free" in settled.placement.reason
    asked = LoadOptions(gpus=(NVIDIA,), engine={"provider": "cpu"})
    assert Onnx.estimate(artifact(), asked).placement.reason == "the option provider is cpu"


def test_a_gpu_that_shares_the_ram_is_booked_there():
    shared = Gpu(id="0", vendor="apple", name="M3", integrated=True)
    settled = Onnx.estimate(artifact(), LoadOptions(gpus=(shared,)))
    assert settled.placement.gpu_layers == 6
    assert settled.parts["weights"] == 90_000_000 and not settled.gpu_parts


@pytest.mark.parametrize(
    ("available", "wanted", "placement", "expected"),
    [
        ([CPU], "auto", Placement(), [CPU]),
        ([CUDA, CPU], "auto", Placement(), [CPU]),  # it did not fit
        ([CUDA, CPU], "auto", ON_GPU, [CUDA, CPU]),
        (["TensorrtExecutionProvider", CUDA, CPU], "auto", ON_GPU, [CUDA, CPU]),
        (
            ["TensorrtExecutionProvider", CUDA, CPU],
            "tensorrt",
            ON_GPU,
            ["TensorrtExecutionProvider", CPU],
        ),
        (["AzureExecutionProvider", CPU], "auto", ON_GPU, [CPU]),
        (["DmlExecutionProvider", CPU], "auto", ON_GPU, ["DmlExecutionProvider", CPU]),
        ([CUDA, CPU], "cpu", ON_GPU, [CPU]),
        (["OpenVINOExecutionProvider", CPU], "openvino", Placement(), ["OpenVINOExecutionProvider", CPU]),
    ],
)  # fmt: skip
def test_providers_follow_the_placement_and_end_with_the_cpu(
    available, wanted, placement, expected
):
    assert settings.providers(available, wanted, placement) == expected


def test_providers_tell_whose_gpus_can_be_used():
    assert settings.gpu_vendors([CUDA, CPU]) == ("nvidia",)
    assert settings.gpu_vendors(["DmlExecutionProvider"]) == ("amd", "intel", "nvidia")
    assert settings.gpu_vendors(["MIGraphXExecutionProvider", CPU]) == ("amd",)
    assert settings.gpu_vendors([CPU]) == ()


# pooling


HIDDEN = np.arange(24, dtype=np.float32).reshape(2, 4, 3)


@pytest.mark.parametrize(
    ("mask", "mode", "expected"),
    [
        ([1, 1, 0, 0], "mean", [1.5, 2.5, 3.5]),
        ([0, 0, 1, 1], "mean", [7.5, 8.5, 9.5]),
        ([1, 1, 0, 0], "cls", [0, 1, 2]),
        ([0, 0, 1, 1], "cls", [6, 7, 8]),
        ([1, 1, 0, 0], "last", [3, 4, 5]),
        ([0, 1, 1, 1], "last", [9, 10, 11]),
        ([1, 1, 1, 1], "last", [9, 10, 11]),
        ([1, 1, 0, 0], "max", [3, 4, 5]),
    ],
)
def test_pooling_leaves_padding_out_on_either_side(mask, mode, expected):
    rows = pooling.pool(HIDDEN, np.array([mask, [1, 1, 1, 1]]), mode)
    assert rows[0].tolist() == expected
    assert rows.dtype == np.float32


def test_vectors_are_scaled_as_told_and_always_when_cut():
    row = np.array([3.0, 4.0, 12.0], np.float32)
    unpacked = lambda *a, **k: np.frombuffer(pooling.vector(row, *a, **k), "<f4")  # noqa: E731
    assert unpacked(None, normalize=False).tolist() == [3, 4, 12]
    assert unpacked(None, normalize=True) == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert unpacked(2, normalize=False) == pytest.approx([0.6, 0.8])
    for wrong in (0, 4):
        with pytest.raises(BackendError, match=f"dimensions is {wrong}, but this .* have 3"):
            pooling.vector(row, wrong, normalize=True)
    assert pooling.vector(np.zeros(2, np.float32), None, normalize=True) == bytes(8)


def test_logits_become_scores_without_overflow():
    assert pooling.sigmoid(0) == 0.5
    assert pooling.sigmoid(-1000) == 0.0 and pooling.sigmoid(1000) == 1.0
    shares = pooling.probabilities([1000.0, 999.0, -1000.0], independent=False)
    assert math.fsum(shares) == pytest.approx(1)
    assert shares[0] / shares[1] == pytest.approx(math.e)
    assert pooling.probabilities([0.0, 0.0], independent=True) == [0.5, 0.5]


# generation


def test_sampling_becomes_search_options():
    sampling = Sampling(temperature=0.5, top_k=-1, top_p=0.9, seed=2**40 + 7, repeat_penalty=1.1)
    options = search_options(sampling, 100)
    assert options["do_sample"] is True and options["temperature"] == 0.5
    assert (options["top_k"], options["top_p"], options["random_seed"]) == (0, 0.9, 7)
    assert options["repetition_penalty"] == 1.1 and options["max_length"] == 100
    greedy = search_options(Sampling(temperature=0), 5)
    assert greedy["do_sample"] is False and "temperature" not in greedy
    assert "do_sample" not in search_options(Sampling(), 5)
    assert search_options(Sampling(ignore_eos=True), 5)["min_length"] == 5


@pytest.mark.parametrize(
    "given",
    [{"json_schema": {}}, {"grammar": "root"}, {"logprobs": 0}, {"logit_bias": {1: 1.0}},
     {"min_p": 0.1}, {"presence_penalty": 1.0}],
)  # fmt: skip
def test_sampling_that_the_engine_cannot_do_is_refused_by_name(given):
    with pytest.raises(BackendError, match=next(iter(given))):
        search_options(Sampling(**given), 5)


def test_neutral_penalties_are_nothing():
    assert search_options(Sampling(presence_penalty=0.0, frequency_penalty=0.0), 5)
