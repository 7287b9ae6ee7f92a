"""Observes the inputs of weight matrices: the sum of squares of each column, by expert or by attention head.

`evaluate.importance` computes importance matrices from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.native import Model, Row, tensors
from dsmoe_local.engine.observe.arrays import pack
from dsmoe_local.engine.observe.observer import Observer
from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import Role, TensorSpec, input_of, role_of, tensor_specs


@dataclass(frozen=True, slots=True)
class _Input:
    """An input that several weights share.

    `sums` are the sums of squares, shape (n_matrices, n_columns). Routed experts have a matrix for each
    expert, and some projections of MLA one for each head; other weights have one. `counts` are the numbers of
    vectors: of each expert, or one number for weights that are not of experts. The heads' are the same.
    """

    weights: list[str]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]


class ActivationObserver(Observer):
    """Sums the squares of input vectors and counts the vectors.

    The tokens of an aborted step are counted twice, in the sums and in the counts.
    """

    reads_graph = True
    needs_table = "an importance matrix"

    def __init__(self, model: Model, hp: Hyperparameters) -> None:
        super().__init__()
        self._reader = tensors.Reader()
        self._inputs: dict[str, _Input] = {}
        for spec in tensor_specs(hp):
            if input_of(spec.name) and (spec.role is not Role.EMBEDDING or hp.tied_embeddings):
                self._add(spec)
        self.weights = {
            known.weights[0].encode(): partial(
                self._take_routed if role_of(known.weights[0]) is Role.ROUTED_EXPERT else self._take, known
            )
            for known in self._inputs.values()
        }

    def before_step(self, rows: Sequence[Row]) -> None:
        self._reader.forget()

    def _add(self, spec: TensorSpec) -> None:
        # Only the input of the first of several matrices with the same input is read.
        key = input_of(spec.name)
        known = self._inputs.get(key)
        if known is None:
            n_matrices = spec.shape[0] if len(spec.shape) > 2 else 1
            n_counts = n_matrices if spec.role is Role.ROUTED_EXPERT else 1
            known = _Input([], np.zeros(n_counts, np.int64), np.zeros((n_matrices, spec.shape[-1])))
            self._inputs[key] = known
        known.weights.append(spec.name)

    def _take(self, known: _Input, tensor: int) -> None:
        source = tensors.source_of(tensor, 1)
        # A tied embedding is also read by the embedding lookup, whose input is token ids.
        if not tensors.is_float(source):
            return
        # Shape (streams of the KV cache, heads, tokens, columns). The first two are 1 for most weights.
        for stream in self._reader.view(source):
            known.counts[0] += stream.shape[1]
            for sums, x in zip(known.sums, stream, strict=True):
                sums += _squares(x)

    def _take_routed(self, known: _Input, tensor: int) -> None:
        x = self._reader.view(tensors.source_of(tensor, 1))[0]
        ids = self._reader.view(tensors.source_of(tensor, 2))[0, 0]
        if not ids.size:
            return
        # A token has either one input vector for all of its experts, or one for each.
        n_used = 1 if x.shape[1] > 1 else ids.shape[1]
        flat = ids.ravel()
        vectors, order = x.reshape(-1, x.shape[-1]), np.argsort(flat, kind="stable") // n_used
        counts = np.bincount(flat, minlength=len(known.counts))
        known.counts[:] += counts
        for expert, end in zip(range(len(counts)), np.cumsum(counts).tolist(), strict=True):
            if counts[expert]:
                known.sums[expert] += _squares(vectors[order[end - counts[expert] : end]])

    def summary(self) -> Observation:
        """Return the weights, counts and sums of each input, with the shapes of _Input."""
        inputs: list[dict[str, Any]] = [
            {
                "weights": known.weights,
                "counts": pack(known.counts, "int64"),
                "sums": pack(known.sums, "float32"),
            }
            for known in self._inputs.values()
        ]
        return {"inputs": inputs}


def _squares(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the sum of squares of each column. It uses no BLAS, whose threads spin while they wait."""
    result: npt.NDArray[np.float32] = np.einsum("tc,tc->c", x, x)
    return result
