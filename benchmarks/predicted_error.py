"""Compare the divergence that `dsmoe-quantize --target-*` predicts for a type with the measured one.

    python -m benchmarks.train_reference                             once: the model that is measured
    python -m benchmarks.predicted_error --sensitivity costs.json    predict from measured costs of errors
    python -m benchmarks.predicted_error                             predict from the built-in costs

Measures on the calibration text, which `dsmoe eval --sensitivity` should have measured the costs on. Prints a
table, then one JSON line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.quality import reference_subject
from benchmarks.support import arguments
from benchmarks.support.quality.choices import Costs, costs_from, solved
from benchmarks.support.quality.fidelity import Amount, Bench, prepared
from benchmarks.support.quality.variants import Variant
from benchmarks.support.reference_shape import reference_folder
from benchmarks.support.runner import Row
from benchmarks.support.tables import report
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget import sensitivity_file
from dsmoe_quantize.budget.cost_model import Budget, CostModel
from dsmoe_quantize.budget.sensitivity import measure

TYPES = ("Q4_0", "Q4_K_S", "Q4_K_M", "IQ4_XS", "Q5_K_M", "q4")
BITS_PER_WEIGHT = (4.6, 5.2)


def compare(bench: Bench, costs: Costs) -> Iterator[Row]:
    """Compare the predicted with the measured divergence of each type."""
    file, hp = read_model(bench.source)
    start = replace(sensitivity_file.start(file, None, None), weights=costs.weights)
    model = CostModel(file, hp, measure(file, start, None, threads=bench.amount.threads))
    plans = {word: bench.plan(Variant(word, False)) for word in TYPES}
    for bits in BITS_PER_WEIGHT:
        variant = Variant(f"{bits:g} bpw", False)
        plans[variant.word] = solved(bench, Budget(bits_per_weight=bits), variant, costs)
    for word, plan in plans.items():
        found = bench.measure(plan, Variant(word, False))
        predicted = model.figures(plan.choices).error
        note = f"{found.bits_per_weight:.2f} bits per weight, ± {1e3 * found.kl_error:.2f}"
        ratio = predicted / found.kl
        yield Row(
            f"{word}, predicted", 1e3 * predicted, "measured", 1e3 * found.kl, ratio, "KL, 1e-3", note=note
        )


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__, reference=reference_folder(), sensitivity=Path, chunks=40, threads=physical_cores()
    )
    subject = reference_subject(given.reference)
    subject = replace(subject, text=subject.calibration)
    with prepared(subject, Amount(given.chunks, None, given.threads), imatrix=False) as bench:
        costs = costs_from(given.sensitivity, bench.source)
        rows = list(compare(bench, costs))
        settings = bench.settings() | {"costs": costs.told}
    report(f"Mean KL divergence, costs of errors: {costs.told}", rows, {"settings": settings})


if __name__ == "__main__":
    main()
