"""Training of codes and scales on a single matrix, for every type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmoe_local.model.ggml import GgmlType
from dsmoe_quantize.calibrated.blocks import FORMATS, BlockFormat, decode, encode
from dsmoe_quantize.calibrated.gptq import grid_of, inverse_or_0
from dsmoe_quantize.calibrated.learned import STEPS, Rounded, TrainedTensor, error, index_of, train
from dsmoe_quantize.calibrated.network.layer import Weights

NAME, SHAPE = "w", (16, 256)

formats = pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.type.name)
kinds_of_training = pytest.mark.parametrize("with_codes", [False, True], ids=["scales", "codes"])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(form: BlockFormat, weights: Tensor) -> Rounded:
    """Return weights as ggml rounds them, and where they were between the codes."""
    rows = encode(form.type, weights.numpy(), None)
    grid = grid_of(form, rows, (1, *SHAPE))
    scale, offset = grid.expanded()
    return Rounded(rows, index_of(grid.levels, (weights - offset) * inverse_or_0(scale)))


def decoded(form: BlockFormat, tensor: TrainedTensor) -> Tensor:
    return torch.from_numpy(decode(form.type, tensor.rows(), SHAPE[1]))


@formats
@kinds_of_training
def test_trained_weights_are_those_that_ggml_decodes(form: BlockFormat, with_codes: bool) -> None:
    """Training that judges other weights than those it writes."""
    tensor = TrainedTensor(form, rounded(form, random(*SHAPE, seed=0) * 0.02), SHAPE, with_codes)
    for step in range(STEPS):
        torch.testing.assert_close(tensor.weights(), decoded(form, tensor), rtol=1e-6, atol=1e-9)
        tensor.update(random(*SHAPE, seed=step), step)
    torch.testing.assert_close(tensor.weights(), decoded(form, tensor), rtol=1e-6, atol=1e-9)


@formats
def test_scales_move_against_their_gradient(form: BlockFormat) -> None:
    """A scale's gradient that includes the offset's part of the weights, or another block's.

    The gradient is measured on weights that ggml decodes from blocks with a slightly larger number. The first
    step of Adam has the same length for every number, so only directions are compared.
    """
    start = rounded(form, random(*SHAPE, seed=7) * 20)
    tensor = TrainedTensor(form, start, SHAPE, with_codes=False)
    supers = form.read_supers(start.rows)

    def weights(values: np.ndarray) -> np.ndarray:
        rows = start.rows.copy()
        form.write_supers(rows, values)
        return decode(form.type, rows, SHAPE[1])

    gradient = random(*SHAPE, seed=8)
    tensor.weights()
    tensor.update(gradient, 0)
    moves = form.read_supers(tensor.rows()) / supers - 1
    for number in range(supers.shape[1]):
        larger = supers.copy()
        larger[:, number] *= 1.25
        by_weight = gradient.numpy() * (weights(larger) - weights(supers))
        slope = by_weight.reshape(len(supers), -1).sum(1)
        assert np.array_equal(np.sign(moves[:, number]), -np.sign(slope))


@formats
@kinds_of_training
def test_the_error_on_new_inputs_falls(form: BlockFormat, with_codes: bool) -> None:
    """A gradient with the wrong sign, or of the wrong block."""
    weights = random(*SHAPE, seed=1) * 0.02
    tensor = TrainedTensor(form, rounded(form, weights), SHAPE, with_codes)

    def forward(given: Weights, states: Tensor) -> Tensor:
        matrix = given[NAME]
        assert isinstance(matrix, Tensor)
        return states @ matrix.T

    inputs = random((STEPS + 1) * 256, 8, seed=2) @ random(8, SHAPE[1], seed=3)
    *batches, (new, wanted) = (
        (states, states @ weights.T) for states in (inputs + 0.1 * random(*inputs.shape, seed=4)).split(256)
    )
    before = float(error(new @ tensor.weights().T, wanted))
    train(forward, {}, {NAME: tensor}, batches, lambda: None)
    after = float(error(new @ tensor.weights().T, wanted))
    assert after < before * (0.8 if with_codes and form.type is not GgmlType.Q8_0 else 1)


def test_training_experts_apart_is_training_them_together() -> None:
    """Matrices of one tensor that get each other's gradients, scales or steps."""
    form, n_experts = FORMATS[GgmlType.Q4_K], 3
    weights = random(n_experts, *SHAPE, seed=5) * 0.02
    each = [rounded(form, matrix) for matrix in weights]
    whole = Rounded(
        np.concatenate([one.rows for one in each]),
        torch.cat([one.indexes for one in each if one.indexes is not None]),
    )

    def forward(given: Weights, states: Tensor) -> Tensor:
        return torch.stack([states @ matrix.T for matrix in given[NAME]])

    inputs = random(STEPS, 64, SHAPE[1], seed=6)
    batches = [(states, forward({NAME: weights}, states)) for states in inputs]
    apart = [TrainedTensor(form, one, SHAPE, True) for one in each]
    together = TrainedTensor(form, whole, (n_experts, *SHAPE), True)
    for trained in (apart, together):
        train(forward, {}, {NAME: trained}, batches, lambda: None)
    assert np.array_equal(np.concatenate([one.rows() for one in apart]), together.rows())
    assert not np.array_equal(together.rows(), whole.rows)


@formats
def test_indexes_of_levels_are_their_codes(form: BlockFormat) -> None:
    """Levels of IQ4_NL are not evenly spaced; the middle between two is half a code from both."""
    levels = torch.from_numpy(form.levels)
    codes = torch.arange(len(levels), dtype=torch.float32)
    torch.testing.assert_close(index_of(levels, levels), codes)
    torch.testing.assert_close(index_of(levels, (levels[1:] + levels[:-1]) / 2), codes[:-1] + 0.5)
    assert index_of(levels, torch.tensor([-1e9, 1e9])).tolist() == [0, len(levels) - 1]
