"""The base class of observers: the graph nodes and logits that one reads, and its summary.

All methods run in the engine's thread, between and inside decode steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.types import Observation

if TYPE_CHECKING:
    from dsmoe_local.engine.native import Row

StepLogits: TypeAlias = npt.NDArray[np.float32]
"""The logits of a step, shape (n_outputs, n_vocab), in the order of the step's rows."""
NodeCallback: TypeAlias = Callable[[int], None]
"""Called with the address of a tensor (see native.tensors) that has just been computed."""


class Scored(NamedTuple):
    """The prompt tokens that the first outputs of a row predict.

    The row's output j predicts `targets[j]`, the token at index `start` + j of the request's prompt.
    """

    request_id: str
    start: int
    targets: Sequence[int]


class Observer:
    """Does nothing; subclasses override what they need.

    `nodes` maps exact names of graph nodes to callbacks; `weights` maps the name of the weight that a node
    reads first. Both are looked up at every step, so an observer may replace them in `before_step`. An
    observer with `nodes` or `weights` sets `reads_graph`. One with `reads_logits` gets the logits of all
    scored prompt tokens.
    """

    nodes: Mapping[bytes, NodeCallback]
    weights: Mapping[bytes, NodeCallback]
    reads_graph = False
    reads_logits = False

    def __init__(self) -> None:
        self.nodes = {}
        self.weights = {}

    def before_step(self, rows: Sequence[Row]) -> None:
        """Called before a step. If the previous step was aborted, discard what was collected in it."""

    def after_step(self, rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None]) -> None:
        """Called after a complete step. `scored` has one entry per row, or none at all."""

    def summary(self) -> Observation:
        """Return everything observed since loading."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files."""
