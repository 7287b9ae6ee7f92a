"""Recipes: a type for each layer of each group of tensors, and what to take where it does not fit.

They come from `named_recipes`, from a file (`recipe_file`), or from the solver (`budget`), and have one form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from dsmoe_local.base.errors import UsageError
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.layout import GroupKind, group_kind_of, layer_of
from dsmoe_quantize.policy.mixes import file_type_of, first_eighth, more_bits
from dsmoe_quantize.policy.named_recipes import NamedRecipe, TypeWords

KINDS: tuple[str, ...] = tuple(GroupKind)
"""The kinds of groups that a recipe has types for, in the order of a recipe file."""

LayerRule: TypeAlias = Callable[[int, int], bool]
"""True if the layer at an index, of a number of layers, is meant."""

LAYER_RULES: Mapping[str, LayerRule] = MappingProxyType(
    {
        "first-eighth": first_eighth,
        "last-eighth": lambda index, count: index >= 7 * count // 8,
        "every-third": lambda index, count: index % 3 == 2,
        "more-bits": more_bits,
    }
)
"""By the word that a named recipe uses for the rule. The last eighth is at least one layer."""

OTHERS = None
"""In place of a layer: all that are not named."""

OTHERS_WORD = "others"
"""That in words, in recipe files and in the table of named recipes."""

RECIPE_FALLBACKS: Mapping[GgmlType, GgmlType] = MappingProxyType(
    {
        GgmlType.Q4_K: GgmlType.IQ4_NL,
        GgmlType.IQ4_XS: GgmlType.IQ4_NL,
        GgmlType.Q5_K: GgmlType.Q5_1,
        GgmlType.Q6_K: GgmlType.Q8_0,
    }
)
"""What takes the place of a type whose blocks do not fit a row, unless a recipe file says otherwise."""


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """The tensors of one kind in one layer, which get one type. `layer` is None for embedding and output."""

    kind: str
    layer: int | None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


def group_of(name: str, tied: bool) -> Group | None:
    """The group of a GGUF tensor; None if it is never quantized. `tied`: the embedding is also the output."""
    kind = group_kind_of(name)
    if kind is None:
        return None
    return Group(GroupKind.OUTPUT if kind is GroupKind.EMBEDDING and tied else kind, layer_of(name))


@dataclass(frozen=True, slots=True)
class LayeredRecipe:
    """A recipe for one model, or for all whose layers it has: `types` by kind of group, then by
    layer or `OTHERS`.

    `name` goes into file names; `closest` is the one of llama.cpp's mixes that comes closest, `file_type` its
    number. `about` says how the recipe came about, for people; it changes nothing.
    """

    name: str
    closest: str
    file_type: int
    types: Mapping[str, Mapping[int | None, GgmlType]]
    fallbacks: Mapping[GgmlType, GgmlType]
    about: Mapping[str, str | int | float] = field(default_factory=dict)

    def type_of(self, name: str, tied: bool) -> tuple[GgmlType, str]:
        """The type of a matrix before any fallback, and why it is that. `tied`: the embedding is the output,
        too. UsageError for a tensor of which the recipe says nothing.
        """
        group = group_of(name, tied)
        assert group is not None  # it has the role of a matrix
        layers = self.types.get(group.kind, {})
        kind = layers.get(group.layer, layers.get(OTHERS))
        if kind is None:
            raise UsageError(
                f"the recipe {self.name} has no type for {group}",
                where=name,
                remedy=f'add a line for {group.kind}, or "others" to it',
            )
        return kind, f"{self.name}, {group}"


def absent_layers(recipe: LayeredRecipe, n_layers: int) -> list[int]:
    """Numbers of layers that the recipe has types for, beyond those of a model of so many. Whether a layer
    has tensors of that kind is not asked: a recipe of ours written out names all layers that its rule means.
    """
    named = {layer for layers in recipe.types.values() for layer in layers if layer is not OTHERS}
    return sorted(layer for layer in named if layer >= n_layers)


def recipe_for(named: NamedRecipe, n_layers: int) -> LayeredRecipe:
    """What a named recipe means in a model of so many layers."""
    return LayeredRecipe(
        named.name,
        named.closest,
        file_type_of(named.closest),
        {kind: _by_layer(words_of(named, kind), n_layers) for kind in KINDS},
        RECIPE_FALLBACKS,
        {"why": named.why},
    )


def words_of(named: NamedRecipe, kind: str) -> TypeWords:
    """What a named recipe says of a kind of group."""
    fitting = [key for key in named.types if f"{kind}-".startswith(f"{key}-" if key else "")]
    return named.types[max(fitting, key=len)]


def _by_layer(words: TypeWords, n_layers: int) -> dict[int | None, GgmlType]:
    if isinstance(words, str):
        return {OTHERS: GgmlType.__members__[words]}
    types: dict[int | None, GgmlType] = {}
    for word, layers in words.items():
        for rule in layers.split(","):
            if rule == OTHERS_WORD:
                types[OTHERS] = GgmlType.__members__[word]
                continue
            applies = LAYER_RULES[rule]
            for layer in range(n_layers):
                if applies(layer, n_layers):
                    types.setdefault(layer, GgmlType.__members__[word])
    return types
