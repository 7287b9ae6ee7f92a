"""The groups of tensors whose error costs are measured, and their costs computed from measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dsmoe_local.model.ggml import GgmlType, block_size
from dsmoe_local.model.gguf_file import GgufFile, TensorInfo
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.budget.cost_model import CostModel
from dsmoe_quantize.budget.error_weights import WEIGHTS
from dsmoe_quantize.budget.sensitivity import Probe, Probes, Sensitivity, TensorErrors
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import TensorChoice, misfit_of
from dsmoe_quantize.policy.mixes import FALLBACKS, FLOAT_TYPES
from dsmoe_quantize.policy.recipes import KINDS, Group, group_of
from dsmoe_quantize.quantize import Plan

MIN_ERROR = 1e-6
"""A smaller relative error counts as 0: the type represents the weights exactly."""
MIN_STANDARD_ERRORS = 2
"""A divergence is significant if it is larger than this many standard errors."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A group to quantize to several types.

    By type: `plans` of the file to write, `errors` (relative), and the types in `used` that the tensors get,
    since a type whose blocks do not divide a row is replaced. `fits` is false if neither a type nor its
    replacement divides the rows. `built_in` is the weight of the group without measurement.
    """

    group: str
    plans: Mapping[GgmlType, Plan]
    errors: Mapping[GgmlType, float]
    used: Mapping[GgmlType, tuple[GgmlType, ...]]
    fits: bool
    built_in: float


@dataclass(frozen=True, slots=True)
class GroupCost:
    """The cost of a group: nats per relative error. None if every type that was tried is exact.

    `used`, `fits` and `built_in` are those of the `Trial`. If `is_at_most`, the divergence is within the
    noise, and the cost is an upper bound.
    """

    group: str
    probes: Mapping[GgmlType, Probe]
    used: Mapping[GgmlType, tuple[GgmlType, ...]]
    fits: bool
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
    """Return the trials in the order of a recipe file. `sensitivity` has the errors of all tensors.

    A type whose blocks do not divide a row is replaced as in llama.cpp's mixes.
    """
    members: dict[Group, list[TensorInfo]] = {}
    n_layers: dict[str, set[int | None]] = {}
    for name in sensitivity.tensors:
        group = group_of(name, hp)
        if group is not None:
            n_layers.setdefault(group.kind, set()).add(group.layer)
            key = group if by_layer else Group(group.kind, None)
            members.setdefault(key, []).append(file.tensors[name])
    ordered = sorted(members, key=lambda group: (KINDS.index(group.kind), group.layer or 0))
    # With all weights 1, the predicted divergence is the relative error.
    ones = {str(group): 1.0 for group in ordered}
    costs = CostModel(file, hp, replace(sensitivity, weights=ones))
    trials = []
    for group in ordered:
        plans, errors, used, fits = {}, {}, {}, False
        for kind in types:
            choices = _choices(file, sensitivity, members[group], kind)
            changed = [choice for choice in choices if choice.changes]
            fits = fits or bool(changed) or not any(choice.misfit for choice in choices)
            if changed:
                plans[kind] = Plan(hp, FLOAT_TYPES["BF16"], choices, imatrix, file=file)
                errors[kind] = costs.figures(changed).error
                used[kind] = tuple(sorted({choice.type for choice in changed}))
        built_in = WEIGHTS[group.kind] / (len(n_layers[group.kind]) if by_layer else 1)
        trials.append(Trial(str(group), plans, errors, used, fits, built_in))
    return trials


def _choices(
    file: GgufFile, sensitivity: Sensitivity, members: Sequence[TensorInfo], kind: GgmlType
) -> list[TensorChoice]:
    """Return choices that convert `members` to a type, and leave all other tensors unchanged."""
    names = {tensor.name for tensor in members}
    return [
        _choice(tensor, sensitivity.tensors[tensor.name], kind)
        if tensor.name in names
        else TensorChoice.of(tensor, tensor.type)
        for tensor in file.tensors.values()
    ]


def _choice(tensor: TensorInfo, measured: TensorErrors, kind: GgmlType) -> TensorChoice:
    """Return the choice of `kind`, of llama.cpp's replacement for it, or of the tensor's own type."""
    if kind in measured.errors:
        return TensorChoice.of(tensor, kind)
    instead = FALLBACKS.get(kind, kind)
    columns = tensor.shape[-1]
    fits = columns % block_size(kind) == 0
    misfit = f"{kind.name} cannot hold all weights" if fits else misfit_of(kind, columns)
    target = instead if instead in measured.errors else tensor.type
    return TensorChoice.of(tensor, target, misfit=misfit)


def cost_of(trial: Trial, probes: Probes) -> GroupCost:
    """Return the cost of a group: the geometric mean over its significant probes."""
    found = probes.groups.get(trial.group, {})

    def result(cost: float | None, *, is_at_most: bool = False) -> GroupCost:
        return GroupCost(trial.group, found, trial.used, trial.fits, cost, is_at_most, trial.built_in)

    usable = [(probe, max(probes.floor, MIN_STANDARD_ERRORS * probe.kl_error)) for probe in found.values()]
    usable = [(probe, noise) for probe, noise in usable if probe.error > MIN_ERROR]
    if not usable:
        return result(None)
    clear = [probe.kl / probe.error for probe, noise in usable if probe.kl > noise]
    if not clear:
        at_most = min((probe.kl + noise) / probe.error for probe, noise in usable)
        return result(at_most, is_at_most=True)
    return result(math.exp(sum(map(math.log, clear)) / len(clear)))
