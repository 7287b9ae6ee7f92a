"""The file that holds what a reference model's routers did: experts chosen, and all probabilities.

A `block_file` with "DSMOEGAT" and {"first_layer", "n_layers", "n_experts"} of the layers that have routers,
which tells of its n tokens:

    experts per token (int32)
    token (int32)                                             of all tokens
    expert (uint16), of the shape (n, layers, per token)
    cost (uint16), of the shape (n, layers, experts)

A cost is -ln p of a probability in steps of `STEP` nats, so p is right to a factor of exp(STEP / 2), down to
e^-32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsmoe_local.engine.observe.block_file import BlockReader, BlockWriter
from dsmoe_local.model.hyperparameters import Hyperparameters

STEP = 2.0**-11

_MAGIC = b"DSMOEGAT"
_LEAST = np.float32(1e-30)
_MOST = np.float32(np.iinfo(np.uint16).max)


class Gates(NamedTuple):
    """The layers that have routers, and how many experts each of them has."""

    first_layer: int
    n_layers: int
    n_experts: int


def gates_of(hp: Hyperparameters) -> Gates | None:
    """A model's; None if it is dense."""
    return Gates(hp.n_dense_layers, hp.n_moe_layers, hp.n_routed_experts) if hp.is_moe else None


@dataclass(frozen=True, slots=True)
class Choices:
    """What was chosen for tokens that follow each other; for the shapes see above."""

    tokens: npt.NDArray[np.int32]
    experts: npt.NDArray[np.uint16]
    costs: npt.NDArray[np.uint16]


def costs_of(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Probabilities as the file keeps them."""
    steps = np.rint(np.log(np.maximum(probabilities, _LEAST)) * np.float32(-1 / STEP))
    return np.clip(steps, 0, _MOST).astype(np.uint16)


def logarithms_of(costs: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """Natural logarithms of probabilities that sum up to 1 again, the experts last."""
    logarithms: npt.NDArray[np.float64] = costs.astype(np.float64) * -STEP
    logarithms -= np.log(np.exp(logarithms).sum(-1, keepdims=True))
    return logarithms


class RoutingWriter(BlockWriter):
    """Appends choices."""

    def __init__(self, path: Path, gates: Gates) -> None:
        super().__init__(path, _MAGIC, gates._asdict())

    def add(self, request_id: str, index: int, choices: Choices) -> None:
        """Append those of tokens that follow each other, from `index` on."""
        n_tokens, _, n_used = choices.experts.shape
        told: Sequence[bytes] = [
            np.array([n_used], "<i4").tobytes(),
            choices.tokens.astype("<i4").tobytes(),
            choices.experts.astype("<u2").tobytes(),
            choices.costs.astype("<u2").tobytes(),
        ]
        self.append(request_id, index, n_tokens, told)


class RoutingReader(BlockReader):
    """Finds choices."""

    def __init__(self, path: Path) -> None:
        self._known: tuple[int, Choices | None] = (-1, None)
        self._n_used: int | None = None
        super().__init__(path, _MAGIC)

    def check(self) -> None:
        """See BlockReader."""
        self.gates = Gates(*(self.number(name) for name in Gates._fields))

    def find(self, request_id: str, index: int) -> Choices | None:
        """What was chosen for one token, without the first dimension; None if it is not there.

        FormatError: the file is forged.
        """
        place = self.place(request_id, index)
        if place is None:
            return None
        if self._known[0] != place.position:
            self._known = (place.position, self._read_block(self.read(place), place.n_tokens))
        block = self._known[1]
        assert block is not None
        j = place.number
        return Choices(block.tokens[j], block.experts[j], block.costs[j])

    def _read_block(self, told: bytes, n: int) -> Choices:
        _, n_layers, n_experts = self.gates
        n_used = int.from_bytes(told[:4], "little")
        if not 1 <= n_used <= n_experts or len(told) != 4 + 4 * n + 2 * n * n_layers * (n_used + n_experts):
            raise self.damaged("a block is not as long as it says")
        tokens = np.frombuffer(told, "<i4", n, 4)
        both = np.frombuffer(told, "<u2", offset=4 + 4 * n)
        split = n * n_layers * n_used
        experts = both[:split].reshape(n, n_layers, n_used)
        if self._n_used not in (None, n_used) or (experts >= n_experts).any():
            raise self.damaged("it has experts that its model lacks")
        self._n_used = n_used
        return Choices(tokens, experts, both[split:].reshape(n, n_layers, n_experts))
