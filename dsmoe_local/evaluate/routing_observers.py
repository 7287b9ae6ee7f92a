"""Observers that record the experts chosen for scored tokens, and compare those of another model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native import Model, Row, tensors
from dsmoe_local.engine.observe.observer import Observer, Scored, StepLogits
from dsmoe_local.engine.observe.registry import Entry
from dsmoe_local.engine.types import Observation
from dsmoe_local.evaluate.reference_files import (
    COST_STEP,
    Choices,
    Routers,
    RoutingReader,
    RoutingWriter,
    costs_of,
    logarithms_of,
    routers_of,
)
from dsmoe_local.evaluate.results import Estimate, LayerRouting, RoutingFidelity, to_json
from dsmoe_local.model.hyperparameters import Hyperparameters

Floats = npt.NDArray[np.float64]


class _LayerChoices(NamedTuple):
    """The choices of one layer for the tokens of a ubatch.

    `order` are all experts in the order of choice (int32), `probabilities` those of all experts (float32),
    without the bias for the choice.
    """

    n_used: int
    order: bytes
    probabilities: bytes


class _Place(NamedTuple):
    """The position of the `n` scored tokens of a row.

    `first`, `token` and `output` are the indices of the first of them: in the prompt, among the tokens of the
    step, and among the outputs of the step.
    """

    request_id: str
    first: int
    token: int
    output: int
    n: int


class _ScoredRouting(Observer):
    """Passes the choices for scored tokens to `take`.

    The choices have the index of the token that was processed, which predicts the next, scored one.
    """

    reads_graph = True
    reads_logits = True
    needs_table = "a comparison of routing"

    def __init__(self, model: Model, hp: Hyperparameters) -> None:
        super().__init__()
        routers = routers_of(hp)
        if routers is None:
            raise UsageError(
                "routing cannot be compared: the model is dense, it has no experts",
                remedy="load it without this observer",
            )
        self.routers = routers
        self._reader = tensors.Reader()
        self._layers: list[list[_LayerChoices]] = [[] for _ in range(routers.n_layers)]
        self._probabilities = b""
        self._tokens: list[bytes] = []
        self.nodes = {b"embd": self._read_tokens}
        for layer in range(routers.n_layers):
            number = routers.first_layer + layer
            # A GPU may compute a router in one kernel, which does not store the probabilities of all experts.
            # A callback for their node prevents that.
            self.nodes[f"ffn_moe_probs-{number}".encode()] = self._read_probabilities
            self.nodes[f"ffn_moe_weights-{number}".encode()] = partial(self._read_choices, layer)

    def take(self, request_id: str, index: int, choices: Choices) -> None:
        """Process the choices for consecutive tokens of a request; the first has the index `index`."""
        raise NotImplementedError

    def before_step(self, rows: Sequence[Row]) -> None:
        self._reader.forget()
        self._tokens.clear()
        for layer in self._layers:
            layer.clear()

    def _read_tokens(self, tensor: int) -> None:
        ids = tensors.source_of(tensor, 1)
        self._tokens.append(self._reader.copy_bytes(ids, 4 * tensors.size_of(ids, 0)))

    def _read_probabilities(self, tensor: int) -> None:
        size = 4 * self.routers.n_experts * tensors.size_of(tensor, 1)
        self._probabilities = self._reader.copy_bytes(tensor, size)

    def _read_choices(self, layer: int, tensor: int) -> None:
        # This node reads the sorted experts, so their memory is not reused yet.
        _, order = self._reader.copy_rows(tensors.source_of(tensor, 1))
        choices = _LayerChoices(tensors.size_of(tensor, 1), order, self._probabilities)
        self._layers[layer].append(choices)

    def after_step(self, rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None]) -> None:
        """See Observer. Raises NativeError if the choices cannot be assigned to the tokens."""
        if not any(scored):
            return
        ids = np.concatenate([np.asarray(row.token_ids, np.int32) for row in rows])
        if b"".join(self._tokens) != ids.tobytes():
            raise NativeError(
                "the tokens of a step were computed in another order, so experts cannot be assigned to them",
                remedy="load the model with a unified cache",
            )
        n_outputs = sum(row.n_outputs for row in rows)
        layers = [self._arrays(layer, len(ids), n_outputs) for layer in self._layers]
        for place in _places(rows, scored):
            experts, probabilities = [], []
            for layer_experts, layer_probabilities in layers:
                # The last layer may have computed only the outputs.
                start = place.token if len(layer_experts) == len(ids) else place.output
                experts.append(layer_experts[start : start + place.n])
                probabilities.append(layer_probabilities[start : start + place.n])
            choices = Choices(
                ids[place.token : place.token + place.n],
                np.stack(experts, 1).astype(np.uint16),
                costs_of(np.stack(probabilities, 1)),
            )
            self.take(place.request_id, place.first, choices)

    def _arrays(
        self, parts: Sequence[_LayerChoices], n_tokens: int, n_outputs: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return the chosen experts and all probabilities of one layer, with a row for each token."""
        shape = (-1, self.routers.n_experts)
        order = np.frombuffer(b"".join(part.order for part in parts), np.int32).reshape(shape)
        p = np.frombuffer(b"".join(part.probabilities for part in parts), np.float32).reshape(shape)
        if len(order) not in (n_tokens, n_outputs) or len(p) != len(order):
            raise NativeError(f"a router processed {len(order)} of {n_tokens} tokens")
        return order[:, : parts[0].n_used], p


