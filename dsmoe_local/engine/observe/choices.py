"""Observes what the routers do with each scored token: the common part of writing and comparing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.native import Model, Row, tensors
from dsmoe_local.engine.observe.observer import Logits, Observer, Scored
from dsmoe_local.engine.observe.routing_file import Choices, costs_of, gates_of
from dsmoe_local.model.hyperparameters import Hyperparameters


class _Seen(NamedTuple):
    """What one layer did with the tokens of a ubatch, as bytes: all experts in order of probability (int32),
    and their probabilities (float32).
    """

    n_used: int
    order: bytes
    probabilities: bytes


class ScoredChoices(Observer):
    """Hands the choices for scored tokens to `take`. A token is told by its place in the prompt: the router's
    choice for it is part of what predicts the token behind it.
    """

    reads_graph = True
    reads_logits = True

    def __init__(self, model: Model, hp: Hyperparameters) -> None:
        super().__init__()
        gates = gates_of(hp)
        if gates is None:
            raise UsageError("routing cannot be compared: the model is dense, it has no experts")
        self.gates = gates
        self._reader = tensors.Reader()
        self._seen: list[list[_Seen]] = [[] for _ in range(hp.n_moe_layers)]
        self._tokens: list[bytes] = []
        self.nodes = {
            b"embd": self._see_tokens,
            **{
                f"ffn_moe_weights-{self.gates.first_layer + layer}".encode(): partial(self._see, layer)
                for layer in range(hp.n_moe_layers)
            },
        }

    def take(self, request_id: str, index: int, choices: Choices) -> None:
        """Some scored tokens of a request, which follow each other from `index` on."""
        raise NotImplementedError

    def before_step(self, rows: Sequence[Row]) -> None:
        """See Observer."""
        self._reader.forget()
        self._tokens.clear()
        for seen in self._seen:
            seen.clear()

    def _see_tokens(self, tensor: int) -> None:
        ids = tensors.source_of(tensor, 1)
        self._tokens.append(self._reader.copy_bytes(ids, 4 * tensors.size_of(ids, 0)))

    def _see(self, layer: int, tensor: int) -> None:
        # The node reads both: they are still in memory.
        n_tokens, order = self._reader.copy_rows(tensors.source_of(tensor, 1))
        size = 4 * n_tokens * self.gates.n_experts
        mass = self._reader.copy_bytes(tensors.source_of(tensor, 0), size)
        self._seen[layer].append(_Seen(tensors.size_of(tensor, 1), order, mass))

    def after_step(self, rows: Sequence[Row], logits: Logits, scored: Sequence[Scored | None]) -> None:
        """See Observer. NativeError if it cannot be told which choices are whose."""
        if not any(scored):
            return
        ids = np.concatenate([np.asarray(row.token_ids, np.int32) for row in rows])
        if b"".join(self._tokens) != ids.tobytes():
            raise NativeError(
                "the tokens of a step were computed in another order: whose experts are whose is not known",
                remedy="load the model with a unified cache",
            )
        n_outputs = sum(row.n_outputs for row in rows)
        layers = [self._arrays(seen, len(ids), n_outputs) for seen in self._seen]
        for request_id, index, first, output, n in _places(rows, scored):
            starts = [first if len(experts) == len(ids) else output for experts, _ in layers]
            pairs = list(zip(layers, starts, strict=True))
            choices = Choices(
                ids[first : first + n],
                np.stack([experts[start : start + n] for (experts, _), start in pairs], 1).astype(np.uint16),
                costs_of(np.stack([p[start : start + n] for (_, p), start in pairs], 1)),
            )
            self.take(request_id, index, choices)

    def _arrays(
        self, seen: Sequence[_Seen], n_tokens: int, n_outputs: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """One layer's experts and probabilities, a line for each token; in the last one for each output."""
        shape = (-1, self.gates.n_experts)
        order = np.frombuffer(b"".join(part.order for part in seen), np.int32).reshape(shape)
        p = np.frombuffer(b"".join(part.probabilities for part in seen), np.float32).reshape(shape)
        if len(order) not in (n_tokens, n_outputs) or len(p) != len(order):
            raise NativeError(f"a router saw {len(order)} of {n_tokens} tokens")
        return order[:, : seen[0].n_used], p


def _places(rows: Sequence[Row], scored: Sequence[Scored | None]) -> Iterator[tuple[str, int, int, int, int]]:
    """Of each scored row: request, place in its prompt, first token in the step and among the outputs, and
    how many.
    """
    token = output = 0
    for row, score in zip(rows, scored, strict=False):
        if score is not None and len(score.targets):
            first = token + len(row.token_ids) - row.n_outputs
            yield score.request_id, score.start - 1, first, output, len(score.targets)
        token += len(row.token_ids)
        output += row.n_outputs
