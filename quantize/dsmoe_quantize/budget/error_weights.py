"""What a relative error costs in each group: measured values, and built-in ones scaled to match them."""

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
        GroupKind.ATTENTION_QUERY_KEY_VALUE: 1.1,
        GroupKind.ATTENTION_LATENT: 0.75,
        GroupKind.ATTENTION_QUERY_KEY: 0.69,
        GroupKind.ATTENTION_KEY_UP: 0.35,
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
"""The KL divergence, in nats, that a relative squared error of 1 in all layers of a kind would cause if the
divergence stayed proportional to the error, as it is while errors are small.

Each is the geometric mean of measurements on two dissimilar models (docs/quantization.md). Only their ratios
matter. The models lack three kinds, whose costs are derived: of one matrix for queries, keys and values the
sum, of MLA's projections of keys half of queries and keys, and of those to compressed keys and values the
same plus that of values.
"""


@dataclass(frozen=True, slots=True)
class ErrorWeights:
    """The costs of errors. `of` has the KL divergence, in nats, of a relative error of 1 in each group.

    Of the `n_kinds` kinds of groups, `n_measured` were measured in all layers. `is_built_in`: none was
    measured in any layer.
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
    """Return the costs for all groups of a model.

    `known` has measured costs by the name of a group or a kind.

    Other groups get built-in costs. Those come from other models, in which all costs may be larger or
    smaller. So beside measured costs they are scaled by the geometric mean of the ratios measured / built-in,
    over the kinds that were measured in all layers. Costs of 0 do not affect the scale.
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