def _places(rows: Sequence[Row], scored: Sequence[Scored | None]) -> Iterator[_Place]:
    token = output = 0
    for row, score in zip(rows, scored, strict=False):
        if score is not None and len(score.targets):
            first = token + len(row.token_ids) - row.n_outputs
            yield _Place(score.request_id, score.start - 1, first, output, len(score.targets))
        token += len(row.token_ids)
        output += row.n_outputs


class RoutingRecorder(_ScoredRouting):
    """Writes the choices for scored tokens to the new file `path`."""

    def __init__(self, model: Model, hp: Hyperparameters, *, path: str) -> None:
        super().__init__(model, hp)
        self._n_tokens = 0
        self._path = Path(path)
        self._writer = RoutingWriter(self._path, self.routers)

    def take(self, request_id: str, index: int, choices: Choices) -> None:
        self._writer.add(request_id, index, choices)
        self._n_tokens += len(choices.tokens)

    def summary(self) -> Observation:
        """Complete the file and return its statistics. After that, scoring further tokens is an error."""
        self._writer.finish()
        return {"path": str(self._path), "tokens": self._n_tokens}

    def close(self) -> None:
        self._writer.close()


class RoutingComparer(_ScoredRouting):
    """Compares the choices for scored tokens with those in the file `path`.

    Tokens that are missing or different in the file count as unmatched.
    """

    def __init__(self, model: Model, hp: Hyperparameters, *, path: str) -> None:
        super().__init__(model, hp)
        self._reference = RoutingReader(Path(path))
        if self._reference.routers != self.routers:
            self._reference.close()
            raise UsageError(
                f"the reference has {_in_words(self._reference.routers)}, this model has"
                f" {_in_words(self.routers)}",
                where=path,
                remedy="compare models with the same routers",
            )
        n_layers = self.routers.n_layers
        self._n_tokens = self._n_unmatched = self._n_same_everywhere = 0
        self._n_same = np.zeros(n_layers, np.int64)
        # Sums and sums of squares.
        self._overlap, self._kl = np.zeros((2, n_layers)), np.zeros((2, n_layers))
        self._kl_bound = np.zeros(n_layers)

    def take(self, request_id: str, index: int, choices: Choices) -> None:
        found = [
            (j, there)
            for j, token in enumerate(choices.tokens.tolist())
            if (there := self._reference.find(request_id, index + j)) is not None and there.tokens == token
        ]
        self._n_unmatched += len(choices.tokens) - len(found)
        self._n_tokens += len(found)
        if found:
            here = [j for j, _ in found]
            self._compare_experts(np.stack([there.experts for _, there in found]), choices.experts[here])
            self._compare_probabilities(
                logarithms_of(np.stack([there.costs for _, there in found])),
                logarithms_of(choices.costs[here]),
            )

    def _compare_experts(self, reference: npt.NDArray[np.uint16], own: npt.NDArray[np.uint16]) -> None:
        n_common = (reference[..., :, None] == own[..., None, :]).any(-1).sum(-1)
        is_same = n_common == max(reference.shape[-1], own.shape[-1])
        self._n_same += is_same.sum(0)
        self._n_same_everywhere += int(is_same.all(1).sum())
        self._overlap += _sums(n_common / reference.shape[-1])

    def _compare_probabilities(self, log_p: Floats, log_q: Floats) -> None:
        p, difference = np.exp(log_p), log_p - log_q
        self._kl += _sums(np.maximum(0.0, (p * difference).sum(-1)))
        # Once normalized, both logarithms have an error of COST_STEP at most. To first order, the error of
        # log p changes the sum by |p ln p/q|, that of log q by |p - q|; second-order terms are COST_STEP**2.
        weight = (p * np.abs(difference)).sum(-1) + np.abs(p - np.exp(log_q)).sum(-1)
        self._kl_bound += (math.expm1(COST_STEP) * weight + 4 * COST_STEP**2).sum(0)

    def summary(self) -> Observation:
        """Return the numbers of tokens, and a RoutingFidelity."""
        n = max(1, self._n_tokens)
        layers = tuple(
            LayerRouting(
                layer=self.routers.first_layer + number,
                same=int(self._n_same[number]) / n,
                overlap=self._mean(self._overlap[:, number]),
                gate_kl=self._mean(self._kl[:, number]),
                gate_kl_bound=float(self._kl_bound[number]) / n,
            )
            for number in range(self.routers.n_layers)
        )
        return {
            "tokens": self._n_tokens,
            "unmatched": self._n_unmatched,
            "routing": to_json(RoutingFidelity(self._n_same_everywhere / n, layers)),
        }

    def _mean(self, sums: Floats) -> Estimate:
        n = max(1, self._n_tokens)
        mean, square = (sums / n).tolist()
        return Estimate(mean, math.sqrt(max(0.0, square - mean**2) / max(1, n - 1)))

    def close(self) -> None:
        self._reference.close()


def _sums(values: Floats) -> Floats:
    """Return sums and sums of squares over the tokens, for each layer."""
    return np.stack([values.sum(0), np.square(values).sum(0)])


def _in_words(routers: Routers) -> str:
    first, last = routers.first_layer, routers.first_layer + routers.n_layers - 1
    return f"{routers.n_experts} experts in the layers {first} to {last}"


OBSERVERS = {
    "routing_reference": Entry(RoutingRecorder, {"path": str}, ("path",)),
    "routing_divergence": Entry(RoutingComparer, {"path": str}, ("path",)),
}
