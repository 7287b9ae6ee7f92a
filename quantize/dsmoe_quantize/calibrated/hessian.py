"""Hessians of a layer's matrices: products of each two columns of their inputs, summed over tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsmoe_local.base.errors import FormatError
from dsmoe_local.model.layout import input_of

ENOUGH = 10
"""Tokens for each column. The Hessian of a matrix that saw fewer is blended with its tensor's mean."""


@dataclass(slots=True)
class _Sums:
    """The Hessians of all matrices with the same inputs, (n_matrices, n_columns, n_columns)."""

    products: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Tensors with the same inputs, the Hessians of their matrices, and how many tokens each matrix saw."""

    tensors: Sequence[str]
    hessian: Tensor
    counts: Tensor


@dataclass(slots=True)
class HessianTap:
    """Sums up the Hessians of a layer while the layer runs. `shapes` are those of all tensors to quantize.

    The inputs of an expert are weighted by its gate: its error is multiplied by the gate, too.
    """

    shapes: Mapping[str, tuple[int, ...]]
    _sums: dict[str, _Sums] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)
    """The tensor whose sums a tensor shares, because their inputs are the same."""

    def __call__(
        self, tensor: str, inputs: Tensor, *, expert: int | None = None, gate: Tensor | None = None
    ) -> None:
        """Add the inputs of one matrix. Raises FormatError if one is NaN or infinite."""
        if tensor not in self.shapes:
            return
        if tensor not in self._first:
            self._first[tensor] = self._owner(tensor)
        if self._first[tensor] != tensor:
            return
        if tensor not in self._sums:
            self._sums[tensor] = self._empty(tensor, inputs.device)
        sums = self._sums[tensor]
        at = expert or 0
        weighted = inputs if gate is None else inputs * gate[:, None]
        sums.products[at].addmm_(weighted.T, weighted)
        sums.counts[at] += len(inputs)
        if not sums.products[at].diagonal().isfinite().all():
            where = tensor if expert is None else f"{tensor}, expert {expert}"
            raise FormatError(
                "the model computes a NaN or an infinity", where=where, remedy="it cannot be calibrated"
            )

    def _owner(self, tensor: str) -> str:
        """Return the first tensor with the same inputs. Routed experts see other tokens than shared ones."""
        inputs, is_routed = input_of(tensor), len(self.shapes[tensor]) > 2
        return next(
            name
            for name, shape in self.shapes.items()
            if name == tensor or (input_of(name) == inputs != "" and (len(shape) > 2) == is_routed)
        )

    def _empty(self, tensor: str, device: torch.device) -> _Sums:
        shape = self.shapes[tensor]
        n_matrices = shape[0] if len(shape) > 2 else 1
        return _Sums(
            torch.zeros(n_matrices, shape[-1], shape[-1], device=device),
            torch.zeros(n_matrices, dtype=torch.int64),
        )

    def groups(self) -> Iterator[Group]:
        """Yield all groups. Call it once: the sums become the Hessians, and are given away with them.

        The Hessian of n tokens is their mean H. With n < N = ENOUGH * n_columns it is (n H + (N - n) M) / N,
        where M is the mean over the tokens of all matrices of the tensor.
        """
        for owner in list(self._sums):
            sums = self._sums.pop(owner)
            members = [name for name, first in self._first.items() if first == owner]
            yield Group(members, _blended(sums), sums.counts)


def _blended(sums: _Sums) -> Tensor:
    products, counts = sums.products, sums.counts
    mean = products.sum(0) / max(1, int(counts.sum()))
    wanted = ENOUGH * products.shape[-1]
    for product, count in zip(products, counts.tolist(), strict=True):
        if count >= wanted or len(counts) == 1:
            product /= max(1, count)
        else:
            product.add_(mean, alpha=wanted - count).div_(wanted)
    return products
