"""The recipes that --type knows by name, in one table from which options, help and file names follow.

The table holds only words, so that --help imports neither numpy nor gguf. `recipes` applies it to a model.

Why these types (docs/quality.md has the figures, docs/performance.md the speed of each type):
- Embedding: a token reads one row of it, so its bits cost size but no speed.
- In the trained reference model, errors in the embedding, the output, and queries and keys cost most.
- The dense layer is one of 28: eight bits in its down projection cost almost nothing.
- Speed: llama.cpp's tiled products process prompts at the same speed in IQ4_XS, Q4_K and Q5_K. So IQ4_XS, the
  smallest, is used where errors cost least, and the bytes that it saves are spent on attention.
- Shared experts are read for every token, but errors cost little. IQ4_NL decodes faster than IQ4_XS.
- Routed experts are 91% of a 16B's weights. The width of their down projections rules out blocks of 256, and
  so the tiled products. Of the types that fit, Q4_0 is fastest and IQ4_NL more exact. Q5_0 takes nearly twice
  as long. Where 256 divides the width, as in most other models, the type before the fallback is faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

TypeWords: TypeAlias = str | Mapping[str, str]
"""One type, or types with the layers that get them, by the words of `recipes.LAYER_RULES`:
{"Q6_K": "first-eighth,every-third", "Q5_K": "others"}. A layer that two types name gets the first.
"""


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A recipe for models of any depth. `why` tells the user what it is for.

    The keys of `types` are kinds of groups (`recipes.KINDS`) or prefixes of them that end before a hyphen.
    The longest key that matches applies; "" matches every kind. `closest` is the most similar of llama.cpp's
    mixes, which general.file_type names. `fallbacks` take precedence over `recipes.RECIPE_FALLBACKS`.
    """

    name: str
    why: str
    closest: str
    types: Mapping[str, TypeWords]
    fallbacks: Mapping[str, str] = field(default_factory=dict)


_LIST = (
    NamedRecipe(
        "q8",
        why="almost lossless",
        closest="Q8_0",
        types={"": "Q8_0"},
    ),
    NamedRecipe(
        "q4",
        why="close to the original at 4 bits",
        closest="Q4_K_M",
        types={
            "": "Q6_K",
            "attention-output": "Q5_K",
            "dense": "Q5_K",
            "dense-down": "Q6_K",
            "shared": "IQ4_NL",
            "routed-gate-up": "IQ4_XS",
            "routed-down": "Q4_K",
        },
        fallbacks={"Q4_K": "Q4_0"},
    ),
    NamedRecipe(
        "q4-fast",
        why="4 bits in types that are fast on x86",
        closest="Q4_K_M",
        types={
            "": "IQ4_XS",
            "embedding": "Q6_K",
            "output": "Q6_K",
            "attention": "Q5_K",
            "attention-output": "IQ4_XS",
            "dense": "Q5_K",
            "dense-down": "Q6_K",
        },
        fallbacks={"IQ4_XS": "Q4_0"},
    ),
    NamedRecipe(
        "q4-small",
        why="less than 4 bits, for little memory",
        closest="Q3_K_L",
        types={
            "": "Q5_K",
            "embedding": "Q6_K",
            "output": "Q6_K",
            "dense-down": "Q6_K",
            "routed-gate-up": "Q3_K",
            "routed-down": "Q4_K",
        },
    ),
)

RECIPES: Mapping[str, NamedRecipe] = MappingProxyType({recipe.name: recipe for recipe in _LIST})
