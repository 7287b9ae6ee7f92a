"""Observes what the routers do with each scored token, and writes it: the reference for other models."""

from __future__ import annotations

from pathlib import Path

from dsmoe_local.engine.native import Model
from dsmoe_local.engine.observe.choices import ScoredChoices
from dsmoe_local.engine.observe.routing_file import Choices, RoutingWriter
from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import Hyperparameters


class RoutingReference(ScoredChoices):
    """Writes a new file, `path`."""

    def __init__(self, model: Model, hp: Hyperparameters, *, path: str) -> None:
        super().__init__(model, hp)
        self._n_tokens = 0
        self._path = Path(path)
        self._writer = RoutingWriter(self._path, self.gates)

    def take(self, request_id: str, index: int, choices: Choices) -> None:
        """See ScoredChoices."""
        self._writer.add(request_id, index, choices)
        self._n_tokens += len(choices.tokens)

    def summary(self) -> Observation:
        """See Observer. What is counted here is on the medium, in the file of that name."""
        self._writer.publish()
        return {"path": str(self._path), "tokens": self._n_tokens}

    def close(self) -> None:
        """See Observer."""
        self._writer.close()
