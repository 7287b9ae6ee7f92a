"""Explain a recipe: compare it with smaller and larger budgets, with named types, and group by group."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.model.ggml import GgmlType, block_size
from dsmoe_quantize.budget.cost_model import Budget, CostModel, Figures, GroupOptions, Solved
from dsmoe_quantize.budget.kernel_speeds import is_fast
from dsmoe_quantize.policy.choice import choose_types
from dsmoe_quantize.policy.mixes import MIXES
from dsmoe_quantize.policy.named_recipes import RECIPES
from dsmoe_quantize.policy.recipe_file import format_layers
from dsmoe_quantize.policy.recipes import KINDS, Group, group_of
from dsmoe_quantize.policy.types import TypeChoice
from dsmoe_quantize.quantize import Plan

_STEPS = ((0.9, "10% less"), (0.95, "5% less"), (1.05, "5% more"), (1.1, "10% more"))
_SLOW_SHARES = (0.25, 0.5)
_NAMED: tuple[TypeChoice, ...] = (
    *RECIPES.values(),
    *(MIXES[word] for word in ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0")),
)


@dataclass(frozen=True, slots=True)
class TradeOff:
    """One line of the trade-off table: a recipe, solved or named, and its costs.

    `speeds` of prompts and of decoding are predicted, relative to Q4_K_M; None if unknown.
    """

    label: str
    total: Figures
    bits_per_weight: float
    slow_share: float
    speeds: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Reason:
    """Why the groups of a kind have their type in some layers.

    `error_share` is their share of the whole error, 0 if nothing was measured.
    """

    kind: str
    layers: str
    type: GgmlType
    n_bytes: int
    error_share: float
    why: str


def trade_offs(costs: CostModel, solved: Solved, budget: Budget) -> list[TradeOff]:
    """Return the lines of the table, by size: the recipe, those for similar budgets, and the named types."""
    found = [trade_off(costs, "this recipe", solved.total)]
    steps = [(_scaled(budget, factor), label) for factor, label in _STEPS]
    if costs.cpu != "none" and budget.slow_share is None:
        steps += [(replace(budget, slow_share=share), f"up to {share:.0%} slow") for share in _SLOW_SHARES]
    for other, label in steps:
        # A quick search may miss the recipe that the thorough one found.
        totals = [solved.total] if _fits(costs, solved, other) else []
        with suppress(UsageError):
            totals.append(costs.solve(other, "step", quick=True).total)
        if totals:
            found.append(trade_off(costs, label, min(totals, key=lambda total: total.error)))
    tensors = list(costs.file.tensors.values())
    for choice in _NAMED:
        # A type may not have been measured, or may not go with the overrides.
        with suppress(KeyError, UsageError):
            chosen = choose_types(
                tensors, costs.hp, choice, costs.overrides, imatrix=costs.imatrix is not None
            )
            found.append(trade_off(costs, choice.name, costs.figures(chosen)))
    return sorted(found, key=lambda each: each.total.n_bytes)


def trade_off(costs: CostModel, label: str, total: Figures) -> TradeOff:
    """Return a line of the table for the costs of all tensors."""
    return TradeOff(
        label,
        total,
        8 * total.n_bytes / costs.n_weights,
        total.n_slow / costs.n_read if costs.n_read else 0,
        costs.speeds(total),
    )


def _fits(costs: CostModel, solved: Solved, budget: Budget) -> bool:
    """True if a recipe is within another budget than the one it was made for."""
    return costs.fits(solved.total, budget) and (budget.size is None or solved.file_size <= budget.size)


def _scaled(budget: Budget, factor: float) -> Budget:
    return replace(
        budget,
        size=None if budget.size is None else int(budget.size * factor),
        bits_per_weight=None if budget.bits_per_weight is None else budget.bits_per_weight * factor,
        bytes_per_token=None if budget.bytes_per_token is None else int(budget.bytes_per_token * factor),
    )


def reasons(costs: CostModel, solved: Solved) -> list[Reason]:
    """Return one reason for each kind and type, in the order of a recipe file."""
    merged: dict[tuple[str, GgmlType], list[GroupOptions]] = {}
    for each in costs.groups:
        merged.setdefault((each.group.kind, solved.picks[each.group]), []).append(each)
    ordered = sorted(merged.items(), key=lambda item: KINDS.index(item[0][0]))
    free = [_reason(costs, solved, kind, chosen, members) for (kind, chosen), members in ordered]
    return [*free, *_overridden(costs)]


def stated_reasons(plan: Plan) -> list[Reason]:
    """Like `reasons`, for a type that was asked for by name: the reasons are those of the choices."""
    merged: dict[tuple[str, GgmlType, str], list[tuple[Group, int]]] = {}
    for choice in plan.choices:
        group = group_of(choice.name, plan.hp)
        if group is not None:
            stated = choice.reason.removesuffix(f", {group}") or plan.type.name
            why = "; ".join(filter(None, (stated, choice.misfit)))
            merged.setdefault((group.kind, choice.type, why), []).append((group, choice.n_bytes))
    found = []
    for (kind, chosen, why), members in sorted(merged.items(), key=lambda item: KINDS.index(item[0][0])):
        layers = {group.layer for group, _ in members if group.layer is not None}
        n_bytes = sum(size for _, size in members)
        found.append(Reason(kind, ",".join(format_layers(layers)), chosen, n_bytes, 0.0, why))
    return found


def _reason(
    costs: CostModel, solved: Solved, kind: str, chosen: GgmlType, members: list[GroupOptions]
) -> Reason:
    options = _joined(members)
    here = options[chosen]
    tensor = members[0].tensors[0]
    parts = [
        _step(solved, here, {k: v for k, v in options.items() if v.error < here.error}, "more"),
        _step(solved, here, {k: v for k, v in options.items() if v.n_bytes < here.n_bytes}, "less"),
    ]
    if not any(figures.error < here.error for figures in options.values()):
        parts[0] = "no type that fits has a smaller error"
    if costs.cpu != "none" and not is_fast(costs.cpu, chosen, tensor.shape):
        parts.append("no fast kernel")
    if tensor.shape[-1] % block_size(GgmlType.Q4_K):
        parts.append(f"{tensor.shape[-1]} columns are not a multiple of 256")
    layers = [each.group.layer for each in members if each.group.layer is not None]
    share = here.error / solved.total.error if solved.total.error else 0.0
    return Reason(
        kind, ",".join(format_layers(layers)), chosen, here.n_bytes, share, "; ".join(filter(None, parts))
    )


def _joined(members: list[GroupOptions]) -> dict[GgmlType, Figures]:
    """Return the joint costs of each type that fits all of the groups."""
    return {
        kind: sum((each.options[kind] for each in members), Figures())
        for kind in members[0].options
        if all(kind in each.options for each in members)
    }


def _step(solved: Solved, here: Figures, others: Mapping[GgmlType, Figures], way: str) -> str:
    """Describe the best of the other types, and compare its price with the recipe's."""
    best: tuple[float, GgmlType, Figures] | None = None
    for kind, figures in others.items():
        price = _worth(solved, figures) - _worth(solved, here)
        gain = here.error - figures.error
        if way == "less" and gain >= 0:
            # A smaller type has no larger error: it is excluded as slow, or the recipe is not optimal.
            continue
        ratio = gain / price if price else 0.0
        if best is None or (ratio > best[0] if way == "more" else ratio < best[0]):
            best = (ratio, kind, figures)
    if best is None:
        return ""
    ratio, kind, figures = best
    size = format_size(abs(figures.n_bytes - here.n_bytes))
    if way == "more":
        sign = "+" if figures.n_bytes >= here.n_bytes else "-"
        text = f"{kind.name} saves {here.error - figures.error:.1e} for {sign}{size}"
    else:
        text = f"{kind.name} costs {figures.error - here.error:.1e} for -{size}"
    return f"{text}, {ratio:.2g} x what that saves elsewhere" if ratio > 0 else text


def _worth(solved: Solved, figures: Figures) -> float:
    """Return the error that these costs would save elsewhere, at the margin of the budgets."""
    size, per_token, slow, prompt = solved.prices
    return (
        size * figures.n_bytes
        + per_token * figures.n_bytes_per_token
        + slow * figures.n_slow
        + prompt * figures.prompt
    )


def _overridden(costs: CostModel) -> list[Reason]:
    """Return the reasons for the tensors that overrides name."""
    return [
        Reason(
            choice.name,
            "",
            choice.type,
            costs.figures([choice]).n_bytes,
            0.0,
            "; ".join(filter(None, (choice.reason, choice.misfit))),
        )
        for choice in costs.fixed_types.values()
        if choice.reason.startswith("--")
    ]
