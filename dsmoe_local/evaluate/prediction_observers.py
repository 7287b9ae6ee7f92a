"""Observers that record a model's predictions, and compare another model's predictions with them.

The comparison is the Kullback-Leibler divergence. A recorded prediction has entries for the likeliest tokens,
and the total probability m of all others, the tail. So the tail's part of the divergence is known only within
bounds. Let m' be the total probability of the tail's tokens in the compared model.

- `kl` uses the lower bound, m ln(m / m') by the log-sum inequality.
- `kl_upper` uses the upper bound, m (ln p - ln q). p is the smallest recorded probability, q the smallest
  probability of the compared model.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.observe.logprobs import Moments, ScoredBlock, perplexity, scored_blocks
from dsmoe_local.engine.observe.observer import Observer, Scored, StepLogits
from dsmoe_local.engine.observe.registry import Entry
from dsmoe_local.engine.types import Observation
from dsmoe_local.evaluate.reference_files import Prediction, PredictionReader, PredictionWriter
from dsmoe_local.evaluate.results import Divergence, Estimate, Perplexity, to_json
from dsmoe_local.model.hyperparameters import ModelOutline

if TYPE_CHECKING:
    from dsmoe_local.engine.native import Model, Row

DEFAULT_TOP = 256
DEFAULT_MASS = 0.9999
QUANTILES = (0.5, 0.9, 0.99, 0.999)

_MAX_TOP = 1 << 16
_FLOOR = 1e-6  # less likely tokens get no entry
_MIN_MASS = 1e-300


class PredictionRecorder(Observer):
    """Writes the predictions of scored tokens to the new file `path`.

    A prediction has entries for the likeliest tokens: as few as have the total probability `mass`, at most
    `top`.
    """

    reads_logits = True

    def __init__(
        self,
        model: Model,
        outline: ModelOutline,
        *,
        path: str,
        top: int = DEFAULT_TOP,
        mass: float = DEFAULT_MASS,
    ) -> None:
        super().__init__()
        if not 1 <= top <= _MAX_TOP:
            raise UsageError(f"reference: top = {top} is out of range", remedy=f"it takes 1 to {_MAX_TOP}")
        if not 0 < mass <= 1:
            raise UsageError(f"reference: mass = {mass} is out of range", remedy="it takes 0 to 1")
        self._top, self._mass = top, mass
        # At least one token is above the floor: the likeliest has 1 / n_vocab or more.
        self._floor = math.log(min(_FLOOR, 0.5 / outline.n_vocab)) if mass < 1 else -math.inf
        self._n_tokens = self._n_entries = 0
        self._tail = 0.0
        self._path = Path(path)
        self._writer = PredictionWriter(self._path, outline.n_vocab)

    def after_step(self, rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None]) -> None:
        for block in scored_blocks(rows, logits, scored):
            predictions = [self._predict(block, j) for j in range(len(block.targets))]
            self._writer.add(block.request_id, block.index, predictions)
            self._n_tokens += len(predictions)
            self._n_entries += sum(len(prediction.ids) for prediction in predictions)
            self._tail += sum(prediction.tail_mass for prediction in predictions)

    def _predict(self, block: ScoredBlock, j: int) -> Prediction:
        shifted, log_total = block.shifted[j], block.log_totals[j]
        ids = np.flatnonzero(shifted >= self._floor + log_total)
        if len(ids) > self._top:
            ids = ids[np.argpartition(shifted[ids], -self._top)[-self._top :]]
        ids = ids[np.argsort(-shifted[ids], kind="stable")]
        held = np.cumsum(block.exponentials[j, ids], dtype=np.float64)
        count = int(np.searchsorted(held, self._mass * block.totals[j])) + 1
        ids = ids[:count]
        tail = max(0.0, 1 - float(held[len(ids) - 1] / block.totals[j]))
        logprobs = (shifted[ids] - log_total).astype(np.float32)
        return Prediction(
            int(block.targets[j]), float(block.logprobs[j]), tail, ids.astype(np.int32), logprobs
        )

    def summary(self) -> Observation:
        """Complete the file and return its statistics. After that, scoring further tokens is an error."""
        self._writer.finish()
        return {
            "path": str(self._path),
            "tokens": self._n_tokens,
            "entries_per_token": self._n_entries / max(1, self._n_tokens),
            "tail_mass": self._tail / max(1, self._n_tokens),
        }

    def close(self) -> None:
        self._writer.close()


class PredictionComparer(Observer):
    """Compares the predictions of scored tokens with those in the file `path`.

    Tokens that are missing or different in the file count as unmatched.
    """

    reads_logits = True

    def __init__(self, model: Model, outline: ModelOutline, *, path: str) -> None:
        super().__init__()
        self._reference = PredictionReader(Path(path))
        if self._reference.n_vocab != outline.n_vocab:
            self._reference.close()
            raise UsageError(
                f"the reference's model has {self._reference.n_vocab} tokens, this one has {outline.n_vocab}",
                where=path,
                remedy="compare models with the same tokenizer",
            )
        self._kl, self._upper = Moments(), Moments()
        self._reference_nll, self._change = Moments(), Moments()
        self._n_same_top = self._n_unmatched = 0
        self._token_kl = array("f")  # 4 bytes per token, for the quantiles
        self._request_kl: dict[str, Moments] = {}

    def after_step(self, rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None]) -> None:
        for block in scored_blocks(rows, logits, scored):
            found = [
                (j, prediction)
                for j, target in enumerate(block.targets.tolist())
                if (prediction := self._reference.find(block.request_id, block.index + j)) is not None
                and prediction.target == target
            ]
            self._n_unmatched += len(block.targets) - len(found)
            if found:
                self._compare(block, found)

    def _compare(self, block: ScoredBlock, found: Sequence[tuple[int, Prediction]]) -> None:
        bounds = np.array([_divergence(block, j, prediction) for j, prediction in found])
        self._kl.add(bounds[:, 0])
        self._request_kl.setdefault(block.request_id, Moments()).add(bounds[:, 0])
        self._upper.add(bounds[:, 1])
        self._token_kl.extend(bounds[:, 0].tolist())
        nll = -block.logprobs[[j for j, _ in found]]
        reference_nll = np.array([-prediction.logprob for _, prediction in found])
        self._reference_nll.add(reference_nll)
        self._change.add(nll - reference_nll)
        self._n_same_top += sum(
            int(block.shifted[j].argmax()) == int(prediction.ids[0]) for j, prediction in found
        )

    def summary(self) -> Observation:
        """Return the numbers of tokens, a Divergence, and the reference's Perplexity on the same tokens."""
        n = self._kl.count
        quantiles = np.quantile(self._token_kl, QUANTILES).tolist() if n else [0.0] * len(QUANTILES)
        same_top = self._n_same_top / max(1, n)
        divergence = Divergence(
            kl=Estimate(self._kl.mean, self._kl.error),
            kl_upper=self._upper.mean,
            quantiles={str(q): value for q, value in zip(QUANTILES, quantiles, strict=True)},
            maximum=max(self._token_kl, default=0.0),
            same_top=Estimate(same_top, math.sqrt(same_top * (1 - same_top) / max(1, n - 1))),
            ratio=_perplexity_estimate(self._change),
            windows=tuple(self._request_kl[name].mean for name in sorted(self._request_kl, key=_by_number)),
        )
        reference = Perplexity(n, self._reference_nll.mean, _perplexity_estimate(self._reference_nll))
        return {
            "tokens": n,
            "unmatched": self._n_unmatched,
            "divergence": to_json(divergence),
            "reference": to_json(reference),
        }

    def close(self) -> None:
        self._reference.close()


