"""The types that benchmarks/quality.py measures, and a digest that tells when one of them has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.support.reference_shape import HP
from benchmarks.support.sizes import choices_of, types_digest
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.named_recipes import RECIPES, NamedRecipe, TypeWords
from dsmoe_quantize.policy.recipes import KINDS, words_of
from dsmoe_quantize.policy.types import TypeChoice

BASE = "Q4_K_M"
"""What our recipes are compared with."""
STOCK = ("Q8_0", "Q6_K", "Q5_K_M", BASE, "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0")
TIMED = ("Q8_0", BASE, "Q4_K_S", "IQ4_XS", "Q4_0")
"""Of those, the ones whose speed is measured, beside that of all recipes."""
OURS = tuple(RECIPES)
ALIKE = (("q4", BASE), ("q4-fast", BASE), ("q4-small", BASE), ("q4-small", "IQ4_XS"))
"""Recipes, and what each is compared with, given the recipe's types for embedding and output."""
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
    """All, in the order of the tables."""
    for imatrix in (False, True):
        yield from (Variant(word, imatrix) for word in (*STOCK, *OURS))


def timed_variants() -> Iterator[Variant]:
    """Each kind of file once: a recipe may be a stock type by another name. All without an importance matrix:
    with one, some stock mixes get larger types in a few tensors, and recipes never.
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
    """Of the types that the tensors of the 16B and of the trained reference get: figures with another digest
    are of other types.
    """
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
"""Candidates for q8, which is Q8_0 by another name as long as none is better at the same size. Each keeps
some tensors in F16 and pays with Q6_K where there are most weights. None is larger than Q8_0, on the 16B
shape and on the reference.
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
"""Other choices where the bars conflict: types that read prompts fast are not those that decode fast."""

STEPPED = ("q4", "q4-fast")
"""The recipes whose steps are measured. But for the embedding q4-small is q4-fast."""
_LADDER, _NARROW_LADDER = ("IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), ("IQ4_NL", "Q5_0", "Q8_0")
"""Types from small to large, of blocks of 256 and of 32."""
_NARROW = ("dense-down", "routed-down")
"""Kinds whose width, in the 16B as in the reference, is not a multiple of 256."""


@dataclass(frozen=True, slots=True)
class Step:
    """A recipe with the type `word` for one kind of group."""

    kind: str
    word: str
    recipe: NamedRecipe


def steps_of(recipe: NamedRecipe) -> Iterator[Step]:
    """The recipe with the next smaller and the next larger type for each kind of group. Where a kind has
    several types, by layer, each of them alone.
    """
    for kind in KINDS:
        words = words_of(recipe, kind)
        for word in _neighbours(kind, words) if isinstance(words, str) else words:
            types = {**recipe.types, kind: word}
            yield Step(kind, word, replace(recipe, name=f"{recipe.name}-{kind}-{word}", types=types))


def _neighbours(kind: str, word: str) -> Iterator[str]:
    ladder = _NARROW_LADDER if kind in _NARROW else _LADDER
    at = ladder.index(word)
    yield from (ladder[each] for each in (at - 1, at + 1) if 0 <= each < len(ladder))
