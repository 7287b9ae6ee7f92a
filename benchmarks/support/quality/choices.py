"""Files that benchmarks/quality.py measures: named types, choices of the solver, and calibrated files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.quality.fidelity import Bench, Subject, load
from benchmarks.support.quality.figures import FidelityRow, SizeRow, TargetRow
from benchmarks.support.quality.variants import ALIKE, BASE, CALIBRATED, LARGE, VARIANTS, Variant
from benchmarks.support.sizes import size_of, types_digest
from dsmoe_local.base.errors import UsageError
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget import sensitivity_file
from dsmoe_quantize.budget.cost_model import Budget
from dsmoe_quantize.budget.target import Request, solve_target
from dsmoe_quantize.calibrated.calibration import Calibration, Rounding
from dsmoe_quantize.policy.choice import Overrides
from dsmoe_quantize.quantize import Plan

FRONTIER = (4.4, 4.6, 4.8, 5.0, 5.25, 5.5, 6.0, 6.5)
"""Bits per weight that the solver is given."""
TARGETS = (0.9, 1.0, 1.1, 1.4)
"""File sizes that the solver is given, as shares of the base's file."""

SAME_ENDS = Overrides(output=GgmlType.Q8_0, embedding=GgmlType.Q8_0)


@dataclass(frozen=True, slots=True)
class Costs:
    """What errors cost, by group; empty for the built-in costs. `told` says where the costs are from."""

    weights: Mapping[str, float] = field(default_factory=dict)
    told: str = "built in"


def costs_from(path: Path | None, source: Path) -> Costs:
    """Read the costs of the model from a sensitivity file; the built-in costs without a file. They may have
    been measured with any importance matrix.

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
    types = ", ".join(kind.name for kind in probes.types)
    text = f"{probes.n_windows} windows of {probes.n_context} tokens of {probes.text}"
    return Costs(found.weights, f"measured with {types} on {text}")


def measure_sizes() -> list[SizeRow]:
    """Count the bytes of the whole 16B shape in each type."""
    rows = []
    for variant in VARIANTS:
        size = size_of(LARGE, variant.word, imatrix=variant.imatrix)
        figures = (size.n_bytes, size.bits_per_weight, size.n_bytes_per_token)
        rows.append(SizeRow(variant.word, variant.imatrix, variant.digest, *figures))
    return rows


def measure_types(bench: Bench, wanted: Iterable[Variant] = VARIANTS) -> list[FidelityRow]:
    """Measure each type."""
    return [bench.measure(bench.plan(variant), variant, variant.digest) for variant in wanted]


def measure_alike(bench: Bench) -> list[FidelityRow]:
    """Measure types with embedding and output in Q8_0.

    They are a larger share of a small model than of a large one, and would decide which type is better.
    """
    rows = []
    for imatrix in (False, True):
        for word in ALIKE:
            variant = Variant(word, imatrix)
            plan = bench.plan(variant, SAME_ENDS)
            rows.append(bench.measure(plan, variant, types_digest(plan.choices)))
    return rows


def calibration_windows(bench: Bench, subject: Subject) -> NDArray[np.int32]:
    """Return the token ids of the whole calibration text, one window in each row."""
    with load(bench.source, bench.amount) as engine:
        return np.array(cut_windows(engine, subject.calibration, bench.amount.n_context).tokens, np.int32)


def calibration_of(
    windows: NDArray[np.int32], subject: Subject, n_windows: int | None, rounding: Rounding, seed: int
) -> Calibration:
    """Return a calibration on windows that `seed` chooses."""
    chosen = np.random.default_rng(seed).permutation(len(windows))[:n_windows]
    text = subject.calibration
    return Calibration(windows[chosen], text.name, text.digest, rounding, seed)


def measure_calibrated(bench: Bench, subject: Subject) -> list[FidelityRow]:
    """Measure types rounded with GPTQ."""
    windows = calibration_windows(bench, subject)
    calibration = calibration_of(windows, subject, bench.amount.n_calibration, Rounding.GPTQ, 0)
    wanted = [Variant(word, True) for word in CALIBRATED]
    return [bench.measure(bench.plan(each), each, each.digest, calibration) for each in wanted]


def measure_frontier(bench: Bench, targets: Sequence[float], costs: Costs) -> list[FidelityRow]:
    """Measure what the solver chooses for so many bits per weight, with and without an importance matrix."""
    rows = []
    for imatrix in (False, True):
        for bits in targets:
            variant = Variant(f"{bits:g} bpw", imatrix)
            plan = solved(bench, Budget(bits_per_weight=bits), variant, costs)
            digest = types_digest(plan.choices)
            rows.append(bench.measure(plan, variant, digest))
    return rows


def measure_targets(bench: Bench, shares: Sequence[float], costs: Costs) -> list[TargetRow]:
    """Return the sizes of the files that the solver makes for sizes."""
    base = bench.plan(Variant(BASE, False)).file_size
    found = []
    for share in shares:
        budget = int(share * base)
        plan = solved(bench, Budget(size=budget), Variant(f"{share:g}", False), costs)
        found.append(TargetRow(budget, plan.file_size))
    return found


def solved(bench: Bench, budget: Budget, variant: Variant, costs: Costs) -> Plan:
    """Return the solver's plan for a budget."""
    imatrix = bench.matrix_if(variant.imatrix)
    path = bench.folder / f"sensitivity-{variant.imatrix}.json"
    file, hp = read_model(bench.source)
    if not path.exists():
        start = sensitivity_file.start(file, imatrix, None)
        sensitivity_file.write_sensitivity(replace(start, weights=costs.weights), path)
    request = Request(budget, variant.word.replace(" ", "-"), sensitivity=path)
    return solve_target(file, hp, request, Overrides(), imatrix, threads=bench.amount.threads).solved.plan
