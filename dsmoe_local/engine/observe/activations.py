"""Observes the inputs of weight matrices: the sum of squares of each column, separately for each expert.

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
from dsmoe_local.model.layout import Role, TensorSpec, input_of, tensor_specs


@dataclass(frozen=True, slots=True)
class _Input:
    """An input that several weights share.

    `counts` are the numbers of vectors, shape (n_matrices,), `sums` the sums of their squares, shape
    (n_matrices, n_columns). Routed experts have a matrix for each expert, other weights have one.
    """

    weights: list[str]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]


class ActivationObserver(Observer):
    """Sums the squares of input vectors and counts the vectors.

    The tokens of an aborted step are counted twice, in the sums and in the counts.
    """

    reads_graph = True

    def __init__(self, model: Model, hp: Hyperparameters) -> None:
        super().__init__()
        self._reader = tensors.Reader()
        self._inputs: dict[str, _Input] = {}
        for spec in tensor_specs(hp):
            if spec.role is Role.NORM or (spec.role is Role.EMBEDDING and not hp.tied_embeddings):
                continue
            self._add(spec)
        self.weights = {
            f"{known.weights[0]}".encode(): partial(
                self._take_routed if known.weights[0].endswith("_exps.weight") else self._take, known
            )
            for known in self._inputs.values()
        }

    def before_step(self, rows: Sequence[Row]) -> None:
        """See Observer."""
        self._reader.forget()

    def _add(self, spec: TensorSpec) -> None:
        # Only the input of the first of several matrices with the same input is read.
        key = input_of(spec.name)
        known = self._inputs.get(key)
        if known is None:
            n_matrices = spec.shape[0] if spec.role is Role.ROUTED_EXPERT else 1
            known = _Input([], np.zeros(n_matrices, np.int64), np.zeros((n_matrices, spec.shape[-1])))
            self._inputs[key] = known
        known.weights.append(spec.name)

    def _take(self, known: _Input, tensor: int) -> None:
        source = tensors.source_of(tensor, 1)
        # A tied embedding is also read by the embedding lookup, whose input is token ids.
        if not tensors.is_float(source):
            return
        x = self._reader.view(source)[0, 0]
        known.counts[0] += len(x)
        known.sums[0] += _squares(x)

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
