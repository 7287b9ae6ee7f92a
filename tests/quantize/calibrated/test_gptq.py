"""GPTQ compared with a plain implementation of the paper's algorithm: one row and one column at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsmoe_local.base.errors import FormatError
from dsmoe_local.model.ggml import GgmlType
from dsmoe_quantize.calibrated.blocks import FORMATS, decode, encode
from dsmoe_quantize.calibrated.gptq import DAMPING, Grid, factor_of, gptq, grid_of, nearest
from dsmoe_quantize.calibrated.hessian import ENOUGH, HessianTap

N_OUT, N_IN = 24, 512


def correlated(n_tokens: int, n_in: int, seed: int, rank: int = 24) -> torch.Tensor:
    """Inputs that lie close to a space of fewer dimensions, with some large columns."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n_tokens, rank, generator=generator) @ torch.randn(rank, n_in, generator=generator)
    scales = torch.rand(n_in, generator=generator) * 3
    return (mixed + 0.3 * torch.randn(n_tokens, n_in, generator=generator)) * scales


def weights(n_matrices: int, seed: int = 0, n_in: int = N_IN) -> torch.Tensor:
    return torch.randn(n_matrices, N_OUT, n_in, generator=torch.Generator().manual_seed(seed)) * 0.02


def encoded(kind: GgmlType, matrices: torch.Tensor) -> tuple[NDArray[Any], Grid]:
    rows = encode(kind, matrices.flatten(0, 1).numpy(), None)
    return rows, grid_of(FORMATS[kind], rows, matrices.shape)


def textbook(
    weight: NDArray[Any],
    scale: NDArray[Any],
    offset: NDArray[Any],
    levels: NDArray[Any],
    hessian: NDArray[Any],
) -> NDArray[np.uint8]:
    """Return the codes by algorithm 1 of the paper in float64, with the inverse updated column by column.

    Instead of a Cholesky factor, each column is eliminated from the inverse Hessian (equation 3).
    """
    hessian = hessian.astype(np.float64)
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian = hessian + np.eye(len(hessian)) * DAMPING * np.diag(hessian).mean()
    inverse = np.linalg.inv(hessian)
    weight = weight.astype(np.float64).copy()
    codes = np.zeros(weight.shape, np.uint8)
    left = list(order)
    for column in order:
        for row in range(len(weight)):
            values = scale[row, column] * levels + offset[row, column]
            code = int(np.abs(values - weight[row, column]).argmin())
            codes[row, column] = code
            error = (weight[row, column] - values[code]) / inverse[column, column]
            weight[row, left] -= error * inverse[column, left]
        left.remove(column)
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


def output_error(weight: torch.Tensor, decoded: NDArray[Any], inputs: torch.Tensor) -> float:
    difference = inputs @ (weight - torch.from_numpy(decoded).view_as(weight)).mT
    return float(difference.square().mean())


def rounded(kind: GgmlType, matrices: torch.Tensor, hessian: torch.Tensor) -> NDArray[Any]:
    rows, grid = encoded(kind, matrices)
    codes, _ = gptq(matrices, grid, *factor_of(hessian))
    FORMATS[kind].write_codes(rows, codes.flatten(0, 1).numpy())
    return decode(kind, rows, matrices.shape[-1])


@pytest.mark.parametrize(
    "kind", [GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.IQ4_NL, GgmlType.Q3_K], ids=lambda k: k.name
)
def test_codes_are_those_of_the_textbook(kind: GgmlType) -> None:
    """A wrong permutation, block update or factor. Few codes differ: those at a boundary, by rounding."""
    matrices = weights(2)
    hessian = torch.stack(
        [(x.T @ x) / len(x) for x in (correlated(2000, N_IN, 1), correlated(2000, N_IN, 2))]
    )
    _, grid = encoded(kind, matrices)
    codes, positions = gptq(matrices, grid, *factor_of(hessian))
    scale, offset = (part.numpy() for part in grid.expanded())
    for at in range(2):
        expected = textbook(
            matrices[at].numpy(), scale[at], offset[at], grid.levels.numpy(), hessian[at].numpy()
        )
        assert (codes[at].numpy() != expected).mean() < 0.02
    assert torch.equal(nearest(grid.levels, positions), codes.long())


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_the_output_error_falls_with_correlated_inputs(kind: GgmlType) -> None:
    """Corrections with the wrong sign, or for the wrong columns, make it grow. New inputs are measured."""
    matrices, both = weights(1), correlated(6000, N_IN, 3)
    inputs, others = both[:4000], both[4000:]
    rows, _ = encoded(kind, matrices)
    plain = output_error(matrices, decode(kind, rows, N_IN), others)
    ours = output_error(matrices, rounded(kind, matrices, (inputs.T @ inputs)[None]), others)
    assert ours < 0.7 * plain


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_inputs_without_correlation_change_no_code_for_the_worse(kind: GgmlType) -> None:
    """With a diagonal Hessian there is nothing to correct: each weight gets its nearest value."""
    matrices = weights(3)
    hessian = torch.diag(torch.rand(N_IN, generator=torch.Generator().manual_seed(4)) + 0.1).expand(3, -1, -1)
    _, grid = encoded(kind, matrices)
    codes, _ = gptq(matrices, grid, *factor_of(hessian))
    scale, offset = grid.expanded()
    chosen = (scale * grid.levels[codes.long()] + offset - matrices).abs()
    of_all = (scale[..., None] * grid.levels + offset[..., None] - matrices[..., None]).abs().amin(-1)
    torch.testing.assert_close(chosen, of_all, rtol=1e-4, atol=1e-7)


