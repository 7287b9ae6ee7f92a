"""What the routers of a model did over some tokens, as plain data that can be added and subtracted.

Made from the `routing` observation (docs/observers.md), which counts since the observer is there: the
difference of two is what happened between them. Draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsmoe_local.engine.types import Observation


@dataclass(frozen=True, slots=True)
class LayerActivity:
    """One layer's sums over the `tokens` it saw.

    `counts`: how often each routed expert was chosen; `mass`: the router's probabilities of each, where it
    was chosen; `captured` and `captured_squares`: the sum and the sum of squares of the probability that a
    token's chosen experts have together. Over the `sampled` tokens: `entropy` of the router's probabilities
    in nats, and the lengths `routed` and `shared` of what the routed and the shared experts added.
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

    def plus(self, other: LayerActivity, sign: int = 1) -> LayerActivity:
        """The sums with another's added, or taken away with the sign -1."""
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
        )

    @property
    def experts_per_token(self) -> float:
        """Routed experts that a token used, on average."""
        return sum(self.counts) / max(1, self.tokens)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the tokens that chose each expert: together `experts_per_token`."""
        return tuple(count / max(1, self.tokens) for count in self.counts)

    @property
    def load_entropy(self) -> float:
        """Entropy of `counts` as a share of the greatest possible: 1 is an even load. 0 without tokens."""
        total, possible = sum(self.counts), math.log(max(1, len(self.counts)))
        if not total or not possible:
            return 0.0
        parts = (count / total for count in self.counts if count)
        return abs(sum(part * math.log(part) for part in parts)) / possible

    @property
    def load_peak(self) -> float:
        """The busiest expert's count by the mean: 1 is an even load."""
        return max(self.counts, default=0) * len(self.counts) / max(1, sum(self.counts))

    @property
    def unused(self) -> int:
        """Experts that no token chose."""
        return self.counts.count(0)

    @property
    def captured_mass(self) -> float:
        """Mean probability that a token's chosen experts have together."""
        return self.captured / max(1, self.tokens)

    @property
    def captured_deviation(self) -> float:
        """Standard deviation of that probability over the tokens."""
        n = max(1, self.tokens)
        return math.sqrt(max(0.0, self.captured_squares / n - (self.captured / n) ** 2))

    @property
    def router_entropy(self) -> float | None:
        """Mean entropy of the router's probabilities in nats; None where no token was sampled."""
        return self.entropy / self.sampled if self.sampled else None

    @property
    def shared_share(self) -> float | None:
        """The shared experts' part of what all experts add, by length; None where no token was sampled."""
        both = self.shared + self.routed
        return self.shared / both if self.sampled and both > 0 else None

    def busiest(self, n: int) -> list[tuple[int, float]]:
        """The `n` experts that most tokens chose, with the share of the tokens that did; no unused ones."""
        order = sorted(range(len(self.counts)), key=lambda i: (-self.counts[i], -self.mass[i], i))
        shares = self.shares
        return [(expert, shares[expert]) for expert in order[:n] if self.counts[expert]]


@dataclass(frozen=True, slots=True)
class Activity:
    """The layers that have routed experts, in order. No layers: nothing was observed."""

    layers: tuple[LayerActivity, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that went through the model. The last layer may have seen fewer: of a prompt, the end."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def n_routed_experts(self) -> int:
        """Routed experts of a layer."""
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
        """Whether `earlier` can be a former state of this: nothing was counted there that is missing here."""
        if not earlier.layers:
            return True
        return len(self.layers) == len(earlier.layers) and all(
            len(a.counts) == len(b.counts) and all(x >= y for x, y in zip(a.counts, b.counts, strict=True))
            for a, b in zip(self.layers, earlier.layers, strict=True)
        )

    @property
    def experts_per_token(self) -> float:
        """Routed experts that a token used in a layer, on average."""
        return _ratio((sum(layer.counts), layer.tokens) for layer in self.layers)

    @property
    def captured_mass(self) -> float:
        """Mean probability of the chosen experts over all tokens and layers."""
        return _ratio((layer.captured, layer.tokens) for layer in self.layers)

    @property
    def load_entropy(self) -> float:
        """The layers' mean, of those that saw tokens."""
        return _ratio((layer.load_entropy, 1) for layer in self.layers if layer.tokens)

    @property
    def shared_share(self) -> float | None:
        """The layers' mean, of those where tokens were sampled."""
        shares = [share for layer in self.layers if (share := layer.shared_share) is not None]
        return sum(shares) / len(shares) if shares else None


def _ratio(parts: Iterable[tuple[float, float]]) -> float:
    """The sum of the first numbers by the sum of the second; 0 of nothing."""
    above = below = 0.0
    for part in parts:
        above += part[0]
        below += part[1]
    return above / below if below else 0.0


def activity_of(observation: Observation) -> Activity:
    """The `routing` observation as sums."""
    n_experts: int = observation["n_routed_experts"]
    return Activity(tuple(_layer(entry, n_experts) for entry in observation["layers"]))


def _layer(entry: dict[str, Any], n_experts: int) -> LayerActivity:
    tokens: int = entry["tokens"]
    if not tokens:
        return LayerActivity(entry["layer"], 0, (0,) * n_experts, (0.0,) * n_experts)
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
    )
