"""The choices of a model's routers over some tokens, as sums that can be added, subtracted and compared.

They are computed from the `routing` observation (docs/observers.md). Its counts only grow, so the difference
of two observations is the activity between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from dsmoe_local.engine.types import Observation
from dsmoe_local.model.hyperparameters import Gating


@dataclass(frozen=True, slots=True)
class LayerActivity:
    """Sums for one layer over `tokens` tokens.

    `counts`: how often each routed expert was chosen. `mass`: the sum of each expert's router probabilities
    where it was chosen. `captured`, `captured_squares`: the sums of the total probability of a token's chosen
    experts, and of its square. Over the `sampled` tokens only: `entropy` of the router's probabilities in
    nats, the norms `routed` and `shared` of the outputs of routed and shared experts, and the values of the
    shared experts' `gate`, 0 if there is none.

    If `is_sigmoid`, the router computes the probability of each expert by itself: they do not sum up to 1.
    Experts are in `n_groups` groups, in their order; 1 if the model has none.
    """

    layer: int
    tokens: int
    counts: tuple[int, ...]
    mass: tuple[float, ...]
    captured: float = 0.0
    captured_squares: float = 0.0
    sampled: int = 0
    entropy: float = 0.0
    routed: float = 0.0
    shared: float = 0.0
    gate: float = 0.0
    is_sigmoid: bool = False
    n_groups: int = 1

    def plus(self, other: LayerActivity, sign: int = 1) -> LayerActivity:
        """Return the sum of two layers, or with the sign -1 the difference."""
        return LayerActivity(
            self.layer,
            self.tokens + sign * other.tokens,
            tuple(a + sign * b for a, b in zip(self.counts, other.counts, strict=True)),
            tuple(a + sign * b for a, b in zip(self.mass, other.mass, strict=True)),
            self.captured + sign * other.captured,
            self.captured_squares + sign * other.captured_squares,
            self.sampled + sign * other.sampled,
            self.entropy + sign * other.entropy,
            self.routed + sign * other.routed,
            self.shared + sign * other.shared,
            self.gate + sign * other.gate,
            self.is_sigmoid,
            self.n_groups,
        )

    @property
    def experts_per_token(self) -> float:
        """Mean number of routed experts per token."""
        return sum(self.counts) / max(1, self.tokens)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the tokens that chose each expert. The sum is `experts_per_token`."""
        return tuple(count / max(1, self.tokens) for count in self.counts)

    @property
    def load_entropy(self) -> float:
        """Entropy of `counts` divided by its maximum. 1 is an even load; 0 without tokens."""
        total, possible = sum(self.counts), math.log(max(1, len(self.counts)))
        if not total or not possible:
            return 0.0
        parts = (count / total for count in self.counts if count)
        return abs(sum(part * math.log(part) for part in parts)) / possible

    @property
    def load_peak(self) -> float:
        """The largest count divided by the mean. 1 is an even load."""
        return max(self.counts, default=0) * len(self.counts) / max(1, sum(self.counts))

    @property
    def unused(self) -> int:
        """Number of experts that no token chose."""
        return self.counts.count(0)

    @property
    def captured_mass(self) -> float:
        """Mean total probability of a token's chosen experts."""
        return self.captured / max(1, self.tokens)

    @property
    def captured_deviation(self) -> float:
        """Standard deviation of the total probability of a token's chosen experts."""
        n = max(1, self.tokens)
        return math.sqrt(max(0.0, self.captured_squares / n - (self.captured / n) ** 2))

    @property
    def router_entropy(self) -> float | None:
        """Mean entropy of the router's probabilities, divided by their sum, in nats; None without samples."""
        return self.entropy / self.sampled if self.sampled else None

    @property
    def shared_share(self) -> float | None:
        """The norm of the shared experts' output as a share of that of all experts.

        None without samples or without shared experts.
        """
        return self.shared / (self.shared + self.routed) if self.sampled and self.shared > 0 else None

    @property
    def shared_gate(self) -> float | None:
        """Mean of the gate of the shared experts; None without samples or without a gate."""
        return self.gate / self.sampled if self.sampled and self.gate > 0 else None

    @property
    def group_shares(self) -> tuple[float, ...]:
        """The share of each group of experts in all choices."""
        size, total = len(self.counts) // self.n_groups, max(1, sum(self.counts))
        return tuple(
            sum(self.counts[start : start + size]) / total for start in range(0, size * self.n_groups, size)
        )

    def busiest(self, n: int) -> list[tuple[int, float]]:
        """Return the `n` most used experts with their shares. Unused experts are excluded."""
        order = sorted(range(len(self.counts)), key=lambda i: (-self.counts[i], -self.mass[i], i))
        shares = self.shares
        return [(expert, shares[expert]) for expert in order[:n] if self.counts[expert]]


