"""What errors cost in each group: what was measured of a model, and built-in figures brought to its scale."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsmoe_local.model.layout import GroupKind
from dsmoe_quantize.policy.recipes import Group

WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        GroupKind.EMBEDDING: 1.0,
        GroupKind.OUTPUT: 1.5,
        GroupKind.ATTENTION_QUERY_KEY: 0.69,
        GroupKind.ATTENTION_VALUE: 0.41,
        GroupKind.ATTENTION_OUTPUT: 0.29,
        GroupKind.DENSE_GATE_UP: 0.26,
        GroupKind.DENSE_DOWN: 0.34,
        GroupKind.SHARED_GATE_UP: 0.29,
        GroupKind.SHARED_DOWN: 0.19,
        GroupKind.ROUTED_GATE_UP: 0.32,
        GroupKind.ROUTED_DOWN: 0.37,
    }
)
"""The divergence, in nats, that a relative squared error of 1 in all layers of a kind would cause if it grew
in proportion, as it does while errors are small. The geometric mean of what was measured on two models that
have little in common (docs/quantization.md): what counts is how they compare with each other.
"""


@dataclass(frozen=True, slots=True)
class ErrorWeights:
    """`of` is what a relative error of 1 costs in each group, in nats. Of `n_kinds` kinds of groups,
    `n_measured` were measured in all layers; `is_built_in`: nothing was measured at all.
    """

    of: Mapping[Group, float]
    n_measured: int
    n_kinds: int
    is_built_in: bool

    def __str__(self) -> str:
        if self.is_built_in:
            return "built in"
        if self.n_measured == self.n_kinds:
            return "measured"
        if not self.n_measured:
            return "measured for single layers"
        return f"measured for {self.n_measured} of {self.n_kinds} kinds"


def error_weights(groups: Collection[Group], known: Mapping[str, float]) -> ErrorWeights:
    """The costs for all groups of a model, of which `known` has some by the name of a group or a kind.

    Where nothing is known, built-in costs stand in. They are another model's, in which all costs may be
    larger or smaller, so beside measured ones they are multiplied by the geometric mean of measured by
    built-in over the kinds that were measured in all layers. A cost of 0 says nothing about the scale.
    """
    layers: dict[str, list[Group]] = {}
    for group in groups:
        layers.setdefault(group.kind, []).append(group)
    found: dict[Group, float] = {}
    totals: list[float] = []
    for kind, members in layers.items():
        of_kind = {
            group: known[str(group)] if str(group) in known else known[kind] / len(members)
            for group in members
            if str(group) in known or kind in known
        }
        found |= of_kind
        if len(of_kind) == len(members):
            totals.append(sum(of_kind.values()) / WEIGHTS[kind])
    logs = [math.log(total) for total in totals if total > 0]
    scale = math.exp(sum(logs) / len(logs)) if logs else 1.0
    of = {group: found.get(group, scale * WEIGHTS[group.kind] / len(layers[group.kind])) for group in groups}
    return ErrorWeights(of, len(totals), len(layers), not found)
