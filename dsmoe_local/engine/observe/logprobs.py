"""Observes how well the model predicts the scored tokens of prompts: log-probabilities and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.observe.observer import Observer, Scored, StepLogits
from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import ModelOutline

if TYPE_CHECKING:
    from dsmoe_local.engine.native import Model, Row

_MAX_NLL = 600.0  # exp(600) and its standard error still fit into a float
_BLOCK_ROWS = 16  # this many rows of logits fit into a CPU cache: 410 KB each for a 16B model


def perplexity(nll: float) -> float:
    """Return exp(nll), limited to finite values. `nll` is a mean in nats."""
    return math.exp(min(nll, _MAX_NLL))


@dataclass(slots=True)
class Moments:
    """Count, sum and sum of squares of a stream of numbers."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Add the numbers in `values`."""
        self.count += len(values)
        self.total += float(values.sum())
        self.squares += float(np.square(values).sum())

    @property
    def mean(self) -> float:
        """The mean; 0 without numbers."""
        return self.total / max(1, self.count)

    @property
    def error(self) -> float:
        """Standard error of the mean, for independent numbers; 0 for fewer than two."""
        if self.count < 2:
            return 0.0
        spread = max(0.0, self.squares - self.count * self.mean**2)
        return math.sqrt(spread / (self.count - 1) / self.count)


@dataclass(frozen=True, slots=True)
class ScoredBlock:
    """Consecutive scored tokens of one request.

    `targets[j]` is the token at `index` + j of the prompt, `logprobs[j]` its log-probability. `shifted` are
    the logits minus the maximum of their row, `exponentials` is exp(shifted), and `totals` are the sums of
    its rows. The log-probability of token `id` is `shifted[j, id] - log_totals[j]`.
    """

    request_id: str
    index: int
    targets: npt.NDArray[np.int64]
    shifted: npt.NDArray[np.float32]
    exponentials: npt.NDArray[np.float32]
    totals: npt.NDArray[np.float64]
    log_totals: npt.NDArray[np.float64]
    logprobs: npt.NDArray[np.float64]


def scored_blocks(
    rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None]
) -> Iterator[ScoredBlock]:
    """Yield the scored tokens of a step in blocks. Raises NativeError if the logits are not finite."""
    start = 0
    for row, score in zip(rows, scored, strict=False):
        if score is not None:
            for done in range(0, len(score.targets), _BLOCK_ROWS):
                targets = np.asarray(score.targets[done : done + _BLOCK_ROWS], np.int64)
                first = start + done
                yield _block(
                    score.request_id, score.start + done, targets, logits[first : first + len(targets)]
                )
        start += row.n_outputs


def _block(request_id: str, index: int, targets: npt.NDArray[np.int64], logits: StepLogits) -> ScoredBlock:
    # Infinities and NaN are reported below.
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, dtype=np.float64)
    log_totals = np.log(totals)
    logprobs = shifted[np.arange(len(targets)), targets] - log_totals
    if not (np.isfinite(totals).all() and np.isfinite(logprobs).all()):
        raise NativeError(
            "the model's logits are not finite",
            remedy="its weights may be damaged: download or convert it again",
        )
    return ScoredBlock(request_id, index, targets, shifted, exponentials, totals, log_totals, logprobs)


class LogprobObserver(Observer):
    """Sums the negative log-likelihoods of scored tokens, in nats."""

    reads_logits = True

    def __init__(self, model: Model, outline: ModelOutline) -> None:
        super().__init__()
        self._nll = Moments()

    def after_step(self, rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None]) -> None:
        for block in scored_blocks(rows, logits, scored):
            self._nll.add(-block.logprobs)

    def summary(self) -> Observation:
        """Return the count and the sums of negative log-likelihoods, and the perplexity with its error."""
        found = perplexity(self._nll.mean)
        return {
            "tokens": self._nll.count,
            "nll": self._nll.total,
            "nll_squares": self._nll.squares,
            "perplexity": found,
            "perplexity_error": found * self._nll.error,
        }
