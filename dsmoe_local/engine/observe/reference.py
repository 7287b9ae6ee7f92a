"""Observes what a model predicts of the scored tokens, and writes it: the reference for other models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.native import Model, Row
from dsmoe_local.engine.observe.observer import Logits, Observer, Scored
from dsmoe_local.engine.observe.reference_file import Prediction, ReferenceWriter
from dsmoe_local.engine.observe.scoring import Block, blocks
from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import Hyperparameters

TOP = 256
MASS = 0.9999

_FLOOR = 1e-6  # less likely tokens are not looked at one by one


class Reference(Observer):
    """Writes a new file, `path`. Of each token the likeliest are kept: as few as hold `mass` together, and at
    most `top`.
    """

    reads_logits = True

    def __init__(
        self, model: Model, hp: Hyperparameters, *, path: str, top: int = TOP, mass: float = MASS
    ) -> None:
        super().__init__()
        if not 1 <= top <= 1 << 16:
            raise UsageError(f"reference: top = {top} is out of range", remedy="it takes 1 to 65536")
        if not 0 < mass <= 1:
            raise UsageError(f"reference: mass = {mass} is out of range", remedy="it takes 0 to 1")
        self._top, self._mass = top, mass
        # The likeliest of all is never less likely than the average one.
        self._floor = math.log(min(_FLOOR, 0.5 / hp.n_vocab)) if mass < 1 else -math.inf
        self._n_tokens = self._n_entries = 0
        self._tail = 0.0
        self._path = Path(path)
        self._writer = ReferenceWriter(self._path, hp.n_vocab)

    def after_step(self, rows: Sequence[Row], logits: Logits, scored: Sequence[Scored | None]) -> None:
        """See Observer."""
        for block in blocks(rows, logits, scored):
            predictions = [self._predict(block, j) for j in range(len(block.targets))]
            self._writer.add(block.request_id, block.index, predictions)
            self._n_tokens += len(predictions)
            self._n_entries += sum(len(prediction.ids) for prediction in predictions)
            self._tail += sum(prediction.tail_mass for prediction in predictions)

    def _predict(self, block: Block, j: int) -> Prediction:
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
        """See Observer. What is counted here is on the medium, in the file of that name."""
        self._writer.publish()
        return {
            "path": str(self._path),
            "tokens": self._n_tokens,
            "entries_per_token": self._n_entries / max(1, self._n_tokens),
            "tail_mass": self._tail / max(1, self._n_tokens),
        }

    def close(self) -> None:
        """See Observer."""
        self._writer.close()
