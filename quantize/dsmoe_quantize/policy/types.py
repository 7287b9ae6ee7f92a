"""What the argument of --type means: a float type, one of llama.cpp's mixes, or a named recipe."""

from __future__ import annotations

from typing import TypeAlias

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_quantize.policy.mixes import ALIASES, FLOAT_TYPES, MIXES, Mix
from dsmoe_quantize.policy.named_recipes import RECIPES, NamedRecipe
from dsmoe_quantize.policy.recipes import KINDS, OTHERS, LayeredRecipe, recipe_for
from dsmoe_quantize.write import kernels

ResolvedType: TypeAlias = Mix | LayeredRecipe
"""The types for one model. Both classes have a `name`, for file names, and llama.cpp's `file_type`."""

TypeChoice: TypeAlias = ResolvedType | NamedRecipe
"""The value of --type or --recipe. A NamedRecipe depends on the model's depth: see `resolve_for`."""


def known_words() -> list[str]:
    """Return the names that `resolve` knows, in their usual spelling, without aliases."""
    return [*RECIPES, *MIXES, *(name.lower() for name in FLOAT_TYPES)]


def resolve(word: str) -> TypeChoice:
    """Return the type called `word`, in any case.

    Raises UsageError, with the known names, if there is none.
    """
    upper = word.upper()
    mix = MIXES.get(ALIASES.get(upper, upper))
    choice = RECIPES.get(word.lower()) or mix or FLOAT_TYPES.get(upper)
    if choice is None:
        what = f"{safe_line(word, 40)!r} is not a type"
        meant = [each for each in known_words() if upper and each.upper().startswith(upper)]
        if meant:
            raise UsageError(what, remedy=f"did you mean {' or '.join(meant)}?")
        raise unknown_type(what)
    return choice


def unknown_type(what: str) -> UsageError:
    """Return the error for a missing or unknown type. It lists the types."""
    others = [word for word in known_words() if word not in RECIPES]
    return UsageError(
        what, where=f"recipes: {', '.join(RECIPES)}", remedy=f"llama.cpp's types: {', '.join(others)}"
    )


def resolve_for(choice: TypeChoice, hp: Hyperparameters) -> ResolvedType:
    """Return the types that a choice means for a model: a named recipe is expanded to its layers.

    Raises UsageError for a recipe from a file that has the name of a built-in type but other types: the
    output would carry a misleading name.
    """
    if isinstance(choice, NamedRecipe):
        return recipe_for(choice, hp.n_layers)
    if isinstance(choice, LayeredRecipe) and is_reserved(choice.name):
        named = RECIPES.get(choice.name.lower())
        if named is None or not same_types(choice, recipe_for(named, hp.n_layers), hp.n_layers):
            raise UsageError(
                f"the recipe is called {choice.name} but has other types than the built-in {choice.name}",
                remedy='give it a name of its own: name = "mine"',
            )
    return choice


def is_reserved(name: str) -> bool:
    """True if --type accepts this name."""
    upper = name.upper()
    return name.lower() in RECIPES or upper in MIXES or upper in ALIASES or upper in FLOAT_TYPES


def same_types(first: LayeredRecipe, second: LayeredRecipe, n_layers: int) -> bool:
    """True if two recipes give the same types in a model of `n_layers`."""
    tables = [
        {
            (kind, layer): layers.get(layer, layers.get(OTHERS))
            for kind in KINDS
            for layer in (OTHERS, *range(n_layers))
            for layers in (recipe.layers_of(kind),)
        }
        for recipe in (first, second)
    ]
    return tables[0] == tables[1] and first.fallbacks == second.fallbacks


def resolve_float(kind: GgmlType) -> Mix:
    """Return the choice that stores every matrix in the float type `kind`."""
    return FLOAT_TYPES[kind.name]


def parse_target(word: str) -> GgmlType:
    """Return the ggml type called `word`, in any case.

    Raises UsageError if weights cannot be encoded in it.
    """
    kind = GgmlType.__members__.get(word.upper())
    if kind is None or kind not in kernels.WRITABLE:
        known = ", ".join(each.name.lower() for each in GgmlType if each in kernels.WRITABLE)
        raise UsageError(
            f"{safe_line(word, 40)!r} is not a type that tensors can be encoded in", remedy=f"known: {known}"
        )
    return kind
