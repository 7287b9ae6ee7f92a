"""The benchmark of a dense model against the 16B: its random files, and what it makes of few layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.dense_against_moe import MOE, at_layers
from benchmarks.make_checkpoint import make_pool
from benchmarks.support.random_models import shape_of, with_layers, write_random
from benchmarks.support.sizes import choices_of
from dsmoe_local.model.cost import parameters
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.write import kernels


def test_layers_are_extrapolated() -> None:
    """Guards: another line than the one through the points, a measured value replaced by a computed one."""
    assert at_layers({2: 5.0, 8: 8.0}, 28) == pytest.approx(18)
    assert at_layers({2: 5.0, 5: 6.6, 8: 8.0}, 28) == pytest.approx(18, rel=0.05)
    assert at_layers({28: 3.0}, 28) == 3.0


def test_shapes_are_the_papers() -> None:
    """Guards: a shape with other widths, or other experts, than the model that it stands for."""
    assert parameters(shape_of(MOE, quick=False).hp).total == pytest.approx(16.4e9, rel=0.01)
    assert parameters(shape_of("llama2-7b", quick=False).hp).total == pytest.approx(6.74e9, rel=0.01)
    small = with_layers(shape_of(MOE, quick=True).hp, 3)
    assert (small.n_layers, small.n_dense_layers, small.n_routed_experts) == (3, 1, 64)
    dense = with_layers(shape_of("deepseek-7b", quick=True).hp, 3)
    assert (dense.n_layers, dense.n_dense_layers) == (3, 3)


def test_random_files_of_a_type(tmp_path: Path) -> None:
    """Guards: blocks that are cut in two where they are repeated, and tensors of another type or shape."""
    path = tmp_path / "random.gguf"
    hp = with_layers(shape_of(MOE, quick=True).hp, 2)
    write_random(path, hp, make_pool(0), "Q4_K_M")
    file, found = read_model(path)
    assert (found.architecture, found.n_layers, found.n_vocab) == (hp.architecture, 2, hp.n_vocab)
    for choice in choices_of(hp, "Q4_K_M"):
        tensor = file.tensors[choice.name]
        assert tensor.type is choice.type
        data = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        if tensor.type is GgmlType.F32:
            continue
        assert kernels.validator(tensor.type)(data.ctypes.data, len(data))
        weights = np.empty(tensor.n_weights, np.float32)
        kernels.decoder(tensor.type)(data.ctypes.data, weights.ctypes.data, len(weights))
        assert weights.std() == pytest.approx(0.02, rel=0.1)
