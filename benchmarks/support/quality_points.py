"""Other choices beside our recipes: how large, how close and how fast each is. The part `points` of
benchmarks/quality.py.

They lie where the bars pull in two directions: what reads prompts fast is not what decodes fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.support.quality_fidelity import Bench
from benchmarks.support.quality_rows import PointRow
from benchmarks.support.quality_speed import Pair, Timing, ratios_of, time_beside_base
from benchmarks.support.quality_types import BASE, LARGE, Variant, digest_of
from benchmarks.support.runner import say
from benchmarks.support.sizes import size_of
from dsmoe_quantize.named_recipes import RECIPES, NamedRecipe, TypeWords

START = "q4-fast"
"""The recipe that all of them are variants of; their embedding and output are its own."""


def _other(name: str, why: str, types: Mapping[str, TypeWords]) -> NamedRecipe:
    """The recipe with other types for some kinds."""
    return NamedRecipe(name, why, BASE, {**RECIPES[START].types, **types})


POINTS = (
    _other(
        "gate-up-q4-k",
        "`q4-fast`, but routed gate and up in Q4_K in all layers",
        {"routed-gate-up": "Q4_K"},
    ),
    _other(
        "gate-up-iq4-xs",
        "`q4-fast`, but routed gate and up in IQ4_XS in all layers",
        {"routed-gate-up": "IQ4_XS"},
    ),
    _other(
        "query-key-q5-k",
        "`q4-fast`, but queries and keys in Q5_K",
        {"attention-query-key": "Q5_K"},
    ),
    _other(
        "five-bits",
        "`q4-fast`, but attention and shared experts in Q5_K, routed gate and up in Q4_K",
        {"attention": "Q5_K", "shared": "Q5_K", "routed-gate-up": "Q4_K"},
    ),
)


def time_points(timing: Timing) -> Mapping[str, Sequence[Pair]]:
    """Each point beside the base, by name."""
    return time_beside_base(timing, {recipe.name: recipe for recipe in POINTS})


def measure_points(bench: Bench, rounds: Mapping[str, Sequence[Pair]]) -> list[PointRow]:
    """A row of each point that was timed, without an importance matrix."""
    return [_row(bench, recipe, *ratios_of(rounds[recipe.name])) for recipe in POINTS]


def _row(bench: Bench, recipe: NamedRecipe, prompt: Sequence[float], decode: Sequence[float]) -> PointRow:
    digest = digest_of(recipe, imatrix=False)
    found = bench.measure(bench.plan_of(recipe, imatrix=False), Variant(recipe.name, False), digest)
    say(f"  {recipe.name}: KL {found.kl:.3g}")
    large = size_of(LARGE, recipe)
    return PointRow(
        recipe.name,
        False,
        digest,
        recipe.why,
        large.n_bytes,
        large.n_bytes_per_token,
        found.windows,
        prompt,
        decode,
    )
