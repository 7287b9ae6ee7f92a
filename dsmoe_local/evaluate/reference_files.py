"""The two files of a recorded reference: its predictions, and the choices of its routers.

Both consist of blocks, as `reference_blocks` describes them. Predictions have the magic DSMOEREF and the
header {"n_vocab"}. The data of n tokens are

    target (int32), its log-probability, tail mass (float32), number of entries (int32): n of each
    token id (int32), log-probability (float32): one of each per entry, the likeliest first

Routing has the magic DSMOEGAT and the header {"first_layer", "n_layers", "n_experts"}: the layers with
routers. The data of n tokens are

    number k of experts per token (int32), token ids (n, int32)
    chosen experts, shape (n, n_layers, k), and costs, shape (n, n_layers, n_experts), both uint16

A cost is -ln p in steps of COST_STEP nats, so p has a relative error of exp(COST_STEP / 2) at most, down to
e^-32. All numbers are little-endian, all logarithms natural.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsmoe_local.evaluate.reference_blocks import BlockReader, BlockWriter
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline

COST_STEP = 2.0**-11

_PREDICTIONS, _ROUTING = b"DSMOEREF", b"DSMOEGAT"
_MAX_LOGPROB = 1e-3  # rounding may make a probability a little larger than 1
_MIN_PROBABILITY = np.float32(1e-30)
_MAX_COST = np.float32(np.iinfo(np.uint16).max)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction of one token.

    `target` is the actual token, `logprob` its log-probability. `ids` are the likeliest tokens, the likeliest
    first, with `logprobs`. `tail_mass` is the total probability of all other tokens.
    """

    target: int
    logprob: float
    tail_mass: float
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


class PredictionWriter(BlockWriter):
    """Writes a file of predictions."""

    def __init__(self, path: Path, n_vocab: int) -> None:
        super().__init__(path, _PREDICTIONS, {"n_vocab": n_vocab})

    def add(self, request_id: str, index: int, predictions: Sequence[Prediction]) -> None:
        """Append the predictions of consecutive tokens; the first has the index `index`."""
        data = [
            np.array([p.target for p in predictions], "<i4").tobytes(),
            np.array([p.logprob for p in predictions], "<f4").tobytes(),
            np.array([p.tail_mass for p in predictions], "<f4").tobytes(),
            np.array([len(p.ids) for p in predictions], "<i4").tobytes(),
            np.concatenate([p.ids for p in predictions]).astype("<i4").tobytes(),
            np.concatenate([p.logprobs for p in predictions]).astype("<f4").tobytes(),
        ]
        self.append(request_id, index, len(predictions), data)


