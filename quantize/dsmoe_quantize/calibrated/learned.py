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
from dsmoe_quantize.calibrated.network.layer import Weights

STEPS = 55
OFFSET_RATE = 0.012
"""Change of an offset in the first step, in codes. It falls to 0 in the last."""
SCALE_RATE = 2e-3
"""Learning rate of relative changes of scales in the first step."""
_BETAS = 0.9, 0.999
_EPSILON = 1e-12

Forward = Callable[[Weights, Tensor], Tensor]
"""Computes the layer: (all its weights, hidden states) to hidden states."""


def _is_even(levels: Tensor) -> bool:
    return bool((levels.diff() == 1).all())


def index_of(levels: Tensor, positions: Tensor) -> Tensor:
    """Return positions in units of codes: those of the levels are integers, between them it is linear."""
    if _is_even(levels):
        return (positions - levels[0]).clamp(0, len(levels) - 1)
    below = torch.searchsorted(levels, positions, right=True).sub_(1).clamp_(0, len(levels) - 2)
    within = (positions - levels[below]) / (levels[below + 1] - levels[below])
    return (below + within).clamp(0, len(levels) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """The encoded rows of a tensor, and its codes before they were rounded, if these are to be trained.

    `indexes` has a number for each weight, in the order of the rows.
    """

    rows: Bytes
    indexes: Tensor | None = None


class TrainedTensor:
    """The scales of a tensor, or of one of its matrices, in training; and its codes if `with_codes`.

    Its own memory is 4 bytes for each weight, 6 with codes, beside the indexes that it is given.
    """

    def __init__(self, form: BlockFormat, rounded: Rounded, shape: Sequence[int], with_codes: bool) -> None:
        assert rounded.indexes is not None
        device, rows = rounded.indexes.device, rounded.rows
        self._form = form
        self._rows = rows
        self._shape = tuple(shape)
        self._indexes = rounded.indexes.reshape(-1, form.n_scales, form.sub_size)
        self._offsets = torch.zeros_like(self._indexes, dtype=torch.float16) if with_codes else None
        self._weights = torch.empty_like(self._indexes)
        self._levels = torch.from_numpy(form.levels).to(device)
        self._is_even = _is_even(self._levels)
        self._supers = torch.from_numpy(form.read_supers(rows)).to(device)
        self._multipliers = torch.from_numpy(form.multipliers(rows)).to(device)
        self._sign = (self._supers[:, None, 0] * self._multipliers[..., 0]).sign()[..., None]
        self._relative = torch.ones_like(self._supers)
        self._first = torch.zeros_like(self._supers)
        self._second = torch.zeros_like(self._supers)
        self._n_updates = 0

    def _codes(self, out: Tensor) -> Tensor:
        if self._offsets is None:
            out.copy_(self._indexes)
        else:
            torch.add(self._indexes, self._offsets, out=out)
        return out.round_().clamp_(0, len(self._levels) - 1)

    def _scaled(self) -> Tensor:
        return (self._supers * self._relative).half().float()[:, None] * self._multipliers

    def weights(self) -> Tensor:
        """Return the weights that codes and scales stand for now. The next call overwrites them."""
        weights = self._codes(self._weights)
        if self._is_even:
            weights += self._levels[0]
        else:
            weights.copy_(self._levels.index_select(0, weights.int().flatten()).view_as(weights))
        scaled = self._scaled()
        weights *= scaled[..., :1]
        if scaled.shape[-1] > 1:
            weights += scaled[..., 1:]
        return weights.view(self._shape)

    def update(self, gradient: Tensor, step: int) -> None:
        """Move against the gradient of the last `weights`. Changes shrink from step 0 to step STEPS.

        Experts without tokens have no gradient in some steps.
        """
        self._n_updates += 1
        left = 1 - step / STEPS
        gradient = gradient.view(self._indexes.shape)
        # A weight is scale * level + offset. If scale or offset changes by a share, so does that part.
        slopes = [(gradient * self._weights).sum(-1)]
        if self._supers.shape[-1] > 1:
            by_offset = gradient.sum(-1) * self._scaled()[..., 1]
            slopes = [slopes[0] - by_offset, by_offset]
        slope = torch.stack([part.sum(-1) for part in slopes], -1) / self._relative
        self._first.lerp_(slope, 1 - _BETAS[0])
        self._second.lerp_(slope.square(), 1 - _BETAS[1])
        first = self._first / (1 - _BETAS[0] ** self._n_updates)
        second = self._second / (1 - _BETAS[1] ** self._n_updates)
        self._relative -= SCALE_RATE * left * first / (second.sqrt() + _EPSILON)
        if self._offsets is not None:
            change = gradient.sign().mul_(self._sign * (OFFSET_RATE * left))
            self._offsets.sub_(change).clamp_(-0.5, 0.5)

    def rows(self) -> Bytes:
        """Return the encoded rows with the trained codes and scales."""
        rows = self._rows.copy()
        codes = self._codes(torch.empty_like(self._weights)).to(torch.uint8)
        self._form.write_codes(rows, codes.cpu().numpy())
        self._form.write_supers(rows, (self._supers * self._relative).cpu().numpy())
        return rows


def error(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean square error of a layer's outputs, relative to each token's mean square."""
    weight = 1 / wanted.square().mean(-1, keepdim=True).clamp_(min=_EPSILON)
    return ((found - wanted).square() * weight).mean()


Trained = Mapping[str, TrainedTensor | Sequence[TrainedTensor]]
"""What is trained in a layer, by GGUF names. Of routed experts, it is one for each matrix."""


def train(
    forward: Forward,
    fixed: Weights,
    trained: Trained,
    batches: Iterable[tuple[Tensor, Tensor]],
    advance: Callable[[], None],
) -> None:
    """Train on STEPS batches, one after another. Call `advance` after each.

    `fixed` are the layer's other weights. A batch is hidden states, and the outputs that are wanted for them.
    """
    for step, (states, wanted) in enumerate(batches):
        weights = {
            name: _updating(part, step)
            if isinstance(part, TrainedTensor)
            else [_updating(each, step) for each in part]
            for name, part in trained.items()
        }
        with torch.enable_grad():
            error(forward({**fixed, **weights}, states), wanted).backward()
        advance()


def _updating(tensor: TrainedTensor, step: int) -> Tensor:
    """Return the weights of a tensor, which is updated as soon as a backward pass has their gradient."""

    def update(weights: Tensor) -> None:
        assert weights.grad is not None
        tensor.update(weights.grad, step)
        weights.grad = None

    weights = tensor.weights().detach().requires_grad_()
    weights.register_post_accumulate_grad_hook(update)
    return weights