def _by_number(request_id: str) -> tuple[int, str]:
    """Return a sort key that sorts decimal numbers by value."""
    return len(request_id), request_id


def _perplexity_estimate(nll: Moments) -> Estimate:
    value = perplexity(nll.mean)
    return Estimate(value, value * nll.error)


def _divergence(block: ScoredBlock, j: int, reference: Prediction) -> tuple[float, float]:
    """Return a lower and an upper bound of the divergence at one token."""
    shifted, log_total = block.shifted[j], block.log_totals[j]
    log_p = reference.logprobs.astype(np.float64)
    log_q = shifted[reference.ids] - log_total
    kept = float(np.exp(log_p) @ (log_p - log_q))
    tail = reference.tail_mass
    if tail <= 0:
        return max(0.0, kept), max(0.0, kept)
    held = float(block.exponentials[j, reference.ids].sum(dtype=np.float64))
    tail_here = max(_MIN_MASS, 1 - held / block.totals[j])
    lower = kept + tail * (math.log(tail) - math.log(tail_here))
    upper = kept + tail * (float(log_p[-1]) - float(shifted.min() - log_total))
    return max(0.0, lower), max(0.0, lower, upper)


OBSERVERS = {
    "reference": Entry(PredictionRecorder, {"path": str, "top": int, "mass": float}, ("path",)),
    "divergence": Entry(PredictionComparer, {"path": str}, ("path",)),
}
