"""The results of measurements, as plain data.

Observers in the engine's process return `Divergence`, `Perplexity` and `RoutingFidelity` as JSON, which
msgspec converts and checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from dsmoe_local.engine.types import Observation


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error, for independent tokens."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts the scored tokens. `nll` is the mean negative log-likelihood in nats."""

    n_scored: int
    nll: float
    perplexity: Estimate


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL divergence of a model's predictions from a reference's, in nats.

    The exact mean is between `kl` and `kl_upper`: a reference has only the likeliest tokens. `quantiles`
    and `maximum` are of single tokens. `same_top` is the share of tokens for which both models predict the
    same token, `ratio` the model's perplexity divided by the reference's. `windows` has the mean of each
    window, in the order of the text; all windows have the same number of scored tokens.
    """

    kl: Estimate
    kl_upper: float
    quantiles: dict[str, float]
    maximum: float
    same_top: Estimate
    ratio: Estimate
    windows: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """The difference of a layer's router from that of the reference.

    `same` is the share of tokens with the same set of experts, `overlap` the share of the reference's experts
    that were chosen too. `gate_kl` is the KL divergence of the probabilities in nats, and `gate_kl_bound` its
    largest possible error from rounding.
    """

    layer: int
    same: float
    overlap: Estimate
    gate_kl: Estimate
    gate_kl_bound: float


@dataclass(frozen=True, slots=True)
class RoutingFidelity:
    """All layers with routers. `same_everywhere` is the share of tokens with the same experts in all of them.

    The properties are means over the layers.
    """

    same_everywhere: float
    layers: tuple[LayerRouting, ...]

    @property
    def same(self) -> float:
        """Share of tokens with the same set of experts."""
        return _mean([layer.same for layer in self.layers])

    @property
    def overlap(self) -> float:
        """Share of the reference's experts that were chosen too."""
        return _mean([layer.overlap.value for layer in self.layers])

    @property
    def gate_kl(self) -> float:
        """KL divergence of the router's probabilities in nats."""
        return _mean([layer.gate_kl.value for layer in self.layers])

    @property
    def gate_kl_bound(self) -> float:
        """Largest possible error of `gate_kl`."""
        return _mean([layer.gate_kl_bound for layer in self.layers])


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model compared with a reference. `routing` is None unless both have the same routers."""

    reference: str
    reference_perplexity: Perplexity
    divergence: Divergence
    routing: RoutingFidelity | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measurement of a model on a text in `n_windows` windows of `n_context` tokens.

    `seconds` is the wall time without loading.
    """

    model: str
    text: str
    text_digest: str
    n_context: int
    n_windows: int
    seconds: float
    perplexity: Perplexity
    comparison: Comparison | None = None

    @property
    def tokens_per_second(self) -> float:
        """Reading speed; 0 if no time passed."""
        return self.n_context * self.n_windows / self.seconds if self.seconds > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the fields that docs/evaluation.md describes."""
        fields = asdict(self)
        fields["tokens_per_second"] = self.tokens_per_second
        routing = self.comparison.routing if self.comparison else None
        if routing is not None:
            names = ("same", "overlap", "gate_kl", "gate_kl_bound")
            fields["comparison"]["routing"] |= {name: getattr(routing, name) for name in names}
        return fields


def to_json(result: object) -> Any:  # noqa: ANN401 - JSON values
    """Return a result as JSON values, which `msgspec.convert` turns back into it."""
    return msgspec.json.decode(msgspec.json.encode(result))


def perplexity_of(seen: Observation) -> Perplexity:
    """Return the perplexity from a summary of the observer `logprobs`."""
    n = int(seen["tokens"])
    return Perplexity(n, seen["nll"] / max(1, n), Estimate(seen["perplexity"], seen["perplexity_error"]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
