"""The recipes that --type knows by name: the one table that the options, their help, and file names follow.

Words alone, so that --help needs no library. What they mean for a model is `recipes`' concern.

Why these types: in the routed experts, 91% of a 16B model, bits pay most in the down projection; attention
and shared experts are read for every token but are 6% of the file; llama.cpp has fast CPU kernels (repacked
blocks) for Q4_K and IQ4_NL, none for Q5_0 and Q8_0, which its own mixes put into the down projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

TypeWords: TypeAlias = str | Mapping[str, str]
"""One type, or types with their layers as `layer_rules` names them: {"Q6_K": "first-eighth,every-third",
"Q5_K": "others"}. Where two mean a layer, the first has it.
"""


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A recipe for models of any depth. `why` is what it is for, for people.

    `types` goes by kind of group (`groups.KINDS`), or the beginning of one up to a hyphen; the longest that
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
            "embedding": "Q4_K",
            "output": "Q6_K",
            "attention": "Q6_K",
            "shared": "Q6_K",
            "dense": "Q4_K",
            "dense-down": "IQ4_NL",
            "routed-gate-up": "Q4_K",
            "routed-down": "IQ4_NL",
        },
    ),
    NamedRecipe(
        "q4-fast",
        why="4 bits with fast kernels where most is computed",
        closest="Q4_K_M",
        types={
            "embedding": "Q4_K",
            "output": "Q6_K",
            "attention": "Q5_K",
            "shared": "Q5_K",
            "dense": "Q5_K",
            "routed-gate-up": "Q4_K",
            "routed-down": "IQ4_NL",
        },
    ),
    NamedRecipe(
        "q4-small",
        why="the least memory",
        closest="Q4_K_S",
        types={
            "": "Q4_K",
            "output": "Q6_K",
            "routed-down": "IQ4_NL",
        },
    ),
)

RECIPES: Mapping[str, NamedRecipe] = MappingProxyType({recipe.name: recipe for recipe in _LIST})
