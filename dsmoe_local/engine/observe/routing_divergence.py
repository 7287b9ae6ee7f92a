"""Observes how far a model's routers are from those of a stored reference, token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.native import Model
from dsmoe_local.engine.observe.choices import ScoredChoices
from dsmoe_local.engine.observe.routing_file import STEP, Choices, RoutingReader, logarithms_of
from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import Hyperparameters

Floats = npt.NDArray[np.float64]


class RoutingDivergence(ScoredChoices):
    """Compares with the reference at `path`. Tokens that it does not have, or that are others there, are
    counted as unmatched.
    """

    def __init__(self, model: Model, hp: Hyperparameters, *, path: str) -> None:
        super().__init__(model, hp)
        self._reference = RoutingReader(Path(path))
        if self._reference.gates != self.gates:
            self._reference.close()
            raise UsageError(
                f"the reference's routers are {_in_words(*self._reference.gates)}, here they are"
                f" {_in_words(*self.gates)}",
                where=path,
            )
        n_layers = self.gates.n_layers
        self._n_tokens = self._n_unmatched = self._n_same_everywhere = 0
        self._same = np.zeros(n_layers, np.int64)
        self._overlap, self._kl = np.zeros((2, n_layers)), np.zeros((2, n_layers))
        self._bound = np.zeros(n_layers)

    def take(self, request_id: str, index: int, choices: Choices) -> None:
        """See ScoredChoices."""
        found = [
            (j, there)
            for j, token in enumerate(choices.tokens.tolist())
            if (there := self._reference.find(request_id, index + j)) is not None and there.tokens == token
        ]
        self._n_unmatched += len(choices.tokens) - len(found)
        self._n_tokens += len(found)
        if found:
            here = [j for j, _ in found]
            self._compare_sets(np.stack([there.experts for _, there in found]), choices.experts[here])
            self._compare_gates(
                logarithms_of(np.stack([there.costs for _, there in found])),
                logarithms_of(choices.costs[here]),
            )

    def _compare_sets(self, reference: npt.NDArray[np.uint16], own: npt.NDArray[np.uint16]) -> None:
        both = (reference[..., :, None] == own[..., None, :]).any(-1).sum(-1)
        same = both == max(reference.shape[-1], own.shape[-1])
        self._same += same.sum(0)
        self._n_same_everywhere += int(same.all(1).sum())
        self._overlap += _sums(both / reference.shape[-1])

    def _compare_gates(self, log_p: Floats, log_q: Floats) -> None:
        p, difference = np.exp(log_p), log_p - log_q
        kl = np.maximum(0.0, (p * difference).sum(-1))
        self._kl += _sums(kl)
        # Both logarithms are wrong by STEP at most, once they are made to sum up to 1: to the first order the
        # one error weighs |p ln p/q|, the other |p - q|, and the squares of STEP are small.
        weight = (p * np.abs(difference)).sum(-1) + np.abs(p - np.exp(log_q)).sum(-1)
        self._bound += (math.expm1(STEP) * weight + 4 * STEP**2).sum(0)

    def summary(self) -> Observation:
        """See Observer; docs/observers.md says what the fields are."""
        return {
            "tokens": self._n_tokens,
            "unmatched": self._n_unmatched,
            "same_everywhere": self._n_same_everywhere,
            "layers": [self._layer(layer) for layer in range(self.gates.n_layers)],
        }

    def _layer(self, layer: int) -> dict[str, Any]:
        overlap, overlap_error = self._mean(self._overlap[:, layer])
        kl, kl_error = self._mean(self._kl[:, layer])
        return {
            "layer": self.gates.first_layer + layer,
            "same_experts": int(self._same[layer]),
            "overlap": overlap,
            "overlap_error": overlap_error,
            "gate_kl": kl,
            "gate_kl_error": kl_error,
            "gate_kl_bound": float(self._bound[layer]) / max(1, self._n_tokens),
        }

    def _mean(self, sums: Floats) -> tuple[float, float]:
        """Mean and standard error of what sums and sums of squares are of."""
        n = max(1, self._n_tokens)
        mean, square = (sums / n).tolist()
        return mean, math.sqrt(max(0.0, square - mean**2) / max(1, n - 1))

    def close(self) -> None:
        """See Observer."""
        self._reference.close()


def _sums(values: Floats) -> Floats:
    """Sums and sums of squares over the tokens, of each layer."""
    return np.stack([values.sum(0), np.square(values).sum(0)])


def _in_words(first_layer: int, n_layers: int, n_experts: int) -> str:
    return f"in the layers {first_layer} to {first_layer + n_layers - 1}, each of {n_experts} experts"
