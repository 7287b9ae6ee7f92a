"""The base class of observers.

All methods run in the engine's thread; callbacks of graph nodes run during a decode.
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
    """An observer that does nothing. Subclasses override the methods that they need.

    `nodes` maps the names of graph nodes to callbacks. `weights` maps the names of weights to callbacks for
    the nodes whose first source they are. Both are looked up at every step, so `before_step` may replace
    them. An observer with `nodes` or `weights` sets `reads_graph`. One with `reads_logits` gets the logits of
    all scored prompt tokens. `needs_table` is what the observer is for, as users call it, if it only works
    with Hyperparameters; "" if it works with every model.
    """

    nodes: Mapping[bytes, NodeCallback]
    weights: Mapping[bytes, NodeCallback]
    reads_graph = False
    reads_logits = False
    needs_table = ""

    def __init__(self) -> None:
        self.nodes = {}
        self.weights = {}

    def before_step(self, rows: Sequence[Row]) -> None:
        """Prepare for a step. If the previous step was aborted, discard its data."""

    def after_step(self, rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None]) -> None:
        """Read the logits of a complete step. `scored` has one entry per row, or is empty."""

    def summary(self) -> Observation:
        """Return everything observed since loading."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files."""
