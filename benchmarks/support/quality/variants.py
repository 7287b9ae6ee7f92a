"""The types that benchmarks/quality.py measures, and a digest that changes when one of them does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from benchmarks.support.reference_shape import HP
from benchmarks.support.sizes import choices_of, types_digest
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.policy.named_recipes import RECIPES

BASE = "Q4_K_M"
"""What our recipes are compared with."""
STOCK = ("Q8_0", "Q6_K", "Q5_K_M", BASE, "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q3_K_L")
OURS = tuple(RECIPES)
COMPARED = ("q4", "q4-fast", "q4-small")
"""The recipes that are compared with the base."""
TIMED = (BASE, *COMPARED)
"""The types whose speed is measured."""
ALIKE = (BASE, "Q3_K_L", *COMPARED)
"""Types that are also measured with embedding and output in Q8_0."""
CALIBRATED = ("Q3_K_L", "q4-small", "q4-fast", "q4", BASE, "Q5_K_M")
"""Types that are also measured with calibrated rounding."""
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
        """A digest of the types that the tensors of the 16B and of the trained reference get."""
        return _digest(self.word, self.imatrix)


VARIANTS = tuple(Variant(word, imatrix) for imatrix in (False, True) for word in (*STOCK, *OURS))
"""All types without an importance matrix and with one, in the order of the tables."""


@cache
def _digest(word: str, imatrix: bool) -> str:
    parts = [types_digest(choices_of(hp, word, imatrix=imatrix)) for hp in (LARGE, HP)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:_DIGITS]
