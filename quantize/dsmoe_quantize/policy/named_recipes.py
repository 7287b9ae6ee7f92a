"""The recipes that --type knows by name: the one table that the options, their help, and file names follow.

Words alone, so that --help needs no library. What they mean for a model is `recipes`' concern.

Why these types: docs/quality.md has the figures, and what one step away from them would change. Of the
embedding a token reads one row: its bits cost nothing but room. On the trained reference, errors of the
embedding, of the output, and of queries and keys weigh most. Shared experts are read for every token but are
hardly more sensitive than routed ones, which are 91% of a 16B's weights; the width of their down projections
rules out blocks of 256. Kernels: llama.cpp multiplies routed experts in repacked blocks (Q4_K, IQ4_NL) by one
token after another. IQ4_XS, which is never repacked on x86, is far ahead in prompts and somewhat behind in
decoding: q4-fast and q4-small have Q4_K in some layers and IQ4_XS in the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

TypeWords: TypeAlias = str | Mapping[str, str]
"""One type, or types with the layers that get them, by the words of `recipes.LAYER_RULES`:
{"Q6_K": "first-eighth,every-third", "Q5_K": "others"}. A layer that two types name gets the first.
"""


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A recipe for models of any depth. `why` is what it is for, for people.

    `types` goes by kind of group (`recipes.KINDS`), or the beginning of one up to a hyphen; the longest that
    fits has it, and "" fits all. `closest` is the one of llama.cpp's mixes that comes closest: what
    general.file_type says.
    """

    name: str
    why: str
    closest: str
    types: Mapping[str, TypeWords]


_LIST = (
    NamedRecipe(
        "q8",
        why="next to no loss",
        closest="Q8_0",
        types={"": "Q8_0"},
    ),
    NamedRecipe(
        "q4",
        why="close to the original at 4 bits",
        closest="Q4_K_M",
        types={
            "embedding": "Q6_K",
            "output": "Q6_K",
            "attention": "Q5_K",
            "shared": "Q4_K",
            "dense": "Q5_K",
            "dense-down": "Q8_0",
            "routed-gate-up": "Q4_K",
            "routed-down": {"Q5_0": "more-bits", "IQ4_NL": "others"},
        },
    ),
    NamedRecipe(
        "q4-fast",
        why="4 bits in types that are fast on x86",
        closest="Q4_K_M",
        types={
            "": "Q4_K",
            "embedding": "Q6_K",
            "output": "Q6_K",
            "dense-down": "Q5_0",
            "routed-gate-up": {"Q4_K": "more-bits", "IQ4_XS": "others"},
            "routed-down": "IQ4_NL",
        },
    ),
    NamedRecipe(
        "q4-small",
        why="q4-fast with a bit less for the embedding",
        closest="Q4_K_M",
        types={
            "": "Q4_K",
            "embedding": "Q5_K",
            "output": "Q6_K",
            "dense-down": "Q5_0",
            "routed-gate-up": {"Q4_K": "more-bits", "IQ4_XS": "others"},
            "routed-down": "IQ4_NL",
        },
    ),
)

RECIPES: Mapping[str, NamedRecipe] = MappingProxyType({recipe.name: recipe for recipe in _LIST})
