"""Observes the routers: the chosen experts, their probabilities, and the norms of their outputs.

The chosen experts and their probabilities are read for every token. Router entropy and norms are read for
about one token in eight, since each of them stops the graph once more in every layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.native import Model, Row, tensors
from dsmoe_local.engine.observe.arrays import pack
from dsmoe_local.engine.observe.observer import NodeCallback, Observer, Scored, StepLogits
from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import Gating, Hyperparameters
from dsmoe_local.model.layout import has_shared_gate

SAMPLED = 8
"""Entropy and norms are computed for one of this many tokens."""
MAX_TRACE = 4096

_LONG_STEP = 64
"""In a step of this many tokens or more, every SAMPLED-th token is sampled. Otherwise all tokens of every
SAMPLED-th step are sampled.
"""
_COUNTED_AT_ONCE = 512  # entries of `_complete`
_TINY = np.float32(1e-30)

Array = npt.NDArray[Any]


class _Chosen(NamedTuple):
    """The choices of one layer for the tokens of a ubatch.

    `order` are all experts in the order of choice (int32), `mass` the probabilities of the chosen ones
    (float32), without the bias for the choice, normalization and scale.
    """

    layer: int
    n_tokens: int
    n_used: int
    order: bytes
    mass: bytes


@dataclass(frozen=True, slots=True)
class _Traced:
    """The choices for one decoded token. The arrays have the shape (n_moe_layers, n_used)."""

    sequence: int
    position: int
    token_id: int
    experts: Array
    probabilities: Array


def _norm_nodes(hp: Hyperparameters) -> Mapping[str, str]:
    """Return nodes whose norms are computed, with the names of the fields. The shared gate is a number."""
    if has_shared_gate(hp):
        shared = {"ffn_shexp_out": "shared_norm", "ffn_shexp_gate": "shared_gate"}
    else:
        # A graph has one of them.
        shared = {"ffn_shexp": "shared_norm", "ffn_shexp_out": "shared_norm"}
    return {"ffn_moe_out": "routed_norm", **shared}


class RoutingObserver(Observer):
    """Counts the choices of routers. Keeps a trace of the last `trace` tokens of a reply decoded alone."""

    reads_graph = True
    needs_table = "the experts view"

    def __init__(self, model: Model, hp: Hyperparameters, *, trace: int = 0) -> None:
        super().__init__()
        if not hp.is_moe:
            raise UsageError(
                "routing: the model is dense, it has no experts", remedy="leave the observer out"
            )
        if not 0 <= trace <= MAX_TRACE:
            raise UsageError(f"routing: trace = {trace} is out of range", remedy=f"it takes 0 to {MAX_TRACE}")
        self._first, self._n_layers, self._n_experts = hp.n_dense_layers, hp.n_moe_layers, hp.n_routed_experts
        self._counts = np.zeros((self._n_layers, self._n_experts), np.int64)
        self._expert_mass = np.zeros((self._n_layers, self._n_experts))
        self._n_tokens = np.zeros(self._n_layers, np.int64)
        self._mass, self._mass_squares = np.zeros(self._n_layers), np.zeros(self._n_layers)
        # Counts and sums over the sampled tokens.
        self._entropy = np.zeros((2, self._n_layers))
        self._gating, self._n_groups = hp.gating, hp.n_expert_groups
        self._norms_of = _norm_nodes(hp)
        self._contributions = {field: np.zeros(self._n_layers) for field in self._norms_of.values()}
        self._trace: deque[_Traced] = deque(maxlen=trace)
        self._n_steps = 0
        self._stride = 1
        self._reader = tensors.Reader()
        # `_complete` are the choices of earlier steps that are not counted yet. The rest is of this step.
        self._chosen: list[_Chosen] = []
        self._complete: list[_Chosen] = []
        self._probabilities: list[tuple[int, Array]] = []
        self._norms: list[tuple[str, int, Array]] = []
        self._plain = self._choice_nodes()
        self._full = {**self._plain, **self._sampled_nodes()}

    def _choice_nodes(self) -> dict[bytes, NodeCallback]:
        return {
            f"ffn_moe_weights-{self._first + layer}".encode(): partial(self._take_choices, layer)
            for layer in range(self._n_layers)
        }

    def _sampled_nodes(self) -> dict[bytes, NodeCallback]:
        takers: dict[str, Callable[[int, int], None]] = {
            "ffn_moe_probs": self._take_probabilities,
            **{node: partial(self._take_norm, field) for node, field in self._norms_of.items()},
        }
        return {
            f"{name}-{self._first + layer}".encode(): partial(taker, layer)
            for name, taker in takers.items()
            for layer in range(self._n_layers)
        }

    def before_step(self, rows: Sequence[Row]) -> None:
        self._reader.forget()
        self._chosen.clear()
        self._probabilities.clear()
        self._norms.clear()
        long = sum(len(row.token_ids) for row in rows) >= _LONG_STEP
        self._stride = SAMPLED if long else 1
        self.nodes = self._full if long or self._n_steps % SAMPLED == 0 else self._plain
        self._n_steps += 1

    # The callbacks only copy data: during a graph, the CPU caches are full of weights and Python is slow.

    def _take_choices(self, layer: int, tensor: int) -> None:
        # This node reads the ids, so their memory is not reused yet. They are the first columns of the sorted
        # experts.
        n_tokens, order = self._reader.copy_rows(tensors.source_of(tensor, 1))
        n_used = tensors.size_of(tensor, 1)
        mass = self._reader.copy_bytes(tensor, 4 * n_used * n_tokens)
        self._chosen.append(_Chosen(layer, n_tokens, n_used, order, mass))

    def _take_probabilities(self, layer: int, tensor: int) -> None:
        self._probabilities.append((layer, self._reader.view(tensor)[0, 0, :: self._stride].copy()))

    def _take_norm(self, field: str, layer: int, tensor: int) -> None:
        x = self._reader.view(tensor)[0, 0, :: self._stride]
        self._norms.append((field, layer, np.einsum("tc,tc->t", x, x)))

    def after_step(self, rows: Sequence[Row], logits: StepLogits, scored: Sequence[Scored | None]) -> None:
        """See Observer. Choices of several steps are counted together, which is faster."""
        self._complete += self._chosen
        if self._probabilities:
            self._add_details()
        if self._trace.maxlen and self._chosen:
            self._extend_trace(rows)
        if len(self._complete) >= _COUNTED_AT_ONCE:
            self._count()

    def _count(self) -> None:
        if not self._complete:
            return
        layers = np.repeat([c.layer for c in self._complete], [c.n_tokens for c in self._complete])
        experts, mass = self._arrays(self._complete)
        self._complete.clear()
        cells = (layers[:, None] * self._n_experts + experts).ravel()
        size = self._counts.size
        self._counts += np.bincount(cells, minlength=size).reshape(self._counts.shape)
        self._expert_mass += np.bincount(cells, mass.ravel(), size).reshape(self._counts.shape)
        captured = mass.sum(1, dtype=np.float64)
        self._n_tokens += np.bincount(layers, minlength=self._n_layers)
        self._mass += np.bincount(layers, captured, self._n_layers)
        self._mass_squares += np.bincount(layers, captured * captured, self._n_layers)

    def _arrays(self, chosen: Sequence[_Chosen]) -> tuple[Array, Array]:
        """Return experts and their probabilities, one row for each token and layer."""
        n_used = chosen[0].n_used
        order = np.frombuffer(b"".join([c.order for c in chosen]), np.int32).reshape(-1, self._n_experts)
        mass = np.frombuffer(b"".join([c.mass for c in chosen]), np.float32)
        return order[:, :n_used], mass.reshape(-1, n_used)

    def _add_details(self) -> None:
        p = np.concatenate([values for _, values in self._probabilities])
        if self._gating is Gating.SIGMOID:
            p = p / np.maximum(p.sum(-1, keepdims=True), _TINY)
        entropies = -np.einsum("te,te->t", p, np.log(np.maximum(p, _TINY)))
        layers = np.repeat(
            [layer for layer, _ in self._probabilities], [len(v) for _, v in self._probabilities]
        )
        self._entropy += [
            np.bincount(layers, minlength=self._n_layers),
            np.bincount(layers, entropies, self._n_layers),
        ]
        for field, layer, squares in self._norms:
            self._contributions[field][layer] += np.sqrt(squares).sum()

    def _extend_trace(self, rows: Sequence[Row]) -> None:
        # If a step has several rows, the choices cannot be assigned to sequences.
        if len(rows) != 1 or len(rows[0].token_ids) != 1 or len(self._chosen) != self._n_layers:
            self._trace.clear()
            return
        row = rows[0]
        last = self._trace[-1] if self._trace else None
        if last is not None and (last.sequence, last.position + 1) != (row.sequence, row.position):
            self._trace.clear()
        experts, mass = self._arrays(self._chosen)
        self._trace.append(
            _Traced(row.sequence, row.position, int(row.token_ids[0]), experts.astype(np.int16), mass)
        )

    def summary(self) -> Observation:
        """Return the fields that docs/observers.md describes."""
        self._count()
        return {
            "n_routed_experts": self._n_experts,
            "gating": self._gating.value,
            "n_groups": self._n_groups,
            "layers": [self._layer(layer) for layer in range(self._n_layers)],
            "trace": self._traced() if self._trace else None,
        }

    def _layer(self, layer: int) -> dict[str, Any]:
        n, counts = int(self._n_tokens[layer]), self._counts[layer]
        if not n:
            return {"layer": self._first + layer, "tokens": 0}
        share = counts / counts.sum()
        captured = float(self._mass[layer]) / n
        sampled, entropy = self._entropy[:, layer].tolist()
        norms = {
            field: float(totals[layer]) / max(1.0, sampled) for field, totals in self._contributions.items()
        }
        return {
            "layer": self._first + layer,
            "tokens": n,
            "experts_per_token": int(counts.sum()) // n,
            "counts": counts.tolist(),
            "expert_mass": self._expert_mass[layer].tolist(),
            "captured_mass": captured,
            "captured_mass_deviation": float(np.sqrt(max(0.0, self._mass_squares[layer] / n - captured**2))),
            "load_entropy": float(
                -(share * np.log(np.maximum(share, _TINY))).sum() / max(1e-9, np.log(len(share)))
            ),
            "load_peak": float(share.max() * len(share)),
            "unused": int((counts == 0).sum()),
            "sampled": int(sampled),
            "router_entropy": entropy / max(1.0, sampled),
            **norms,
        }

    def _traced(self) -> dict[str, Any]:
        tokens = list(self._trace)
        return {
            "sequence": tokens[0].sequence,
            "positions": [token.position for token in tokens],
            "token_ids": [token.token_id for token in tokens],
            "experts": pack(np.stack([token.experts for token in tokens]), "int16"),
            "probabilities": pack(np.stack([token.probabilities for token in tokens]), "float32"),
        }
