"""What one step away from a recipe would change: the part `steps` of benchmarks/quality.py.

Each kind of group in turn gets the next type up and the next one down, all else stays: the recipe is
justified if every step up costs more than it is worth, and every step down loses more than it saves.
Recipes are chosen by it, so it is measured on another text than what their bars are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.support.quality_fidelity import Bench
from benchmarks.support.quality_rows import StepRow
from benchmarks.support.quality_types import BASE, LARGE, Variant
from benchmarks.support.runner import say
from benchmarks.support.sizes import size_of
from dsmoe_quantize.groups import KINDS
from dsmoe_quantize.named_recipes import RECIPES, NamedRecipe
from dsmoe_quantize.recipes import words_of
from dsmoe_quantize.types import TypeChoice, resolve

STEPPED = ("q4", "q4-fast")
"""The recipes in question. But for the embedding q4-small is q4-fast."""
LADDER, NARROW_LADDER = ("IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), ("IQ4_NL", "Q5_0", "Q8_0")
"""Types from small to large, of blocks of 256 and of 32."""
NARROW = ("dense-down", "routed-down")
"""Kinds whose width, in 16B as in the reference, 256 does not divide."""


@dataclass(frozen=True, slots=True)
class Step:
    """A recipe with another type for one kind of group; of the recipe itself, both words are empty."""

    kind: str
    word: str
    recipe: NamedRecipe


def steps_of(recipe: NamedRecipe) -> Iterator[Step]:
    """All steps. Where a kind has several types, by layer, steps are to each of them alone."""
    for kind in KINDS:
        words = words_of(recipe, kind)
        for word in _neighbours(kind, words) if isinstance(words, str) else words:
            types = {**recipe.types, kind: word}
            yield Step(kind, word, replace(recipe, name=f"{recipe.name}-{kind}-{word}", types=types))


def _neighbours(kind: str, word: str) -> Iterator[str]:
    ladder = NARROW_LADDER if kind in NARROW else LADDER
    at = ladder.index(word)
    yield from (ladder[each] for each in (at - 1, at + 1) if 0 <= each < len(ladder))


def measure_steps(bench: Bench, most: int | None = None) -> list[StepRow]:
    """The base, then each recipe and its steps (`most` of them), all without an importance matrix."""
    rows = [_row(bench, BASE, "", "", resolve(BASE))]
    for word in STEPPED:
        recipe = RECIPES[word]
        rows.append(_row(bench, word, "", "", recipe))
        steps = list(steps_of(recipe))[:most]
        rows += [_row(bench, word, step.kind, step.word, step.recipe) for step in steps]
    return rows


def _row(bench: Bench, word: str, kind: str, other: str, choice: TypeChoice) -> StepRow:
    variant = Variant(word, False)
    found = bench.measure(bench.plan_of(choice, imatrix=False), variant, variant.digest)
    large = size_of(LARGE, choice)
    say(f"  {word} {kind} {other}: KL {found.kl:.3g}")
    return StepRow(
        word,
        variant.imatrix,
        variant.digest,
        kind,
        other,
        large.n_bytes,
        large.n_bytes_per_token,
        found.windows,
    )
