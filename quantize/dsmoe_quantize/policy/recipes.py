"""Recipes: a type for each layer of each kind of tensors, and fallbacks for types that do not fit.

They come from `named_recipes`, from a file (`recipe_file`) or from the solver (`budget`), all in one form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from dsmoe_local.base.errors import UsageError
from dsmoe_local.model.file_type import FILE_TYPES
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.layout import GroupKind, group_kind_of, is_for_more_tokens, layer_of
from dsmoe_quantize.policy.mixes import first_eighth, more_bits
from dsmoe_quantize.policy.named_recipes import NamedRecipe, TypeWords

KINDS: tuple[str, ...] = tuple(GroupKind)
"""The kinds of groups that a recipe has types for, in the order of a recipe file."""

SUBSTITUTES: Mapping[str, str] = MappingProxyType(
    {
        GroupKind.ATTENTION_QUERY_KEY_VALUE: GroupKind.ATTENTION_VALUE,
        GroupKind.ATTENTION_LATENT: GroupKind.ATTENTION_QUERY_KEY,
        GroupKind.ATTENTION_KEY_UP: GroupKind.ATTENTION_QUERY_KEY,
    }
)
"""Kinds that a recipe need not have: without a line of their own, they get the types of another kind. So a
recipe applies to models with other forms of attention.
"""

LayerRule: TypeAlias = Callable[[int, int], bool]
"""Takes a layer's index and the number of layers; True if the rule includes the layer."""

LAYER_RULES: Mapping[str, LayerRule] = MappingProxyType(
    {
        "first-eighth": first_eighth,
        "last-eighth": lambda index, count: index >= 7 * count // 8,
        "every-third": lambda index, count: index % 3 == 2,
        "more-bits": more_bits,
    }
)
"""The rules by the words of named recipes. The last eighth is at least one layer."""

OTHERS = None
"""In place of a layer: all layers that are not named."""

OTHERS_WORD = "others"
"""The word for it in recipe files and in the table of named recipes."""

RECIPE_FALLBACKS: Mapping[GgmlType, GgmlType] = MappingProxyType(
    {
        GgmlType.Q3_K: GgmlType.IQ4_NL,
        GgmlType.Q4_K: GgmlType.IQ4_NL,
        GgmlType.IQ4_XS: GgmlType.IQ4_NL,
        GgmlType.Q5_K: GgmlType.Q5_1,
        GgmlType.Q6_K: GgmlType.Q8_0,
    }
)
"""The type to use where the blocks of another do not divide the columns, unless a recipe file has its own."""


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """The tensors of one kind in one layer, which get one type. `layer` is None for embedding and output."""

    kind: str
    layer: int | None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


def group_of(name: str, hp: Hyperparameters) -> Group | None:
    """Return the group of a GGUF tensor; None if it is never quantized.

    Layers for multi-token prediction belong to the groups of the last layer before them.
    """
    kind = group_kind_of(name, hp)
    if kind is None:
        return None
    if kind in (GroupKind.EMBEDDING, GroupKind.OUTPUT):
        return Group(kind, None)
    return Group(kind, hp.n_layers - 1 if is_for_more_tokens(name, hp) else layer_of(name))


@dataclass(frozen=True, slots=True)
class LayeredRecipe:
    """A recipe with a type for each layer: `types` by kind of group, then by layer or `OTHERS`.

    `name` becomes part of file names. `closest` is the most similar of llama.cpp's mixes, `file_type` its
    number. `about` tells the user how the recipe was made; it has no effect.
    """

    name: str
    closest: str
    types: Mapping[str, Mapping[int | None, GgmlType]]
    fallbacks: Mapping[GgmlType, GgmlType]
    about: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def file_type(self) -> int:
        """llama.cpp's number for files of this type."""
        return FILE_TYPES[self.closest]

    def layers_of(self, kind: str) -> Mapping[int | None, GgmlType]:
        """Return the types of a kind of group by layer: its own, or those of its substitute."""
        return self.types.get(kind) or self.types.get(SUBSTITUTES.get(kind, ""), {})

    def group_type(self, group: Group) -> GgmlType | None:
        """Return the type of a group; None if the recipe has none for it."""
        layers = self.layers_of(group.kind)
        return layers.get(group.layer, layers.get(OTHERS))

    def type_of(self, name: str, hp: Hyperparameters) -> tuple[GgmlType, str]:
        """Return the type of a matrix before any fallback, and the reason.

        Raises UsageError if the recipe has no type for it.
        """
        group = group_of(name, hp)
        assert group is not None  # only matrices that may be quantized are asked for
        kind = self.group_type(group)
        if kind is None:
            raise UsageError(
                f"the recipe {self.name} has no type for {group}",
                where=name,
                remedy=f'add a line for {group.kind}, or "others" to that line',
            )
        return kind, f"{self.name}, {group}"


def absent_layers(recipe: LayeredRecipe, n_layers: int) -> list[int]:
    """Return the layers that the recipe names and a model of `n_layers` does not have.

    Layers that exist but lack tensors of that kind are not returned: a named recipe, written to a file, names
    all layers of its rule.
    """
    named = {layer for layers in recipe.types.values() for layer in layers if layer is not OTHERS}
    return sorted(layer for layer in named if layer >= n_layers)


def condensed(layers: Mapping[int | None, GgmlType]) -> dict[int | None, GgmlType]:
    """Return the types of all layers of a kind, with the most frequent one as that of `OTHERS`."""
    counts = Counter(layers.values())
    most = max(counts, key=lambda kind: (counts[kind], -kind))
    return {OTHERS: most, **{layer: kind for layer, kind in layers.items() if kind is not most}}


def recipe_for(named: NamedRecipe, n_layers: int) -> LayeredRecipe:
    """Return what a named recipe means for a model of `n_layers`.

    Kinds with the same types as their substitutes are omitted.
    """
    words = {kind: words_of(named, kind) for kind in KINDS}
    return LayeredRecipe(
        named.name,
        named.closest,
        {
            kind: _by_layer(words[kind], n_layers)
            for kind in KINDS
            if kind not in SUBSTITUTES or words[kind] != words[SUBSTITUTES[kind]]
        },
        {**RECIPE_FALLBACKS, **_types_of(named.fallbacks)},
        {"why": named.why},
    )


def _types_of(words: Mapping[str, str]) -> dict[GgmlType, GgmlType]:
    return {GgmlType.__members__[kind]: GgmlType.__members__[fallback] for kind, fallback in words.items()}


def words_of(named: NamedRecipe, kind: str) -> TypeWords:
    """Return what a named recipe says about a kind of group."""
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
