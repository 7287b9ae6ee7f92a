"""What else 8 bits could be: candidates for q8, which is Q8_0 by another name as long as none is better at
the same size. Of the part `reference` of benchmarks/quality.py.

The errors of Q8_0 are those of all groups together. A candidate keeps some of them from being made at all, in
F16, and pays with Q6_K where there are most weights and each counts least.
"""

from __future__ import annotations

from benchmarks.support.quality_budgets import Costs, market_of
from benchmarks.support.quality_fidelity import Bench
from benchmarks.support.quality_rows import CandidateRow
from benchmarks.support.quality_types import LARGE, Variant, digest_of
from benchmarks.support.runner import say
from benchmarks.support.sizes import size_of
from dsmoe_quantize.budget import Market
from dsmoe_quantize.named_recipes import NamedRecipe
from dsmoe_quantize.quantize import Plan
from dsmoe_quantize.types import resolve

EIGHT_BASE = "Q8_0"
EIGHT = (
    NamedRecipe(
        "q8-value",
        "attention values in F16, for routed gate and up in Q6_K in every third layer",
        EIGHT_BASE,
        {
            "": EIGHT_BASE,
            "attention-value": "F16",
            "routed-gate-up": {"Q6_K": "every-third", EIGHT_BASE: "others"},
        },
    ),
    NamedRecipe(
        "q8-output",
        "the output in F16, for routed gate and up in Q6_K",
        EIGHT_BASE,
        {"": EIGHT_BASE, "output": "F16", "routed-gate-up": "Q6_K"},
    ),
    NamedRecipe(
        "q8-attention",
        "all of attention in F16, for every gate and up in Q6_K",
        EIGHT_BASE,
        {
            "": EIGHT_BASE,
            "attention": "F16",
            "dense-gate-up": "Q6_K",
            "shared-gate-up": "Q6_K",
            "routed-gate-up": "Q6_K",
        },
    ),
)
"""None is larger than Q8_0, on the 16B shape and on the reference."""


def measure_eight(bench: Bench) -> list[CandidateRow]:
    """Each candidate, with and without an importance matrix."""
    rows = []
    for imatrix in (False, True):
        market = market_of(bench, imatrix, Costs())
        base = _predicted(market, bench.plan_of(resolve(EIGHT_BASE), imatrix=imatrix))
        for recipe in EIGHT:
            digest = digest_of(recipe, imatrix=imatrix)
            variant = Variant(recipe.name, imatrix)
            plan = bench.plan_of(recipe, imatrix=imatrix)
            found = bench.measure(plan, variant, digest)
            say(f"  {variant}: KL {found.kl:.3g}")
            rows.append(
                CandidateRow(
                    recipe.name,
                    imatrix,
                    digest,
                    recipe.why,
                    size_of(LARGE, recipe).n_bytes / size_of(LARGE, EIGHT_BASE).n_bytes,
                    _predicted(market, plan) / base,
                    found.file_size,
                    found.windows,
                )
            )
    return rows


def _predicted(market: Market, plan: Plan) -> float:
    return market.figures(change.choice for change in plan.changes).error
