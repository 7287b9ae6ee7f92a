"""Observes how well the model predicts the scored tokens of prompts: what a perplexity is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.native import Model, Row
from dsmoe_local.engine.observe.observer import Logits, Observer, Scored
from dsmoe_local.engine.observe.perplexity import perplexity
from dsmoe_local.engine.observe.scoring import blocks
from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import Hyperparameters


@dataclass(slots=True)
class Moments:
    """Count, sum and sum of squares of what was added."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Add some numbers."""
        self.count += len(values)
        self.total += float(values.sum())
        self.squares += float(np.square(values).sum())

    @property
    def mean(self) -> float:
        """0 before the first."""
        return self.total / max(1, self.count)

    @property
    def error(self) -> float:
        """Standard error of the mean, of independent values; 0 before the second."""
        if self.count < 2:
            return 0.0
        spread = max(0.0, self.squares - self.count * self.mean**2)
        return math.sqrt(spread / (self.count - 1) / self.count)


class Logprobs(Observer):
    """Negative log-likelihoods in nats."""

    reads_logits = True

    def __init__(self, model: Model, hp: Hyperparameters) -> None:
        super().__init__()
        self._nll = Moments()

    def after_step(self, rows: Sequence[Row], logits: Logits, scored: Sequence[Scored | None]) -> None:
        """See Observer."""
        for block in blocks(rows, logits, scored):
            self._nll.add(-block.logprobs)

    def summary(self) -> Observation:
        """See Observer: `perplexity_error` is its standard error."""
        found = perplexity(self._nll.mean)
        return {
            "tokens": self._nll.count,
            "nll": self._nll.total,
            "nll_squares": self._nll.squares,
            "perplexity": found,
            "perplexity_error": found * self._nll.error,
        }
