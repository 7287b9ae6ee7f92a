"""The types that benchmarks/quality.py measures, and a digest that changes when one of them does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from benchmarks.support.reference_shape import HP
from benchmarks.support.sizes import choices_of, types_digest
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.named_recipes import RECIPES, NamedRecipe, TypeWords
from dsmoe_quantize.policy.types import TypeChoice

BASE = "Q4_K_M"
"""What our recipes are compared with."""
STOCK = ("Q8_0", "Q6_K", "Q5_K_M", BASE, "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0")
TIMED = ("Q8_0", BASE, "Q4_K_S", "IQ4_XS", "Q4_0")
"""The stock types whose speed is measured; the speed of every recipe is measured too."""
OURS = tuple(RECIPES)
ALIKE = (("q4", BASE), ("q4-fast", BASE), ("q4-small", BASE), ("q4-small", "IQ4_XS"))
"""Recipes, and the type each is compared with. That one gets the recipe's types for embedding and output."""
LARGE = PRESETS["deepseekmoe-16b"].hp

_DIGITS = 12


@dataclass(frozen=True, slots=True, order=True)
class Variant:
    """A type by its name, encoded with an importance matrix or without."""

    word: str
    imatrix: bool

    def __str__(self) -> str:
        return f"{self.word}, imatrix" if self.imatrix else self.word

    @property
    def digest(self) -> str:
        """See `digest_of`."""
        return _digest(self.word, self.imatrix)


def variants() -> Iterator[Variant]:
    """Yield all types with and without an importance matrix, in the order of the tables."""
    for imatrix in (False, True):
        yield from (Variant(word, imatrix) for word in (*STOCK, *OURS))


def timed_variants() -> Iterator[Variant]:
    """Yield each kind of file once: a recipe may be a stock type under another name. All are without an
    importance matrix: with one, some stock mixes get larger types in a few tensors, recipes do not.
    """
    seen = set()
    for word in (*TIMED, *OURS):
        variant = Variant(word, False)
        if variant.digest not in seen:
            seen.add(variant.digest)
            yield variant


@cache
def _digest(word: str, imatrix: bool) -> str:
    return digest_of(word, imatrix=imatrix)


def digest_of(wanted: str | TypeChoice, *, imatrix: bool) -> str:
    """Return a digest of the types that the tensors of the 16B and of the trained reference get."""
    parts = [types_digest(choices_of(hp, wanted, imatrix=imatrix)) for hp in (LARGE, HP)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:_DIGITS]


EIGHT_BASE = "Q8_0"


def _eight(name: str, why: str, types: Mapping[str, TypeWords]) -> NamedRecipe:
    return NamedRecipe(name, why, EIGHT_BASE, {"": EIGHT_BASE, **types})


EIGHT = (
    _eight(
        "q8-value",
        "attention values in F16, for routed gate and up in Q6_K in every third layer",
        {"attention-value": "F16", "routed-gate-up": {"Q6_K": "every-third", EIGHT_BASE: "others"}},
    ),
    _eight(
        "q8-output",
        "the output in F16, for routed gate and up in Q6_K",
        {"output": "F16", "routed-gate-up": "Q6_K"},
    ),
    _eight(
        "q8-attention",
        "all of attention in F16, for every gate and up in Q6_K",
        {"attention": "F16", "dense-gate-up": "Q6_K", "shared-gate-up": "Q6_K", "routed-gate-up": "Q6_K"},
    ),
)
"""Candidates for q8, which stays another name of Q8_0 unless one is better at the same size. Each keeps some
tensors in F16 and has Q6_K where most of the weights are. None is larger than Q8_0, neither on the 16B shape
nor on the reference.
"""

POINTS_BASE = "q4-fast"


def _point(name: str, why: str, types: Mapping[str, TypeWords]) -> NamedRecipe:
    return NamedRecipe(name, f"`{POINTS_BASE}`, but {why}", BASE, {**RECIPES[POINTS_BASE].types, **types})


POINTS = (
    _point("gate-up-q4-k", "routed gate and up in Q4_K in all layers", {"routed-gate-up": "Q4_K"}),
    _point("gate-up-iq4-xs", "routed gate and up in IQ4_XS in all layers", {"routed-gate-up": "IQ4_XS"}),
    _point("query-key-q5-k", "queries and keys in Q5_K", {"attention-query-key": "Q5_K"}),
    _point(
        "five-bits",
        "attention and shared experts in Q5_K, routed gate and up in Q4_K",
        {"attention": "Q5_K", "shared": "Q5_K", "routed-gate-up": "Q4_K"},
    ),
)
"""Other choices where the bars conflict: the types that read prompts fastest do not decode fastest."""
