"""The groups whose errors are tried one by one, how, and what the result says of a group. Runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_file import GgufFile, TensorInfo
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.budget import Market
from dsmoe_quantize.choose import Choice
from dsmoe_quantize.groups import KINDS, WEIGHTS, Group, group_of
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.mixes import FALLBACKS
from dsmoe_quantize.quantize import Change, Plan
from dsmoe_quantize.sensitivity import Probe, Probes, Sensitivity
from dsmoe_quantize.types import FLOAT_TYPES

LEAST_ERROR = 1e-6
"""A smaller relative error is none: the type holds the weights as they are."""
N_ERRORS = 2
"""A divergence is told from none if it is so many of its standard errors."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A group, or all layers of a kind, in each type that is tried: the file to make, and the relative error.

    `built_in` is the weight that the group has without any measurement.
    """

    group: str
    plans: Mapping[GgmlType, Plan]
    errors: Mapping[GgmlType, float]
    built_in: float


@dataclass(frozen=True, slots=True)
class GroupCost:
    """What a relative error of 1 in a group costs, in nats; None if no type that was tried makes any.

    `is_at_most`: the divergence is within the noise, and the cost what it is at most.
    """

    group: str
    probes: Mapping[GgmlType, Probe]
    cost: float | None
    is_at_most: bool
    built_in: float


def trials_of(
    file: GgufFile,
    hp: Hyperparameters,
    sensitivity: Sensitivity,
    types: Sequence[GgmlType],
    imatrix: Imatrix | None = None,
    *,
    by_layer: bool = False,
) -> list[Trial]:
    """What to try, in the order of a recipe file. `sensitivity` has all tensors; a type that does not fit a
    width is replaced as in llama.cpp's mixes.
    """
    members: dict[Group, list[TensorInfo]] = {}
    n_layers: dict[str, set[int | None]] = {}
    tied = "output.weight" not in file.tensors
    for name in sensitivity.tensors:
        group = group_of(name, tied)
        if group is not None:
            n_layers.setdefault(group.kind, set()).add(group.layer)
            key = group if by_layer else Group(group.kind, None)
            members.setdefault(key, []).append(file.tensors[name])
    ordered = sorted(members, key=lambda group: (KINDS.index(group.kind), group.layer or 0))
    # With weights of one, predictions are relative errors.
    ones = {str(group): 1.0 for group in ordered}
    market = Market(file, hp, replace(sensitivity, weights=ones))
    trials = []
    for group in ordered:
        plans, errors = {}, {}
        for kind in types:
            changes = _changes(file, sensitivity, members[group], kind)
            changed = [change.choice for change in changes if change.choice.type is not change.source.type]
            if changed:
                plans[kind] = Plan(file, hp, FLOAT_TYPES["BF16"], changes, imatrix)
                errors[kind] = market.figures(changed).error
        built_in = WEIGHTS[group.kind] / (len(n_layers[group.kind]) if by_layer else 1)
        trials.append(Trial(str(group), plans, errors, built_in))
    return trials


def _changes(
    file: GgufFile, sensitivity: Sensitivity, members: Sequence[TensorInfo], kind: GgmlType
) -> list[Change]:
    """`members` in a type, all other tensors as they are."""
    names = {tensor.name for tensor in members}
    changes = []
    for tensor in file.tensors.values():
        target = tensor.type
        if tensor.name in names:
            fitting = sensitivity.tensors[tensor.name].errors
            target = next((each for each in (kind, FALLBACKS.get(kind, kind)) if each in fitting), target)
        changes.append(Change(tensor, Choice(tensor.name, target)))
    return changes


def cost_of(trial: Trial, probes: Probes) -> GroupCost:
    """What the probes of a group say: the mean of what they say each, by its logarithm."""
    found = probes.groups.get(trial.group, {})
    usable = [(probe, max(probes.floor, N_ERRORS * probe.kl_error)) for probe in found.values()]
    usable = [(probe, noise) for probe, noise in usable if probe.error > LEAST_ERROR]
    if not usable:
        return GroupCost(trial.group, found, None, False, trial.built_in)
    clear = [probe.kl / probe.error for probe, noise in usable if probe.kl > noise]
    if not clear:
        at_most = min((probe.kl + noise) / probe.error for probe, noise in usable)
        return GroupCost(trial.group, found, at_most, True, trial.built_in)
    cost = math.exp(sum(map(math.log, clear)) / len(clear))
    return GroupCost(trial.group, found, cost, False, trial.built_in)