@dataclass(frozen=True, slots=True)
class Activity:
    """The activity of all layers with routed experts. Without layers, nothing was observed."""

    layers: tuple[LayerActivity, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens. The last layer may have fewer, since it computes only the end of a prompt."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def n_routed_experts(self) -> int:
        """Number of routed experts in a layer."""
        return max((len(layer.counts) for layer in self.layers), default=0)

    def __add__(self, other: Activity) -> Activity:
        return self._combined(other, 1) if self.layers else other

    def __sub__(self, other: Activity) -> Activity:
        return self._combined(other, -1)

    def _combined(self, other: Activity, sign: int) -> Activity:
        if not other.layers:
            return self
        return Activity(tuple(a.plus(b, sign) for a, b in zip(self.layers, other.layers, strict=True)))

    def follows(self, earlier: Activity) -> bool:
        """Return True if `earlier` can be an earlier state of these counts: none of its counts is larger."""
        if not earlier.layers:
            return True
        return len(self.layers) == len(earlier.layers) and all(
            len(a.counts) == len(b.counts) and all(x >= y for x, y in zip(a.counts, b.counts, strict=True))
            for a, b in zip(self.layers, earlier.layers, strict=True)
        )

    @property
    def experts_per_token(self) -> float:
        """Mean number of routed experts per token and layer."""
        return _ratio((sum(layer.counts), layer.tokens) for layer in self.layers)

    @property
    def captured_mass(self) -> float:
        """Mean total probability of the chosen experts over all tokens and layers."""
        return _ratio((layer.captured, layer.tokens) for layer in self.layers)

    @property
    def load_entropy(self) -> float:
        """Mean load entropy of the layers with tokens."""
        return _ratio((layer.load_entropy, 1) for layer in self.layers if layer.tokens)

    @property
    def shared_share(self) -> float | None:
        """Mean of the layers that have one; None without any."""
        return _mean(layer.shared_share for layer in self.layers)

    @property
    def shared_gate(self) -> float | None:
        """Mean of the layers that have one; None without any."""
        return _mean(layer.shared_gate for layer in self.layers)

    @property
    def is_sigmoid(self) -> bool:
        """True if the routers compute the probability of each expert by itself."""
        return any(layer.is_sigmoid for layer in self.layers)

    @property
    def n_groups(self) -> int:
        """Number of groups of experts; 1 if the model has none."""
        return max((layer.n_groups for layer in self.layers), default=1)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _ratio(parts: Iterable[tuple[float, float]]) -> float:
    """Return the sum of the first numbers divided by the sum of the second; 0 if the latter is 0."""
    above = below = 0.0
    for part in parts:
        above += part[0]
        below += part[1]
    return above / below if below else 0.0


def activity_of(observation: Observation) -> Activity:
    """Return a `routing` observation as sums."""
    n_experts: int = observation["n_routed_experts"]
    empty = LayerActivity(
        0,
        0,
        (0,) * n_experts,
        (0.0,) * n_experts,
        is_sigmoid=observation["gating"] == Gating.SIGMOID,
        n_groups=max(1, observation["n_groups"]),
    )
    return Activity(tuple(_layer(entry, empty) for entry in observation["layers"]))


def _layer(entry: dict[str, Any], empty: LayerActivity) -> LayerActivity:
    tokens: int = entry["tokens"]
    if not tokens:
        return replace(empty, layer=entry["layer"])
    mean, deviation, sampled = entry["captured_mass"], entry["captured_mass_deviation"], entry["sampled"]
    return LayerActivity(
        entry["layer"],
        tokens,
        tuple(entry["counts"]),
        tuple(entry["expert_mass"]),
        tokens * mean,
        tokens * (deviation**2 + mean**2),
        sampled,
        sampled * entry["router_entropy"],
        sampled * entry["routed_norm"],
        sampled * entry["shared_norm"],
        sampled * entry.get("shared_gate", 0.0),
        empty.is_sigmoid,
        empty.n_groups,
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """An expert, with the shares of the tokens that chose it in two activities."""

    layer: int
    expert: int
    first: float
    second: float


def overlap(first: LayerActivity, second: LayerActivity) -> float:
    """Return the overlap of two layers, 0 to 1: each expert adds the smaller of its shares of all choices."""
    totals = max(1, sum(first.counts)), max(1, sum(second.counts))
    return sum(min(a / totals[0], b / totals[1]) for a, b in zip(first.counts, second.counts, strict=True))


def mean_overlap(first: Activity, second: Activity) -> float:
    """Return the mean overlap over all layers."""
    pairs = list(zip(first.layers, second.layers, strict=True))
    return sum(overlap(*pair) for pair in pairs) / max(1, len(pairs))


def differences(first: Activity, second: Activity, n: int) -> list[Difference]:
    """Return the `n` experts whose shares differ most."""
    found = [
        Difference(a.layer, expert, share, b.shares[expert])
        for a, b in zip(first.layers, second.layers, strict=True)
        for expert, share in enumerate(a.shares)
    ]
    found.sort(key=lambda each: (-abs(each.first - each.second), each.layer, each.expert))
    return found[:n]
