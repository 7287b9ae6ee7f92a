"""Our own recipes as data: a type for each role and projection, or for each layer of each group of tensors,
and what to take where it does not fit.

Why these: in the routed experts, 91% of a 16B model, bits pay most in the down projection; attention and
shared experts are read for every token but are 6% of the file; llama.cpp has fast CPU kernels (repacked
blocks) for Q4_K and IQ4_NL, none for Q5_0 and Q8_0, which its own mixes put into the down projections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from dsmoe_local.base.errors import UsageError
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.layout import Role
from dsmoe_quantize.groups import group_of

_DOWN = re.compile(r"\.ffn_down(_exps|_shexp)?\.")


@dataclass(frozen=True, slots=True)
class Recipe:
    """`types` by role; `down` overrides them for down projections; `fallbacks` where a block does not fit.

    `file_type` is what general.file_type says: llama.cpp's number of the mix that comes closest.
    """

    name: str
    file_type: int
    types: Mapping[Role, GgmlType]
    down: Mapping[Role, GgmlType]
    fallbacks: Mapping[GgmlType, GgmlType]

    def type_of(self, name: str, role: Role, tied: bool) -> tuple[GgmlType, str]:
        """The type before any fallback, and why it is that. `tied`: the embedding is the output too."""
        if role is Role.EMBEDDING and tied:
            return self.types[Role.OUTPUT], "tied embedding"
        if role in self.down and _DOWN.search(name):
            return self.down[role], f"{role.value}, down"
        return self.types[role], role.value


OTHERS = None
"""In place of a layer: all that are not named."""


@dataclass(frozen=True, slots=True)
class LayeredRecipe:
    """A recipe as a solver makes it and a recipe file holds it: `types` by kind of group (`groups`), then by
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

    def type_of(self, name: str, role: Role, tied: bool) -> tuple[GgmlType, str]:
        """As of a Recipe. UsageError for a tensor of which the recipe says nothing."""
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
        return kind, f"recipe, {group}"


AnyRecipe: TypeAlias = Recipe | LayeredRecipe
"""What chooses by role and group, not by llama.cpp's rules."""

RECIPE_KEY = "dsmoe.recipe"
"""Where a file's metadata says by which recipe file it was made."""

_MATRICES = (
    Role.EMBEDDING,
    Role.OUTPUT,
    Role.ATTENTION,
    Role.DENSE_FFN,
    Role.SHARED_EXPERT,
    Role.ROUTED_EXPERT,
)

_LIST = (
    Recipe(
        "q8",
        file_type=7,  # Q8_0
        types=dict.fromkeys(_MATRICES, GgmlType.Q8_0),
        down={},
        fallbacks={},
    ),
    Recipe(
        "q4",
        file_type=15,  # Q4_K_M: "mostly Q4_K"
        types={
            Role.EMBEDDING: GgmlType.Q4_K,
            Role.OUTPUT: GgmlType.Q6_K,
            Role.ATTENTION: GgmlType.Q6_K,
            Role.SHARED_EXPERT: GgmlType.Q6_K,
            Role.DENSE_FFN: GgmlType.Q4_K,
            Role.ROUTED_EXPERT: GgmlType.Q4_K,
        },
        down={Role.DENSE_FFN: GgmlType.IQ4_NL, Role.ROUTED_EXPERT: GgmlType.IQ4_NL},
        fallbacks={
            GgmlType.Q4_K: GgmlType.IQ4_NL,
            GgmlType.IQ4_XS: GgmlType.IQ4_NL,
            GgmlType.Q5_K: GgmlType.Q5_1,
            GgmlType.Q6_K: GgmlType.Q8_0,
        },
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _LIST})
