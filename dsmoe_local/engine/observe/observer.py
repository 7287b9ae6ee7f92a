"""What an observer is: the graph nodes and logits that it wants to see, and its summary. Sees nothing itself.

Everything runs in the engine's thread, between and inside decode steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.native import Row
from dsmoe_local.engine.types import Observation

Logits: TypeAlias = npt.NDArray[np.float32]
Watch: TypeAlias = Callable[[int], None]
"""Takes the address of a tensor (see native.tensors) whose values have just been computed."""


class Scored(NamedTuple):
    """What the first outputs of a row should have predicted: the prompt's own next tokens.

    The row's j-th output belongs to `targets[j]`, which stands at `start` + j in the prompt of the request.
    """

    request_id: str
    start: int
    targets: Sequence[int]


class Observer:
    """Does nothing; each observer replaces what it needs.

    `nodes` are graph nodes by their exact names, `weights` nodes by the name of the weight they read first.
    Both are taken at every step, so an observer may replace them in `before_step`. `reads_graph` says that it
    has any; `reads_logits` that it wants those of scored prompt tokens.
    """

    nodes: Mapping[bytes, Watch]
    weights: Mapping[bytes, Watch]
    reads_graph = False
    reads_logits = False

    def __init__(self) -> None:
        self.nodes = {}
        self.weights = {}

    def before_step(self, rows: Sequence[Row]) -> None:
        """A step begins; one that was aborted before it is to be forgotten, where that can be."""

    def after_step(self, rows: Sequence[Row], logits: Logits, scored: Sequence[Scored | None]) -> None:
        """The step is complete. `logits` has one row per output; `scored` one entry per row, or none at
        all.
        """

    def summary(self) -> Observation:
        """What was seen since loading."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files."""
