"""Which types are measured, with and without an importance matrix, and a digest that tells when one of them
is not what it was. Measures nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.support.reference_shape import HP
from benchmarks.support.sizes import choices_of, types_digest
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.named_recipes import RECIPES
from dsmoe_quantize.policy.types import TypeChoice

BASE = "Q4_K_M"
"""What our recipes are held against."""
STOCK = ("Q8_0", "Q6_K", "Q5_K_M", BASE, "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0")
TIMED = ("Q8_0", BASE, "Q4_K_S", "IQ4_XS", "Q4_0")
"""Of those, the ones whose speed is measured, beside that of all recipes."""
OURS = tuple(RECIPES)
LARGE = PRESETS["deepseekmoe-16b"].hp

_DIGITS = 12


@dataclass(frozen=True, slots=True, order=True)
class Variant:
    """A type by its word, encoded with an importance matrix or without."""

    word: str
    imatrix: bool

    def __str__(self) -> str:
        return f"{self.word}, imatrix" if self.imatrix else self.word

    @property
    def digest(self) -> str:
        """Of the types that the tensors of 16B and of the trained reference get: figures with another digest
        are of something else.
        """
        return _digest(self.word, self.imatrix)


def variants() -> Iterator[Variant]:
    """All, in the order of the tables."""
    for imatrix in (False, True):
        yield from (Variant(word, imatrix) for word in (*STOCK, *OURS))


@cache
def _digest(word: str, imatrix: bool) -> str:
    return digest_of(word, imatrix=imatrix)


def digest_of(wanted: str | TypeChoice, *, imatrix: bool) -> str:
    """As a variant's, of a type that may have no name."""
    parts = [types_digest(choices_of(hp, wanted, imatrix=imatrix)) for hp in (LARGE, HP)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:_DIGITS]
