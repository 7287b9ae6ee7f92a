"""Learned rounding: train the codes and scales of a layer, so that the layer's output changes least.

As in AutoRound (arXiv 2309.05516), each weight has an offset of at most half a code, trained by the sign of
its gradient. The gradient of rounding is taken as 1. The f16 numbers of each block are trained with Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_quantize.calibrated.blocks import BlockFormat, Bytes

STEPS = 55
OFFSET_RATE = 0.012
"""Change of an offset in the first step, in codes. It falls to 0 in the last."""
SCALE_RATE = 2e-3
"""Learning rate of relative changes of scales in the first step."""
_BETAS = 0.9, 0.999
_EPSILON = 1e-12

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""Computes the layer: (weights by name, hidden states) to hidden states."""


def index_of(levels: Tensor, positions: Tensor) -> Tensor:
    """Return positions in units of codes: those of the levels are integers, between them it is linear."""
    if bool((levels.diff() == 1).all()):
        return (positions - levels[0]).clamp(0, len(levels) - 1)
    below = torch.searchsorted(levels, positions, right=True).sub_(1).clamp_(0, len(levels) - 2)
    within = (positions - levels[below]) / (levels[below + 1] - levels[below])
    return (below + within).clamp(0, len(levels) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """The encoded rows of a tensor, and its codes before they were rounded, if these are to be trained.

    `indexes` has the shape (n_matrices, n_out, n_in).
    """

    rows: Bytes
    indexes: Tensor | None = None


class TrainedTensor:
    """The scales of one tensor while they are trained, and the offsets of its codes if `with_codes`."""

    def __init__(self, form: BlockFormat, rounded: Rounded, shape: Sequence[int], with_codes: bool) -> None:
        assert rounded.indexes is not None
        device, rows = rounded.indexes.device, rounded.rows
        self._form = form
        self._rows = rows
        self._shape = tuple(shape)
        self._indexes = rounded.indexes.reshape(-1, form.n_scales, form.sub_size)
        self._offsets = torch.zeros_like(self._indexes, dtype=torch.float16) if with_codes else None
        self._levels = torch.from_numpy(form.levels).to(device)
        self._supers = torch.from_numpy(form.read_supers(rows)).to(device)
        self._multipliers = torch.from_numpy(form.multipliers(rows)).to(device)
        self._sign = (self._supers[:, None, 0] * self._multipliers[..., 0]).sign()[..., None]
        self._relative = torch.ones_like(self._supers)
        self._first = torch.zeros_like(self._supers)
        self._second = torch.zeros_like(self._supers)

    def _codes(self) -> Tensor:
        indexes = self._indexes if self._offsets is None else self._indexes + self._offsets
        return indexes.round().clamp_(0, len(self._levels) - 1).long()

    def _scaled(self) -> Tensor:
        return (self._supers * self._relative).half().float()[:, None] * self._multipliers

    def weights(self) -> Tensor:
        """Return the weights that codes and scales stand for now."""
        scaled = self._scaled()
        weights = self._levels[self._codes()] * scaled[..., :1]
        if scaled.shape[-1] > 1:
            weights += scaled[..., 1:]
        return weights.view(self._shape)

    def update(self, gradient: Tensor, step: int) -> None:
        """Take a step, the first of which is 0. `gradient` is that of `weights`."""
        left = 1 - step / STEPS
        gradient = gradient.view(self._indexes.shape)
        by_scale = (gradient * self._levels[self._codes()]).sum(-1)
        parts = [by_scale, gradient.sum(-1)][: self._supers.shape[-1]]
        slope = (torch.stack(parts, -1) * self._multipliers).sum(1) * self._supers
        self._first.lerp_(slope, 1 - _BETAS[0])
        self._second.lerp_(slope.square(), 1 - _BETAS[1])
        first = self._first / (1 - _BETAS[0] ** (step + 1))
        second = self._second / (1 - _BETAS[1] ** (step + 1))
        self._relative -= SCALE_RATE * left * first / (second.sqrt() + _EPSILON)
        if self._offsets is not None:
            change = gradient.sign() * self._sign * (OFFSET_RATE * left)
            self._offsets.sub_(change.half()).clamp_(-0.5, 0.5)

    def rows(self) -> Bytes:
        """Return the encoded rows with the trained codes and scales."""
        rows = self._rows.copy()
        self._form.write_codes(rows, self._codes().to(torch.uint8).cpu().numpy())
        self._form.write_supers(rows, (self._supers * self._relative).cpu().numpy())
        return rows


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """The unrounded layer with all its `weights`. The output of the rounded layer is compared with its."""

    forward: Forward
    weights: Mapping[str, Tensor]

    def error(self, rounded: Mapping[str, Tensor], states: Tensor) -> Tensor:
        """Return the mean square error of the outputs, relative to each token's mean square."""
        with torch.no_grad():
            wanted = self.forward(self.weights, states)
            weight = 1 / wanted.square().mean(-1, keepdim=True).clamp_(min=_EPSILON)
        found = self.forward({**self.weights, **rounded}, states)
        return ((found - wanted).square() * weight).mean()


def train(
    teacher: Teacher,
    tensors: Mapping[str, TrainedTensor],
    batches: Iterable[Tensor],
    advance: Callable[[], None],
) -> None:
    """Train `tensors`, one step on each of STEPS batches of hidden states. Calls `advance` after each."""
    for step, states in enumerate(batches):
        with torch.enable_grad():
            weights = {name: tensor.weights().requires_grad_() for name, tensor in tensors.items()}
            teacher.error(weights, states).backward()
        for name, tensor in tensors.items():
            gradient = weights.pop(name).grad
            if gradient is not None:
                tensor.update(gradient, step)
        advance()
