"""Where xllamacpp puts the layers of a model."""

from __future__ import annotations

import pytest

from backends.contract import BackendError, Placement
from backends.xllamacpp.parameters import gpu_split

DEVICES = [
    {"name": "CUDA0", "device_id": "0000:41:00.0", "type": "GGML_BACKEND_DEVICE_TYPE_GPU"},
    {"name": "CUDA1", "device_id": "0000:01:00.0", "type": "GGML_BACKEND_DEVICE_TYPE_GPU"},
    {"name": "Vulkan0", "device_id": "0000:00:02.0", "type": "GGML_BACKEND_DEVICE_TYPE_IGPU"},
    {"name": "BLAS", "device_id": "", "type": "GGML_BACKEND_DEVICE_TYPE_ACCEL"},
    {"name": "CPU", "device_id": "", "type": "GGML_BACKEND_DEVICE_TYPE_CPU"},
]


def test_without_a_gpu_nothing_is_offloaded():
    assert gpu_split(Placement(), DEVICES[3:]) == (0, [])
    assert gpu_split(Placement(), DEVICES) == (0, [0.0, 0.0])


def test_shares_are_in_the_engine_s_order_of_its_gpus():
    where = Placement(gpu_layers=30, layers=(("0000:01:00.0", 20), ("0000:41:00.0", 10)))
    assert gpu_split(where, DEVICES) == (30, [10.0, 20.0])


def test_an_integrated_gpu_counts_where_it_is_the_only_one():
    where = Placement(gpu_layers=5, layers=(("0000:00:02.0", 5),))
    assert gpu_split(where, DEVICES[2:]) == (5, [5.0])


def test_a_gpu_that_the_engine_does_not_see_is_named():
    where = Placement(gpu_layers=5, layers=(("0000:99:00.0", 5),))
    with pytest.raises(BackendError, match="0000:99:00.0") as refused:
        gpu_split(where, DEVICES)
    assert refused.value.code == "load_failed"
