"""What a measurement gives, as plain data made of what observers have seen. Measures and prints nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsmoe_local.engine.observe.perplexity import perplexity
from dsmoe_local.engine.types import Observation


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error, as of independent tokens."""

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
    """How far a model's predictions are from a reference's, in nats.

    The mean lies between `kl` and `kl_upper`: the reference keeps the likeliest tokens only. `quantiles` are
    of single tokens, by their share. `windows` are the means of the windows, in the text's order: they have
    as many scored tokens each, and two models are best compared window by window. `ratio` is the model's
    perplexity by the reference's; `same_top` the share of tokens where both find the same one likeliest.
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
    """How far one layer's router is from the reference's: share of tokens with the same set of experts, share
    of the reference's experts that were chosen too, divergence of the probabilities in nats, and how far that
    may be off.
    """

    layer: int
    same: float
    overlap: Estimate
    gate_kl: Estimate
    gate_kl_bound: float


@dataclass(frozen=True, slots=True)
class Routing:
    """All layers with routers. `same_everywhere`: share of tokens with the same experts in all of them."""

    same_everywhere: float
    layers: tuple[LayerRouting, ...]

    @property
    def same(self) -> float:
        """Mean over the layers."""
        return _mean([layer.same for layer in self.layers])

    @property
    def overlap(self) -> float:
        """Mean over the layers."""
        return _mean([layer.overlap.value for layer in self.layers])

    @property
    def gate_kl(self) -> float:
        """Mean over the layers."""
        return _mean([layer.gate_kl.value for layer in self.layers])

    @property
    def gate_kl_bound(self) -> float:
        """How far `gate_kl` may be off."""
        return _mean([layer.gate_kl_bound for layer in self.layers])


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model beside its reference. `routing` is None where the two have no routers to compare."""

    reference: str
    reference_perplexity: Perplexity
    divergence: Divergence
    routing: Routing | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything about one model on one text, cut to `n_windows` of `n_context` tokens. `seconds` are the
    model's own, of wall time.
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
        """How fast the model read."""
        return self.n_context * self.n_windows / self.seconds if self.seconds > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`; docs/evaluation.md says what the fields are."""
        fields = asdict(self)
        fields["tokens_per_second"] = self.tokens_per_second
        routing = self.comparison.routing if self.comparison else None
        if routing is not None:
            names = ("same", "overlap", "gate_kl", "gate_kl_bound")
            fields["comparison"]["routing"] |= {name: getattr(routing, name) for name in names}
        return fields


def perplexity_of(seen: Observation) -> Perplexity:
    """From the observer `logprobs`."""
    n = int(seen["tokens"])
    return Perplexity(n, seen["nll"] / max(1, n), Estimate(seen["perplexity"], seen["perplexity_error"]))


def reference_of(seen: Observation) -> Perplexity:
    """The reference's, from the observer `divergence`."""
    found = perplexity(seen["reference_nll"])
    error = found * seen["reference_nll_error"]
    return Perplexity(int(seen["tokens"]), seen["reference_nll"], Estimate(found, error))


def divergence_of(seen: Observation) -> Divergence:
    """From the observer `divergence`, whose requests are numbered as the windows are."""
    n = max(1, int(seen["tokens"]))
    requests = sorted(seen["requests"], key=lambda each: int(each["request"]))
    same = seen["same_top"] / n
    ratio = perplexity(seen["nll_change"])
    return Divergence(
        kl=Estimate(seen["kl"], seen["kl_error"]),
        kl_upper=seen["kl_upper"],
        quantiles=dict(seen["kl_quantiles"]),
        maximum=seen["kl_max"],
        same_top=Estimate(same, math.sqrt(same * (1 - same) / max(1, n - 1))),
        ratio=Estimate(ratio, ratio * seen["nll_change_error"]),
        windows=tuple(each["kl"] for each in requests),
    )


def routing_of(seen: Observation) -> Routing:
    """From the observer `routing_divergence`."""
    n = max(1, int(seen["tokens"]))
    return Routing(
        seen["same_everywhere"] / n,
        tuple(
            LayerRouting(
                layer["layer"],
                layer["same_experts"] / n,
                Estimate(layer["overlap"], layer["overlap_error"]),
                Estimate(layer["gate_kl"], layer["gate_kl_error"]),
                layer["gate_kl_bound"],
            )
            for layer in seen["layers"]
        ),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
