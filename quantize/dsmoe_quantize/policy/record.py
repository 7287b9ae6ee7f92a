"""What a new file says about its types, and what decides its bytes.

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
from dsmoe_local.model.ggml import FLOATS, GgmlType, type_name
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.type_name import RECIPE_KEY
from dsmoe_quantize.imatrix import Imatrix, metadata_of_use
from dsmoe_quantize.policy.choice import Choice, TensorLike, fallback_notes
from dsmoe_quantize.policy.recipe_file import format_layers, render_recipe
from dsmoe_quantize.policy.recipes import OTHERS, Group, LayeredRecipe, absent_layers, group_of
from dsmoe_quantize.policy.types import SettledType, is_reserved, same_types

CHANGED = "-changed"
"""Ends the name of a recipe of ours that overrides have changed."""

_DROPPED = (
    "general.quantization_version",
    "general.file_type",
    "split.no",
    "split.count",
    "split.tensors.count",
    RECIPE_KEY,
)
# llama.cpp keeps these as they are in the source, and its tool adds them for any matrix that it is given. But
# then weights that are encoded without one, or with another, are said to be made with it.
_DROPPED_BEGINNING = "quantize.imatrix."

UNWEIGHED = FLOATS | {GgmlType.Q8_0}
"""Types whose encoders take no notice of what a column counts."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a file says of its types. `left_out` are the tensors whose types the recipe cannot tell, since a
    group has one type there.
    """

    type: SettledType
    left_out: tuple[str, ...] = ()


def record_of(choice: SettledType, hp: Hyperparameters, chosen: Sequence[Choice]) -> Record:
    """What a file says about its types: `chosen` is what each tensor got from `choice` and the overrides.

    Of a mix or a float type only the name is recorded: they have no table that overrides could change.
    """
    if not isinstance(choice, LayeredRecipe) or not any(each.is_override for each in chosen):
        return Record(choice)
    tied = all(each.name != "output.weight" for each in chosen)
    groups: dict[Group, list[Choice]] = {}
    for each in chosen:
        group = group_of(each.name, tied)
        if group is not None:
            groups.setdefault(group, []).append(each)
    told, left_out = _told(choice, groups)
    types = _with(choice.types, told, groups)
    about = {**choice.about, "overrides": "in effect"}
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
    """The types of the groups that overrides are about, and the tensors that have another."""
    told: dict[Group, GgmlType] = {}
    left_out: list[str] = []
    for group, members in groups.items():
        if not any(each.is_override for each in members):
            continue
        kinds = Counter(each.type for each in members)
        most = max(kinds, key=lambda kind: kinds[kind])
        layers = recipe.types.get(group.kind, {})
        own = layers.get(group.layer, layers.get(OTHERS))
        if len(kinds) == 1 or own is None:
            told[group] = most
        kept = told.get(group, own)
        left_out += [each.name for each in members if each.is_override and each.type is not kept]
    return told, left_out


def _with(
    types: Mapping[str, Mapping[int | None, GgmlType]],
    told: Mapping[Group, GgmlType],
    groups: Mapping[Group, object],
) -> dict[str, Mapping[int | None, GgmlType]]:
    """`types` with those of the groups in `told`. Where overrides settle every layer of a kind, the most
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


def metadata_of_output(
    metadata: Mapping[str, Field], choice: SettledType, imatrix: Imatrix | None = None
) -> dict[str, Field]:
    """`metadata` as a file of this type has it, as llama_model_quantize writes it, and the recipe if there is
    one. `imatrix` is the one that weights are encoded with: see `used_imatrix`.

    What is said about quantization moves to the end; keys about being one of several shards, or about the
    recipe and the matrix of the source, go.
    """
    kept = {
        key: field
        for key, field in metadata.items()
        if key not in _DROPPED and not key.startswith(_DROPPED_BEGINNING)
    }
    kept["general.quantization_version"] = Field(GGML_QUANT_VERSION, GGUFValueType.UINT32)
    kept["general.file_type"] = Field(choice.file_type, GGUFValueType.UINT32)
    if isinstance(choice, LayeredRecipe):
        kept[RECIPE_KEY] = Field(render_recipe(choice), GGUFValueType.STRING)
    return kept | (metadata_of_use(imatrix) if imatrix else {})


def identity_of_output(
    choice: SettledType, chosen: Sequence[Choice], imatrix: Imatrix | None
) -> dict[str, object]:
    """What decides the bytes besides the source, by names that a user understands: see `write_output`."""
    types = "\n".join(f"{each.name} {type_name(each.type)}" for each in chosen)
    recipe = render_recipe(choice) if isinstance(choice, LayeredRecipe) else None
    return {
        "the type": choice.name,
        "the tensors' types": hashlib.sha256(types.encode()).hexdigest(),
        "the recipe": recipe and hashlib.sha256(recipe.encode()).hexdigest(),
        "the importance matrix": imatrix and imatrix.digest(),
    }


def refuse_foreign(imatrix: Imatrix | None, tensors: Sequence[TensorLike]) -> None:
    """UsageError for an importance matrix of another model than the one of these tensors."""
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


def importance_of(imatrix: Imatrix | None, tensor: TensorLike, choice: Choice) -> NDArray[np.float32] | None:
    """What the columns of a tensor count that is encoded anew; None if nobody knows, or it is not, or that
    changes nothing.
    """
    if imatrix is None or choice.type in UNWEIGHED or choice.type is tensor.type:
        return None
    return imatrix.importance(tensor.name, tensor.shape)


def used_imatrix(
    imatrix: Imatrix | None, tensors: Sequence[TensorLike], chosen: Sequence[Choice]
) -> Imatrix | None:
    """The matrix, if any tensor is encoded with it."""
    pairs = zip(tensors, chosen, strict=True)
    used = any(importance_of(imatrix, tensor, choice) is not None for tensor, choice in pairs)
    return imatrix if used else None


def notes_on_output(
    tensors: Sequence[TensorLike],
    chosen: Sequence[Choice],
    record: Record,
    imatrix: Imatrix | None,
    n_layers: int,
) -> Iterator[str]:
    """What a person should know: types that do not fit, layers of the recipe that are not there, what the
    recipe in the file leaves out, a matrix that is not used, and tensors of which it says nothing, as the
    output and the embedding often.
    """
    yield from fallback_notes(chosen)
    if isinstance(record.type, LayeredRecipe) and (absent := absent_layers(record.type, n_layers)):
        yield (
            f"the recipe {record.type.name} has types for layers that this model has not:"
            f" {','.join(format_layers(absent))}"
        )
    if record.left_out:
        yield (
            f"the recipe cannot tell of {named(record.left_out)}: tensors of a group have one type there;"
            " give --tensor-type with it again"
        )
    if imatrix is None:
        return
    pairs = zip(tensors, chosen, strict=True)
    anew = [pair for pair in pairs if pair[1].type is not pair[0].type and pair[1].type not in FLOATS]
    weighed = [tensor for tensor, choice in anew if choice.type not in UNWEIGHED]
    if not weighed:
        why = "Q8_0 is encoded without one" if anew else "no tensor is quantized"
        yield f"the importance matrix changes nothing: {why}"
    blind = [tensor.name for tensor in weighed if imatrix.importance(tensor.name, tensor.shape) is None]
    if blind:
        yield f"the importance matrix says nothing of {named(blind)}"
