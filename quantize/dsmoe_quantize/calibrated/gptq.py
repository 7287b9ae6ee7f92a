"""GPTQ (arXiv 2210.17323): round column after column, and correct the columns that are left for each error.

The scales are those of the encoded blocks and stay as they are; only codes are chosen. Matrices of several
experts are processed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsmoe_quantize.calibrated.blocks import BlockFormat, Bytes

DAMPING = 0.01
"""Added to the Hessian's diagonal, relative to its mean."""
BLOCK = 128
"""Columns whose errors are applied to the later ones by one product."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that the weights of a matrix can get: `scale * levels[code] + offset`.

    `scale` and `offset` have the shape (..., n_out, n_in / sub_size). `levels` ascend.
    """

    levels: Tensor
    scale: Tensor
    offset: Tensor | None
    sub_size: int

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Return scale and offset of each weight, (..., n_out, n_in)."""
        scale = self.scale.repeat_interleave(self.sub_size, -1)
        if self.offset is None:
            return scale, torch.zeros_like(scale)
        return scale, self.offset.repeat_interleave(self.sub_size, -1)


def grid_of(form: BlockFormat, rows: Bytes, shape: Sequence[int], device: torch.device | str = "cpu") -> Grid:
    """Return the grid of encoded rows of several matrices, whose `shape` is (n_matrices, n_out, n_in)."""

    def of_matrices(parts: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(parts).view(*shape[:2], -1).to(device)

    scale, offset = form.read_scales(rows, shape[-1])
    return Grid(
        torch.from_numpy(form.levels).to(device),
        of_matrices(scale),
        None if offset is None else of_matrices(offset),
        form.sub_size,
    )


def nearest(levels: Tensor, positions: Tensor) -> Tensor:
    """Return the index of the level next to each position. A position between two levels gets the lower."""
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(positions, middles)


def inverse_or_0(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 where the scale is 0: there every code stands for the offset."""
    return torch.where(scale == 0, 0, 1 / scale)


def factor_of(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of columns by falling activation, and the factor of the inverse Hessian in that order.

    `hessian` is (..., n_in, n_in). The factor U is upper triangular, with U^T U = H^-1 after damping.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    ordered = hessian.gather(-2, order[..., None].expand_as(hessian))
    ordered = ordered.gather(-1, order[..., None, :].expand_as(hessian))
    # Without any activation, all columns count the same.
    damping = DAMPING * diagonal.mean(-1, keepdim=True)
    ordered.diagonal(dim1=-2, dim2=-1).add_(torch.where(damping > 0, damping, 1))
    # torch cannot factorize on MPS.
    device, ordered = ordered.device, ordered.cpu() if ordered.device.type == "mps" else ordered
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return order, torch.linalg.cholesky(inverse, upper=True).to(device)


def gptq(weights: Tensor, grid: Grid, order: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of `weights` (n_matrices, n_out, n_in), and the position of each weight when rounded.

    A position is in units of levels: the weight, corrected for the errors of the columns before it, minus the
    offset, divided by the scale. `order` and `factor` are those of `factor_of` for each matrix.
    """
    by_column = order[:, :, None].expand(-1, -1, weights.shape[1])
    # Columns as rows, so that each is contiguous.
    scale, offset = (part.mT.gather(1, by_column) for part in grid.expanded())
    rest = weights.mT.gather(1, by_column)
    inverse = inverse_or_0(scale)
    positions = torch.empty_like(rest)
    codes = torch.empty_like(rest, dtype=torch.uint8)
    n_columns = rest.shape[1]
    for start in range(0, n_columns, BLOCK):
        end = min(start + BLOCK, n_columns)
        errors = torch.empty_like(rest[:, start:end])
        for column in range(start, end):
            value = rest[:, column]
            position = (value - offset[:, column]) * inverse[:, column]
            code = nearest(grid.levels, position)
            rounded = scale[:, column] * grid.levels[code] + offset[:, column]
            error = (value - rounded) / factor[:, column, column, None]
            positions[:, column], codes[:, column] = position, code
            errors[:, column - start] = error
            later = factor[:, column, column + 1 : end]
            rest[:, column + 1 : end] -= later[:, :, None] * error[:, None]
        rest[:, end:] -= factor[:, start:end, end:].mT @ errors
    back = order.argsort(-1)[:, :, None].expand_as(by_column)
    return codes.gather(1, back).mT.contiguous(), positions.gather(1, back).mT.contiguous()