def test_matrices_are_rounded_independently() -> None:
    """An expert whose codes depend on which others are in the batch."""
    matrices = weights(3)
    hessian = torch.stack([x.T @ x for x in (correlated(999, N_IN, seed) for seed in range(3))])
    together = rounded(GgmlType.Q4_0, matrices, hessian).reshape(3, N_OUT, N_IN)
    alone = rounded(GgmlType.Q4_0, matrices[1:2], hessian[1:2])
    assert (together[1] != alone).mean() < 0.01


def test_no_activation_at_all() -> None:
    """A Hessian of zeros, of experts that nothing reaches, has no Cholesky factor."""
    matrices = weights(1)
    without = rounded(GgmlType.Q4_0, matrices, torch.zeros(1, N_IN, N_IN))
    np.testing.assert_array_equal(without, rounded(GgmlType.Q4_0, matrices, torch.eye(N_IN)[None]))


NAME = "blk.1.ffn_gate_exps.weight"


def test_rare_experts_take_over_the_mean_of_their_layer() -> None:
    """An expert with few tokens fitted to these alone, or with none divided by zero."""
    tap = HessianTap({NAME: (3, N_OUT, 8)})
    inputs = [
        torch.randn(n_tokens, 8, generator=torch.Generator().manual_seed(n_tokens)) for n_tokens in (200, 40)
    ]
    for expert, x in enumerate(inputs):
        tap(NAME, x[:30], expert=expert)
        tap(NAME, x[30:], expert=expert)
    [group] = tap.groups()
    assert group.tensors == [NAME]
    assert group.counts.tolist() == [200, 40, 0]
    mean = sum(x.T @ x for x in inputs) / 240
    torch.testing.assert_close(group.hessian[0], inputs[0].T @ inputs[0] / 200)
    few = (inputs[1].T @ inputs[1] + (ENOUGH * 8 - 40) * mean) / (ENOUGH * 8)
    torch.testing.assert_close(group.hessian[1], few)
    torch.testing.assert_close(group.hessian[2], mean)


def test_gates_weigh_the_inputs() -> None:
    """An expert's error counts as much as its output does."""
    tap = HessianTap({NAME: (1, N_OUT, 8)})
    generator = torch.Generator().manual_seed(5)
    x, gate = torch.randn(100, 8, generator=generator), torch.rand(100, generator=generator)
    tap(NAME, x, expert=0, gate=gate)
    [group] = tap.groups()
    torch.testing.assert_close(group.hessian[0], (x * gate[:, None]).T @ (x * gate[:, None]) / 100)


def test_tensors_with_the_same_inputs_share_a_hessian() -> None:
    """The products of inputs are most of the work, and three of attention's matrices have the same."""
    names = [f"blk.0.attn_{part}.weight" for part in ("q", "k", "v", "output")]
    tap = HessianTap(dict.fromkeys(names, (N_OUT, 8)))
    for _ in range(2):
        x, other = torch.randn(50, 8), torch.randn(50, 8)
        for name in names[:3]:
            tap(name, x.reshape(-1, 8))
        tap(names[3], other)
    assert [(group.tensors, group.counts.tolist()) for group in tap.groups()] == [
        (names[:3], [100]),
        (names[3:], [100]),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    """They would spread to all weights of the matrix."""
    tap = HessianTap({NAME: (2, N_OUT, 8)})
    x = torch.zeros(4, 8)
    x[2, 3] = value
    with pytest.raises(FormatError, match=r"NaN or an infinity\n.*ffn_gate_exps\.weight, expert 1"):
        tap(NAME, x, expert=1)
