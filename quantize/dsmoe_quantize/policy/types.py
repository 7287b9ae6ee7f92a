"""What the word after --type means: a float type, one of llama.cpp's mixes, or a recipe of ours."""

from __future__ import annotations

from typing import TypeAlias

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import GgmlType, type_name
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.policy.mixes import ALIASES, FLOAT_TYPES, MIXES, Mix
from dsmoe_quantize.policy.named_recipes import RECIPES, NamedRecipe
from dsmoe_quantize.policy.recipes import KINDS, OTHERS, LayeredRecipe, recipe_for
from dsmoe_quantize.write import kernels

SettledType: TypeAlias = Mix | LayeredRecipe
"""A choice for one model. All have a `name`, for file names, and a `file_type`, as llama.cpp numbers them."""

TypeChoice: TypeAlias = SettledType | NamedRecipe
"""What --type or --recipe resolves to. All have a `name`."""


def known_words() -> list[str]:
    """The words that `resolve` takes, as they are best written, without aliases."""
    return [*RECIPES, *MIXES, *(name.lower() for name in FLOAT_TYPES)]


def resolve(word: str) -> TypeChoice:
    """The choice called `word`, in any case. UsageError, listing all, if there is none."""
    upper = word.upper()
    mix = MIXES.get(ALIASES.get(upper, upper))
    choice = RECIPES.get(word.lower()) or mix or FLOAT_TYPES.get(upper)
    if choice is None:
        raise UsageError(
            f"{safe_line(word, 40)!r} is not a type", remedy=f"known: {', '.join(known_words())}"
        )
    return choice


def settled(choice: TypeChoice, hp: Hyperparameters) -> SettledType:
    """What a choice means for a model. UsageError for a recipe, from a file, that goes by a name that --type
    knows and is another: what it makes would be shown under that name.
    """
    if isinstance(choice, NamedRecipe):
        return recipe_for(choice, hp.n_layers)
    if isinstance(choice, LayeredRecipe) and is_reserved(choice.name):
        named = RECIPES.get(choice.name.lower())
        if named is None or not same_types(choice, recipe_for(named, hp.n_layers), hp.n_layers):
            raise UsageError(
                f"the recipe is called {choice.name}, and has other types than {choice.name} has here",
                remedy='give it a name of its own: name = "mine"',
            )
    return choice


def is_reserved(name: str) -> bool:
    """Whether a recipe's name is one that --type knows."""
    upper = name.upper()
    return name.lower() in RECIPES or upper in MIXES or upper in ALIASES or upper in FLOAT_TYPES


def same_types(first: LayeredRecipe, second: LayeredRecipe, n_layers: int) -> bool:
    """Whether two recipes mean the same in a model of so many layers."""
    tables = [
        {
            (kind, layer): layers.get(layer, layers.get(OTHERS))
            for kind in KINDS
            for layer in (OTHERS, *range(n_layers))
            for layers in (recipe.types.get(kind, {}),)
        }
        for recipe in (first, second)
    ]
    return tables[0] == tables[1] and first.fallbacks == second.fallbacks


def resolve_float(kind: GgmlType) -> Mix:
    """The choice that keeps weights in the float type `kind`."""
    return FLOAT_TYPES[type_name(kind)]


def parse_target(word: str) -> GgmlType:
    """The ggml type called `word`, if weights can be encoded in it. UsageError if not."""
    kind = GgmlType.__members__.get(word.upper())
    if kind is None or kind not in kernels.WRITABLE:
        known = ", ".join(type_name(each).lower() for each in GgmlType if each in kernels.WRITABLE)
        raise UsageError(
            f"{safe_line(word, 40)!r} is no type that a tensor can be encoded in", remedy=f"known: {known}"
        )
    return kind
