"""Two activities of one model side by side: where their loads differ. Draws nothing."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_local.experts.activity import Activity, LayerActivity


@dataclass(frozen=True, slots=True)
class Difference:
    """An expert, and the share of the first's and of the second's tokens that chose it."""

    layer: int
    expert: int
    first: float
    second: float


def overlap(first: LayerActivity, second: LayerActivity) -> float:
    """How much of two loads is the same, 0 to 1: the sum over experts of the smaller share of the choices."""
    totals = max(1, sum(first.counts)), max(1, sum(second.counts))
    return sum(min(a / totals[0], b / totals[1]) for a, b in zip(first.counts, second.counts, strict=True))


def mean_overlap(first: Activity, second: Activity) -> float:
    """The layers' mean."""
    pairs = list(zip(first.layers, second.layers, strict=True))
    return sum(overlap(*pair) for pair in pairs) / max(1, len(pairs))


def differences(first: Activity, second: Activity, n: int) -> list[Difference]:
    """The `n` experts whose shares of the tokens differ most."""
    found = [
        Difference(a.layer, expert, share, b.shares[expert])
        for a, b in zip(first.layers, second.layers, strict=True)
        for expert, share in enumerate(a.shares)
    ]
    found.sort(key=lambda each: (-abs(each.first - each.second), each.layer, each.expert))
    return found[:n]
