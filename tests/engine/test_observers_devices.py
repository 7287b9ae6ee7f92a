"""Observers of a model on a device whose memory this process cannot read."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.devices import BACKENDS, Devices, open_devices
from support.family import MEMBERS, write_member
from support.family import tiny_model as transformers_model
from support.models import tiny_model
from support.observed import graph_summaries, graph_summaries_on

from dsmoe_convert.convert import convert_folder
from dsmoe_local.engine.native import tensors
from dsmoe_local.engine.observe.arrays import unpack

IDS = [0, *range(20, 58), 5, 5, 300]
EXPERTS_ON_CPU = [[r"\.ffn_(up|down|gate)_exps", "CPU"]]


@pytest.fixture(scope="module", params=BACKENDS)
def devices(request: pytest.FixtureRequest) -> Iterator[Devices]:
    with open_devices(request.param, 1) as opened:
        yield opened


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads have matrices of their own, and are views of others' memory."""
    folder = tmp_path_factory.mktemp("mla")
    member = MEMBERS["deepseek3 groups"]
    write_member(folder / "checkpoint", member, transformers_model(member))
    return convert_folder(folder / "checkpoint", folder / "mla.gguf").path


@pytest.mark.parametrize(
    ("has_mla", "placement"),
    [
        (False, {"n_gpu_layers": 99}),
        (False, {"n_gpu_layers": 2}),
        (False, {"n_gpu_layers": 99, "overrides": EXPERTS_ON_CPU}),
        (True, {"n_gpu_layers": 99}),
    ],
    ids=["all", "two layers", "experts on the CPU", "MLA"],
)
def test_device_memory_is_fetched(
    devices: Devices, mla: Path, has_mla: bool, placement: dict[str, Any]
) -> None:
    """Guards: a device's address read as one of this process; names of weights that are overwritten."""
    model = mla if has_mla else tiny_model()
    expected = graph_summaries(model, IDS)
    found = graph_summaries_on(devices, model, IDS, **placement)
    assert any(devices.name(0) in line for line in found["buffers"])
    for one, other in zip(found["routing"]["layers"], expected["routing"]["layers"], strict=True):
        assert one["counts"] == other["counts"]
        for name in ("captured_mass", "router_entropy", "routed_norm", "shared_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
    pairs = zip(found["activations"]["inputs"], expected["activations"]["inputs"], strict=True)
    for one, other in pairs:
        assert one["weights"] == other["weights"]
        np.testing.assert_array_equal(unpack(one["counts"]), unpack(other["counts"]))
        sums = unpack(other["sums"])
        np.testing.assert_allclose(unpack(one["sums"]), sums, rtol=5e-3, atol=1e-3 * sums.max())


@pytest.mark.parametrize("name", [b"blk.3.ffn_up_exps.weight", b"CUDA0#blk.3.ffn_up_exps.weight#0"])
def test_copied_weights_keep_their_names(name: bytes) -> None:
    """Guards: weights not found if the scheduler copied them to a device (not for an RPC worker)."""
    tensor = ctypes.create_string_buffer(336)
    ctypes.memmove(ctypes.addressof(tensor) + 256, name, len(name))
    assert tensors.weight_name_of(ctypes.addressof(tensor)) == b"blk.3.ffn_up_exps.weight"
