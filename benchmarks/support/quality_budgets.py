"""What the solver makes of budgets for a model, and from which costs of errors: of the part `reference` of
benchmarks/quality.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.support.quality_fidelity import Bench, told
from benchmarks.support.quality_rows import FidelityRow, TargetRow
from benchmarks.support.quality_types import BASE, Variant
from benchmarks.support.runner import say
from benchmarks.support.sizes import types_digest
from dsmoe_local.base.errors import UsageError
from dsmoe_local.model.ggml import type_name
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize import sensitivity_file
from dsmoe_quantize.budget import Budget, Market
from dsmoe_quantize.choose import Wishes
from dsmoe_quantize.quantize import Plan
from dsmoe_quantize.sensitivity import measure
from dsmoe_quantize.target import Request, solve_target

FRONTIER = (4.4, 4.6, 4.8, 5.0, 5.25, 5.5, 6.0, 6.5)
"""Bits per weight that the solver is asked for."""
TARGETS = (0.9, 1.0, 1.1, 1.4)
"""Sizes that it is asked for, as shares of the base's file."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What errors cost, by group, where that was measured, and in words where it is from."""

    weights: Mapping[str, float] = field(default_factory=dict)
    told: str = "built in"


def costs_from(path: Path | None, source: Path) -> Costs:
    """Those that a sensitivity file has of the model, or the built-in ones without a file. With which
    importance matrix they were measured does not matter: what an error costs is not what it is.

    UsageError if the file is of another model, or has no costs; FileError, FormatError.
    """
    if path is None:
        return Costs()
    found = sensitivity_file.read_sensitivity(path)
    start = sensitivity_file.start(read_model(source)[0], None, None)
    sensitivity_file.resume(path, replace(start, imatrix=found.imatrix), any_sample=True)
    if not found.weights:
        raise UsageError("it has no costs", where=path, remedy="dsmoe eval --sensitivity measures them")
    probes = found.probes
    if probes is None:
        return Costs(found.weights, "written by hand")
    types = ", ".join(map(type_name, probes.types))
    text = f"{probes.n_windows} windows of {probes.n_context} tokens of {probes.text}"
    return Costs(found.weights, f"measured with {types} on {text}")


def measure_frontier(bench: Bench, targets: Sequence[float], costs: Costs) -> list[FidelityRow]:
    """What the solver makes of so many bits per weight, with and without an importance matrix."""
    rows = []
    for imatrix in (False, True):
        for bits in targets:
            variant = Variant(f"{bits:g} bpw", imatrix)
            plan = solved(bench, Budget(bits_per_weight=bits), variant, costs)
            digest = types_digest([change.choice for change in plan.changes])
            rows.append(bench.measure(plan, variant, digest))
            say(f"  {variant}: {told(rows[-1])}")
    return rows


def measure_targets(bench: Bench, shares: Sequence[float], costs: Costs) -> list[TargetRow]:
    """Sizes of files that were to be of a size."""
    base = bench.plan(Variant(BASE, False)).file_size
    found = []
    for share in shares:
        budget = int(share * base)
        plan = solved(bench, Budget(size=budget), Variant(f"{share:g}", False), costs)
        found.append(TargetRow(budget, bench.size_of(plan)))
    return found


def market_of(bench: Bench, imatrix: bool, costs: Costs) -> Market:
    """What types cost the model, without a budget."""
    file, hp = read_model(bench.source)
    matrix = bench.matrix_if(imatrix)
    start = replace(sensitivity_file.start(file, matrix, None), weights=costs.weights)
    return Market(file, hp, measure(file, start, matrix, threads=bench.amount.threads), imatrix=matrix)


def solved(bench: Bench, budget: Budget, variant: Variant, costs: Costs) -> Plan:
    """The solver's best plan within a budget."""
    imatrix = bench.matrix_if(variant.imatrix)
    path = bench.folder / f"sensitivity-{variant.imatrix}.json"
    file, hp = read_model(bench.source)
    if not path.exists():
        start = sensitivity_file.start(file, imatrix, None)
        sensitivity_file.write_sensitivity(replace(start, weights=costs.weights), path)
    request = Request(budget, variant.word.replace(" ", "-"), sensitivity=path)
    return solve_target(file, hp, request, Wishes(), imatrix, threads=bench.amount.threads).solved.plan
