"""The types of all tensors of a file to write, and what the file says about them.

Converter and quantizer share it, so that both make the same file of the same weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType
from numpy.typing import NDArray

from dsmoe_local.base.errors import UsageError
from dsmoe_local.model.file_type import CALIBRATION_KEY, RECIPE_KEY
from dsmoe_local.model.ggml import FLOATS, GgmlType, Tensor
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.imatrix import Imatrix, metadata_of_use
from dsmoe_quantize.policy.choice import Overrides, TensorChoice, choose_types, fallback_notes
from dsmoe_quantize.policy.recipe_file import format_layers, render_recipe
from dsmoe_quantize.policy.recipes import (
    SUBSTITUTES,
    Group,
    LayeredRecipe,
    absent_layers,
    condensed,
    group_of,
)
from dsmoe_quantize.policy.types import ResolvedType, TypeChoice, is_reserved, resolve_for, same_types

CHANGED = "-changed"
"""The suffix of a built-in recipe's name if overrides changed it."""

UNWEIGHTED = FLOATS | {GgmlType.Q8_0}
"""Types whose encoders do not use an importance matrix."""

_DROPPED = ("general.quantization_version", "general.file_type", RECIPE_KEY, CALIBRATION_KEY)
# llama.cpp keeps these keys of the source, and its tool writes them for every matrix that it is given. Here
# they are written only if weights were encoded with the matrix.
_DROPPED_PREFIX = "quantize.imatrix."


@dataclass(frozen=True, slots=True)
class TypePlan:
    """The types of all tensors of a file: `choices`, in the order of the file, made by `type` and overrides.

    With an `imatrix`, weights are encoded by their importance.
    """

    hp: Hyperparameters
    type: ResolvedType
    choices: Sequence[TensorChoice]
    imatrix: Imatrix | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(choice.n_bytes for choice in self.choices)

    @property
    def bits_per_weight(self) -> float:
        """Average over all weights."""
        return 8 * self.n_bytes / sum(choice.n_weights for choice in self.choices)

    @property
    def record(self) -> Record:
        """What the file's metadata records about its types: the recipe with the overrides applied."""
        return record_of(self.type, self.hp, self.choices)

    @property
    def used_imatrix(self) -> Imatrix | None:
        """The importance matrix, if any tensor is encoded with it."""
        used = any(self.importance_of(choice) is not None for choice in self.choices)
        return self.imatrix if used else None

    def importance_of(self, choice: TensorChoice) -> NDArray[np.float32] | None:
        """Return the importance of a tensor's columns.

        None if it is unknown, or has no effect because the tensor is copied or its new type does not use it.
        """
        if self.imatrix is None or choice.type in UNWEIGHTED or not choice.changes:
            return None
        return self.imatrix.importance(choice.name, choice.shape)

    def metadata_of(self, metadata: Mapping[str, Field]) -> dict[str, Field]:
        """Return the metadata of the new file: the source's, with new keys about quantization at the end.

        The keys are those of llama_model_quantize, plus the recipe. Keys about the source's recipe and
        importance matrix are dropped.
        """
        kept = {
            key: field
            for key, field in metadata.items()
            if key not in _DROPPED and not key.startswith(_DROPPED_PREFIX)
        }
        recipe, imatrix = self.record.type, self.used_imatrix
        kept["general.quantization_version"] = Field(GGML_QUANT_VERSION, GGUFValueType.UINT32)
        kept["general.file_type"] = Field(recipe.file_type, GGUFValueType.UINT32)
        if isinstance(recipe, LayeredRecipe):
            kept[RECIPE_KEY] = Field(render_recipe(recipe), GGUFValueType.STRING)
        return kept | (metadata_of_use(imatrix) if imatrix else {})

    @property
    def fingerprint(self) -> dict[str, object]:
        """All that the file's bytes depend on besides the source; see `write_output`."""
        types = "\n".join(f"{each.name} {each.type.name}" for each in self.choices)
        choice, imatrix = self.record.type, self.used_imatrix
        recipe = render_recipe(choice) if isinstance(choice, LayeredRecipe) else None
        return {
            "the type": choice.name,
            "the tensors' types": hashlib.sha256(types.encode()).hexdigest(),
            "the recipe": recipe and hashlib.sha256(recipe.encode()).hexdigest(),
            "the importance matrix": imatrix and imatrix.digest(),
        }

    @property
    def notes(self) -> list[str]:
        """What the user should know before the file is written.

        Types that do not fit, layers of the recipe that the model lacks, what the recipe in the file cannot
        record, and tensors that the importance matrix does not cover.
        """
        return [*fallback_notes(self.choices), *_recipe_notes(self), *_imatrix_notes(self)]


def plan_types(
    tensors: Sequence[Tensor],
    hp: Hyperparameters,
    choice: TypeChoice,
    overrides: Overrides | None = None,
    imatrix: Imatrix | None = None,
) -> TypePlan:
    """Choose a type for every tensor. Raises what `choose_types` and `refuse_foreign` raise."""
    refuse_foreign(imatrix, tensors)
    choice = resolve_for(choice, hp)
    chosen = choose_types(tensors, hp, choice, overrides, imatrix=imatrix is not None)
    return TypePlan(hp, choice, chosen, imatrix)


