"""Compare the divergence that `dsmoe-quantize --target-*` predicts for a type with the measured one.

    python -m benchmarks.train_reference                             once: the model that is measured
    python -m benchmarks.predicted_error --sensitivity costs.json    predict from measured costs of errors
    python -m benchmarks.predicted_error                             predict from the built-in costs

Measures on the calibration text, which `dsmoe eval --sensitivity` should have measured the costs on. Prints a
table, then one JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.quality import reference_subject
from benchmarks.support import arguments
from benchmarks.support.quality.choices import Costs, costs_from, solved
from benchmarks.support.quality.fidelity import Amount, Bench, prepared
from benchmarks.support.quality.figures import FidelityRow
from benchmarks.support.quality.variants import Variant
from benchmarks.support.reference_shape import reference_folder
from benchmarks.support.tables import show
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget import sensitivity_file
from dsmoe_quantize.budget.cost_model import Budget, CostModel
from dsmoe_quantize.budget.sensitivity import measure

TYPES = ("Q4_0", "Q4_K_S", "Q4_K_M", "IQ4_XS", "Q5_K_M", "q4")
BITS_PER_WEIGHT = (4.6, 5.2)


def rows(bench: Bench, costs: Costs) -> Iterator[tuple[FidelityRow, float]]:
    """Yield each type as measured, and the divergence predicted for it."""
    file, hp = read_model(bench.source)
    start = replace(sensitivity_file.start(file, None, None), weights=costs.weights)
    model = CostModel(file, hp, measure(file, start, None, threads=bench.amount.threads))
    variants = [Variant(word, False) for word in TYPES]
    plans = [(variant, bench.plan(variant)) for variant in variants]
    for bits in BITS_PER_WEIGHT:
        variant = Variant(f"{bits:g} bpw", False)
        plans.append((variant, solved(bench, Budget(bits_per_weight=bits), variant, costs)))
    for variant, plan in plans:
        yield bench.measure(plan, variant, ""), model.figures(plan.choices).error


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__, reference=reference_folder(), sensitivity=Path, chunks=40, threads=physical_cores()
    )
    subject = reference_subject(given.reference)
    subject = replace(subject, text=subject.calibration)
    with prepared(subject, Amount(given.chunks, None, given.threads), imatrix=False) as bench:
        costs = costs_from(given.sensitivity, bench.source)
        found = list(rows(bench, costs))
        settings = bench.settings()
    lines = [
        (
            row.type,
            f"{row.bits_per_weight:.2f}",
            f"{1e3 * predicted:.2f}",
            f"{1e3 * row.kl:.2f} ± {1e3 * row.kl_error:.2f}",
            f"{predicted / row.kl:.2f}",
        )
        for row, predicted in found
    ]
    heads = ("type", "bits per weight", "predicted, 1e-3", "measured, 1e-3", "ratio")
    show("Mean KL divergence, nats", heads, "lrrrr", lines)
    # Spearman's: 1 if the types are predicted in the right order.
    measured = np.argsort(np.argsort([row.kl for row, _ in found]))
    predicted = np.argsort(np.argsort([error for _, error in found]))
    result = {
        "benchmark": "predicted_error",
        "settings": settings | {"costs": costs.told},
        "rank_correlation": round(float(np.corrcoef(measured, predicted)[0, 1]), 4),
        "rows": [{"type": row.type, "predicted": error, "measured": row.kl} for row, error in found],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
