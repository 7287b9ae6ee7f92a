"""The recipes that --type knows by name, in one table from which options, help and file names follow.

The table holds only words, so that --help imports neither numpy nor gguf. `recipes` applies it to a model.

Why these types (docs/quality.md has the figures, and what one step away from each would change):
- Embedding: a token reads one row of it, so its bits cost size but no speed.
- In the trained reference model, errors in the embedding, the output, and queries and keys cost most.
- Shared experts are read for every token but are hardly more sensitive than routed ones.
- Routed experts are 91% of a 16B's weights. The width of their down projections rules out blocks of 256.
- Speed: llama.cpp multiplies routed experts in repacked blocks (Q4_K, IQ4_NL) by one token at a time. IQ4_XS,
  which is never repacked on x86, is much faster in prefill and somewhat slower in decoding. So q4-fast and
  q4-small have Q4_K in some layers and IQ4_XS in the others.
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
    """A recipe for models of any depth. `why` tells the user what it is for.

    The keys of `types` are kinds of groups (`recipes.KINDS`) or prefixes of them that end before a hyphen.
    The longest key that matches applies; "" matches every kind. `closest` is the most similar of llama.cpp's
    mixes, which general.file_type names.
    """

    name: str
    why: str
    closest: str
    types: Mapping[str, TypeWords]


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