def refuse_foreign(imatrix: Imatrix | None, tensors: Sequence[Tensor]) -> None:
    """Raise UsageError if the importance matrix was collected from a model with other tensors."""
    if imatrix is None:
        return
    for tensor in tensors:
        imatrix.importance(tensor.name, tensor.shape)
    if not any(tensor.name in imatrix.entries for tensor in tensors):
        raise UsageError(
            "the importance matrix is of another model: it has none of this one's tensors",
            where=imatrix.name,
            remedy="collect one from this model: dsmoe imatrix",
        )


def _recipe_notes(plan: TypePlan) -> Iterator[str]:
    recipe, left_out = plan.record.type, plan.record.left_out
    if isinstance(recipe, LayeredRecipe) and (absent := absent_layers(recipe, plan.hp.n_layers)):
        yield (
            f"the recipe {recipe.name} names layers that this model does not have:"
            f" {','.join(format_layers(absent))}"
        )
    if left_out:
        yield (
            f"the recipe cannot record the type of {_few(left_out)}: it has one type per group of tensors;"
            " repeat --tensor-type when you use it"
        )


def _imatrix_notes(plan: TypePlan) -> Iterator[str]:
    if plan.imatrix is None:
        return
    quantized = [choice for choice in plan.choices if choice.changes and choice.type not in FLOATS]
    weighted = [choice for choice in quantized if choice.type not in UNWEIGHTED]
    if not weighted:
        why = "Q8_0 does not use one" if quantized else "no tensor is quantized"
        yield f"the importance matrix has no effect: {why}"
    unknown = [choice.name for choice in weighted if plan.importance_of(choice) is None]
    if unknown:
        yield f"the importance matrix has nothing about {_few(unknown)}"


def _few(names: Sequence[str]) -> str:
    """Return the first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


@dataclass(frozen=True, slots=True)
class Record:
    """What a file's metadata records about its types.

    `left_out` are tensors whose types the recipe cannot record, because a recipe has one type for each group.
    """

    type: ResolvedType
    left_out: tuple[str, ...] = ()


def record_of(choice: ResolvedType, hp: Hyperparameters, chosen: Sequence[TensorChoice]) -> Record:
    """Return what to record about the types `chosen`, which follow from `choice` and overrides.

    A recipe is changed so that it gives the same types again. A mix or a float type is recorded unchanged, as
    it has no table of types.
    """
    if not isinstance(choice, LayeredRecipe) or not any(each.is_override for each in chosen):
        return Record(choice)
    groups: dict[Group, list[TensorChoice]] = {}
    for each in chosen:
        group = group_of(each.name, hp)
        if group is not None:
            groups.setdefault(group, []).append(each)
    overridden, left_out = _overridden(choice, groups)
    types = _changed_types(choice, overridden, groups)
    about = {**choice.about, "overrides": "in effect"}
    if left_out:
        about["left_out"] = _few(left_out)
    name = f"{choice.name}{CHANGED}" if is_reserved(choice.name) else choice.name
    changed = replace(choice, name=name, types=types, about=about)
    if not left_out and same_types(choice, changed, hp.n_layers):
        return Record(choice)
    return Record(changed, tuple(left_out))


def _overridden(
    recipe: LayeredRecipe, groups: Mapping[Group, Sequence[TensorChoice]]
) -> tuple[dict[Group, GgmlType], list[str]]:
    """Return new types of groups that overrides change, and tensors whose type differs from their group's."""
    types: dict[Group, GgmlType] = {}
    left_out: list[str] = []
    for group, members in groups.items():
        if not any(each.is_override for each in members):
            continue
        counts = Counter(each.type for each in members)
        most = max(counts, key=lambda kind: counts[kind])
        own = recipe.group_type(group)
        if len(counts) == 1 or own is None:
            types[group] = most
        kept = types.get(group, own)
        left_out += [each.name for each in members if each.is_override and each.type is not kept]
    return types, left_out


def _changed_types(
    recipe: LayeredRecipe,
    overridden: Mapping[Group, GgmlType],
    groups: Mapping[Group, object],
) -> dict[str, Mapping[int | None, GgmlType]]:
    """Return the recipe's types with those of `overridden` groups replaced.

    Kinds whose substitute changes keep their types. If the overrides cover every layer of a kind, its most
    frequent type becomes that of `OTHERS`.
    """
    found = dict(recipe.types)
    for kind, substitute in SUBSTITUTES.items():
        changed = any(group.kind == substitute for group in overridden)
        if changed and kind not in found and any(group.kind == kind for group in groups):
            found[kind] = recipe.layers_of(kind)
    for name in {group.kind: None for group in overridden}:
        layers = {group.layer: kind for group, kind in overridden.items() if group.kind == name}
        all_layers = len(layers) == sum(group.kind == name for group in groups)
        found[name] = condensed(layers) if all_layers else {**recipe.layers_of(name), **layers}
    return found
