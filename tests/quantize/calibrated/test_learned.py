"""Training of codes and scales on a single matrix, for every type."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dsmoe_local.model.ggml import GgmlType
from dsmoe_quantize.calibrated.blocks import FORMATS, BlockFormat, decode, encode
from dsmoe_quantize.calibrated.gptq import grid_of, inverse_or_0
from dsmoe_quantize.calibrated.learned import STEPS, Rounded, Teacher, TrainedTensor, index_of, train

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
@kinds_of_training
def test_the_error_on_new_inputs_falls(form: BlockFormat, with_codes: bool) -> None:
    """A gradient with the wrong sign, or of the wrong block."""
    weights = random(*SHAPE, seed=1) * 0.02
    tensor = TrainedTensor(form, rounded(form, weights), SHAPE, with_codes)

    def forward(given: Mapping[str, Tensor], states: Tensor) -> Tensor:
        return states @ given[NAME].T

    teacher = Teacher(forward, {NAME: weights})
    inputs = random((STEPS + 1) * 256, 8, seed=2) @ random(8, SHAPE[1], seed=3)
    *batches, new = (inputs + 0.1 * random(*inputs.shape, seed=4)).split(256)
    before = float(teacher.error({NAME: tensor.weights()}, new))
    train(teacher, {NAME: tensor}, batches, lambda: None)
    after = float(teacher.error({NAME: tensor.weights()}, new))
    assert after < before * (0.8 if with_codes and form.type is not GgmlType.Q8_0 else 1)


@formats
def test_indexes_of_levels_are_their_codes(form: BlockFormat) -> None:
    """Levels of IQ4_NL are not evenly spaced; the middle between two is half a code from both."""
    levels = torch.from_numpy(form.levels)
    codes = torch.arange(len(levels), dtype=torch.float32)
    torch.testing.assert_close(index_of(levels, levels), codes)
    torch.testing.assert_close(index_of(levels, (levels[1:] + levels[:-1]) / 2), codes[:-1] + 0.5)
    assert index_of(levels, torch.tensor([-1e9, 1e9])).tolist() == [0, len(levels) - 1]