class PredictionReader(BlockReader[list[Prediction]]):
    """Reads a file of predictions."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _PREDICTIONS)

    def check_header(self) -> None:
        self.n_vocab = self.number("n_vocab")

    def find(self, request_id: str, index: int) -> Prediction | None:
        """Return the prediction of a token; None if it was not scored. Raises FormatError."""
        found = self.block_of(request_id, index)
        return None if found is None else found[0][found[1]]

    def decode(self, data: bytes, n_tokens: int) -> list[Prediction]:
        floats = np.frombuffer(data, "<f4", len(data) // 4)
        integers = floats.view("<i4")
        sizes = integers[3 * n_tokens : 4 * n_tokens].astype(np.int64)
        total = int(sizes.sum())
        if len(data) != 16 * n_tokens + 8 * total or (sizes < 1).any():
            raise self.damaged("a block does not have the length that it states")
        targets, ids = integers[:n_tokens], integers[4 * n_tokens : 4 * n_tokens + total]
        logprobs, masses = floats[n_tokens : 2 * n_tokens], floats[2 * n_tokens : 3 * n_tokens]
        entries = floats[4 * n_tokens + total :]
        if total and not 0 <= int(ids.min()) <= int(ids.max()) < self.n_vocab:
            raise self.damaged("a token is not in the vocabulary")
        logarithms = np.concatenate([logprobs, entries])
        is_possible = np.isfinite(logarithms) & (logarithms <= _MAX_LOGPROB)
        if not (is_possible.all() and ((masses >= 0) & (masses <= 1)).all()):
            raise self.damaged("a probability is not between 0 and 1")
        ends = np.cumsum(sizes).tolist()
        return [
            Prediction(int(targets[j]), float(logprobs[j]), float(masses[j]), ids[a:b], entries[a:b])
            for j, (a, b) in enumerate(zip([0, *ends], ends, strict=False))
        ]


class Routers(NamedTuple):
    """The layers of a model that have routers, and how many experts each of them has."""

    first_layer: int
    n_layers: int
    n_experts: int


def routers_of(outline: ModelOutline) -> Routers | None:
    """Return the routers of a model; None if it is dense, or no table describes it."""
    if not isinstance(outline, Hyperparameters) or not outline.is_moe:
        return None
    return Routers(outline.n_dense_layers, outline.n_moe_layers, outline.n_routed_experts)


@dataclass(frozen=True, slots=True)
class Choices:
    """The experts chosen for consecutive tokens, and the costs of all experts, with the shapes above."""

    tokens: npt.NDArray[np.int32]
    experts: npt.NDArray[np.uint16]
    costs: npt.NDArray[np.uint16]


def costs_of(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the costs of probabilities."""
    steps = np.rint(np.log(np.maximum(probabilities, _MIN_PROBABILITY)) * np.float32(-1 / COST_STEP))
    return np.clip(steps, 0, _MAX_COST).astype(np.uint16)


def logarithms_of(costs: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """Return log-probabilities, normalized so that the probabilities of the last axis sum up to 1."""
    logarithms: npt.NDArray[np.float64] = costs.astype(np.float64) * -COST_STEP
    logarithms -= np.log(np.exp(logarithms).sum(-1, keepdims=True))
    return logarithms


class RoutingWriter(BlockWriter):
    """Writes a file of router choices."""

    def __init__(self, path: Path, routers: Routers) -> None:
        super().__init__(path, _ROUTING, routers._asdict())

    def add(self, request_id: str, index: int, choices: Choices) -> None:
        """Append the choices for consecutive tokens; the first has the index `index`."""
        n_tokens, _, n_used = choices.experts.shape
        data = [
            np.array([n_used], "<i4").tobytes(),
            choices.tokens.astype("<i4").tobytes(),
            choices.experts.astype("<u2").tobytes(),
            choices.costs.astype("<u2").tobytes(),
        ]
        self.append(request_id, index, n_tokens, data)


class RoutingReader(BlockReader[Choices]):
    """Reads a file of router choices."""

    def __init__(self, path: Path) -> None:
        self._n_used: int | None = None
        super().__init__(path, _ROUTING)

    def check_header(self) -> None:
        self.routers = Routers(*(self.number(name) for name in Routers._fields))

    def find(self, request_id: str, index: int) -> Choices | None:
        """Return the choices for one token, without the first dimension; None if it was not scored.

        Raises FormatError if the values of its block are invalid.
        """
        found = self.block_of(request_id, index)
        if found is None:
            return None
        block, j = found
        return Choices(block.tokens[j], block.experts[j], block.costs[j])

    def decode(self, data: bytes, n_tokens: int) -> Choices:
        _, n_layers, n_experts = self.routers
        n_used = int.from_bytes(data[:4], "little")
        size = 4 + 4 * n_tokens + 2 * n_tokens * n_layers * (n_used + n_experts)
        if not 1 <= n_used <= n_experts or len(data) != size:
            raise self.damaged("a block does not have the length that it states")
        tokens = np.frombuffer(data, "<i4", n_tokens, 4)
        both = np.frombuffer(data, "<u2", offset=4 + 4 * n_tokens)
        split = n_tokens * n_layers * n_used
        experts = both[:split].reshape(n_tokens, n_layers, n_used)
        if self._n_used not in (None, n_used) or (experts >= n_experts).any():
            raise self.damaged("an expert is not in the model")
        self._n_used = n_used
        return Choices(tokens, experts, both[split:].reshape(n_tokens, n_layers, n_experts))
