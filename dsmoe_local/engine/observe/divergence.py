"""Observes how far the model's predictions are from a stored reference's: the Kullback-Leibler divergence.

The reference holds its likeliest tokens one by one and the others, its tail, as one mass. Of the tail's share
in the divergence only bounds are known. With m its mass in the reference and m' that of the same tokens here,
the share is at least m ln(m / m'), by the log-sum inequality: this makes `kl`. It is at most m (ln p - ln q),
p the reference's least kept probability and q the model's least of all: this makes `kl_upper`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.native import Model, Row
from dsmoe_local.engine.observe.logprobs import Moments
from dsmoe_local.engine.observe.observer import Logits, Observer, Scored
from dsmoe_local.engine.observe.reference_file import Prediction, ReferenceReader
from dsmoe_local.engine.observe.scoring import Block, blocks
from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import Hyperparameters

QUANTILES = (0.5, 0.9, 0.99, 0.999)

_LEAST_MASS = 1e-300


class Divergence(Observer):
    """Compares with the reference at `path`. Tokens that it does not have, or that follow another text there,
    are counted as unmatched.
    """

    reads_logits = True

    def __init__(self, model: Model, hp: Hyperparameters, *, path: str) -> None:
        super().__init__()
        self._reference = ReferenceReader(Path(path))
        if self._reference.n_vocab != hp.n_vocab:
            self._reference.close()
            raise UsageError(
                f"the reference's model has {self._reference.n_vocab} tokens, this one has {hp.n_vocab}",
                where=path,
            )
        self._kl, self._upper = Moments(), Moments()
        self._nll, self._reference_nll, self._change = Moments(), Moments(), Moments()
        self._n_same_top = self._n_unmatched = 0
        # Four bytes a token, for the quantiles.
        self._each = array("f")
        # Of each request, its tokens and the sum of their divergences.
        self._requests: dict[str, list[float]] = {}

    def after_step(self, rows: Sequence[Row], logits: Logits, scored: Sequence[Scored | None]) -> None:
        """See Observer."""
        for block in blocks(rows, logits, scored):
            found = [
                (j, prediction)
                for j, target in enumerate(block.targets.tolist())
                if (prediction := self._reference.find(block.request_id, block.index + j)) is not None
                and prediction.target == target
            ]
            self._n_unmatched += len(block.targets) - len(found)
            if found:
                self._compare(block, found)

    def _compare(self, block: Block, found: Sequence[tuple[int, Prediction]]) -> None:
        pairs = np.array([_divergence(block, j, prediction) for j, prediction in found])
        self._kl.add(pairs[:, 0])
        request = self._requests.setdefault(block.request_id, [0, 0.0])
        request[0] += len(pairs)
        request[1] += float(pairs[:, 0].sum())
        self._upper.add(pairs[:, 1])
        self._each.extend(pairs[:, 0].tolist())
        nll = -block.logprobs[[j for j, _ in found]]
        reference = np.array([-prediction.logprob for _, prediction in found])
        self._nll.add(nll)
        self._reference_nll.add(reference)
        self._change.add(nll - reference)
        self._n_same_top += sum(
            int(block.shifted[j].argmax()) == int(prediction.ids[0]) for j, prediction in found
        )

    def summary(self) -> Observation:
        """See Observer: means in nats with their standard errors."""
        quantiles = np.quantile(self._each, QUANTILES).tolist() if self._each else [0.0] * len(QUANTILES)
        return {
            "tokens": self._kl.count,
            "unmatched": self._n_unmatched,
            "kl": self._kl.mean,
            "kl_error": self._kl.error,
            "kl_upper": self._upper.mean,
            "kl_quantiles": {str(q): value for q, value in zip(QUANTILES, quantiles, strict=True)},
            "kl_max": max(self._each, default=0.0),
            "requests": [
                {"request": name, "tokens": n, "kl": total / n} for name, (n, total) in self._requests.items()
            ],
            "same_top": self._n_same_top,
            "nll": self._nll.mean,
            "reference_nll": self._reference_nll.mean,
            "reference_nll_error": self._reference_nll.error,
            "nll_change": self._change.mean,
            "nll_change_error": self._change.error,
        }

    def close(self) -> None:
        """See Observer."""
        self._reference.close()


def _divergence(block: Block, j: int, reference: Prediction) -> tuple[float, float]:
    """Lower and upper bound of one token's divergence."""
    shifted, log_total = block.shifted[j], block.log_totals[j]
    log_p = reference.logprobs.astype(np.float64)
    log_q = shifted[reference.ids] - log_total
    kept = float(np.exp(log_p) @ (log_p - log_q))
    tail = reference.tail_mass
    if tail <= 0:
        return max(0.0, kept), max(0.0, kept)
    held = float(block.exponentials[j, reference.ids].sum(dtype=np.float64))
    tail_here = max(_LEAST_MASS, 1 - held / block.totals[j])
    lower = kept + tail * (math.log(tail) - math.log(tail_here))
    upper = kept + tail * (float(log_p[-1]) - float(shifted.min() - log_total))
    return max(0.0, lower), max(0.0, lower, upper)
