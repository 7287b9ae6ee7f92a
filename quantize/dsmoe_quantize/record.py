"""The recipe that a file keeps: the one asked for, with what --tensor-type and its like changed in it, so
that it gives the same types again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.choose import Choice
from dsmoe_quantize.groups import Group, group_of
from dsmoe_quantize.recipes import OTHERS, LayeredRecipe
from dsmoe_quantize.types import SettledType, is_reserved, same_types

CHANGED = "-changed"
"""Ends the name of a recipe of ours that wishes have changed."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a file says of its types. `left_out` are the tensors whose types the recipe cannot tell, since a
    group has one type there.
    """

    type: SettledType
    left_out: tuple[str, ...] = ()


def record_of(choice: SettledType, hp: Hyperparameters, chosen: Sequence[Choice]) -> Record:
    """What the file says in which all tensors of a model have the types `chosen`, after `choice` and wishes.

    A mix and a float type are said as they are: they have no table that wishes could change.
    """
    if not isinstance(choice, LayeredRecipe) or not any(each.is_wish for each in chosen):
        return Record(choice)
    tied = all(each.name != "output.weight" for each in chosen)
    groups: dict[Group, list[Choice]] = {}
    for each in chosen:
        group = group_of(each.name, tied)
        if group is not None:
            groups.setdefault(group, []).append(each)
    told, left_out = _told(choice, groups)
    types = _with(choice.types, told, groups)
    about = {**choice.about, "wishes": "in effect"}
    if left_out:
        about["left_out"] = named(left_out)
    name = f"{choice.name}{CHANGED}" if is_reserved(choice.name) else choice.name
    changed = replace(choice, name=name, types=types, about=about)
    if not left_out and same_types(choice, changed, hp.n_layers):
        return Record(choice)
    return Record(changed, tuple(left_out))


def named(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _told(
    recipe: LayeredRecipe, groups: Mapping[Group, Sequence[Choice]]
) -> tuple[dict[Group, GgmlType], list[str]]:
    """The types of the groups that wishes are about, and the tensors that have another."""
    told: dict[Group, GgmlType] = {}
    left_out: list[str] = []
    for group, members in groups.items():
        if not any(each.is_wish for each in members):
            continue
        kinds = Counter(each.type for each in members)
        most = max(kinds, key=lambda kind: kinds[kind])
        layers = recipe.types.get(group.kind, {})
        own = layers.get(group.layer, layers.get(OTHERS))
        if len(kinds) == 1 or own is None:
            told[group] = most
        kept = told.get(group, own)
        left_out += [each.name for each in members if each.is_wish and each.type is not kept]
    return told, left_out


def _with(
    types: Mapping[str, Mapping[int | None, GgmlType]],
    told: Mapping[Group, GgmlType],
    groups: Mapping[Group, object],
) -> dict[str, Mapping[int | None, GgmlType]]:
    """`types` with those of the groups in `told`. Where wishes settle every layer of a kind, the most
    frequent type is that of the others, too.
    """
    found = dict(types)
    for name in {group.kind: None for group in told}:
        layers = {group.layer: kind for group, kind in told.items() if group.kind == name}
        if len(layers) < sum(group.kind == name for group in groups):
            found[name] = {**types.get(name, {}), **layers}
            continue
        counts = Counter(layers.values())
        most = max(counts, key=lambda kind: (counts[kind], -kind))
        found[name] = {OTHERS: most, **{layer: kind for layer, kind in layers.items() if kind is not most}}
    return found
