"""How much divergence does rounding that is calibrated on text save, at the same types and sizes?

    python -m benchmarks.train_reference                      once, half an hour: the model that is measured
    python -m benchmarks.rounding                             all types, GPTQ and learned rounding
    python -m benchmarks.rounding --seeds 3                   with three choices of calibration windows
    python -m benchmarks.rounding --text code.py              measure on text of another kind
    python -m benchmarks.rounding --reference DIR             another model: see benchmarks.train_reference
    python -m benchmarks.rounding --quick                     does it run? the figures mean nothing

Each file is compared with one that has the same types and was made with an importance matrix. Both are made
with as many tokens of the calibration text. Embedding and output are Q8_0 in all files: they are not
calibrated, and in a small model they would decide. Ratios are those of the mean KL divergence. Their spread
is a 95% bootstrap interval over windows. Prints a table, then one JSON line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from benchmarks.quality import reference_subject
from benchmarks.support import arguments
from benchmarks.support.quality.bars import at_most, ratio_of
from benchmarks.support.quality.choices import SAME_ENDS, calibration_of, calibration_windows
from benchmarks.support.quality.fidelity import Amount, Bench, Subject, prepared
from benchmarks.support.quality.figures import FidelityRow, now_and_commit
from benchmarks.support.quality.variants import Variant
from benchmarks.support.reference_shape import reference_folder
from benchmarks.support.runner import Bar, Row
from benchmarks.support.tables import report
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.evaluate.text import read_text
from dsmoe_quantize.calibrated.calibration import Rounding

TYPES = ("IQ4_NL", "q4-fast", "q4", "Q3_K_M")
ROUNDINGS = (Rounding.GPTQ, Rounding.LEARNED)
BARS: Mapping[tuple[str, Rounding], Bar] = {
    ("IQ4_NL", Rounding.GPTQ): at_most(0.60),
    ("IQ4_NL", Rounding.LEARNED): at_most(0.50),
    ("q4-fast", Rounding.GPTQ): at_most(0.60),
    ("q4-fast", Rounding.LEARNED): at_most(0.50),
    ("q4", Rounding.GPTQ): at_most(0.65),
    ("q4", Rounding.LEARNED): at_most(0.55),
    ("Q3_K_M", Rounding.GPTQ): at_most(0.58),
    ("Q3_K_M", Rounding.LEARNED): at_most(0.45),
}
"""Ratios of the KL divergence to that of the file made with an importance matrix."""


def measure(
    bench: Bench, subject: Subject, types: Sequence[str], roundings: Sequence[Rounding], n_seeds: int
) -> Iterator[Row]:
    """Measure each type with each way of rounding."""
    windows = calibration_windows(bench, subject)
    for word in types:
        plan = bench.plan(Variant(word, True), SAME_ENDS)
        base = bench.measure(plan, Variant(word, True))
        for rounding in roundings:
            for seed in range(n_seeds):
                calibration = calibration_of(windows, subject, bench.amount.n_calibration, rounding, seed)
                found = bench.measure(plan, Variant(f"{word}, {rounding}", False), calibration=calibration)
                ratio, spread = ratio_of(found.windows, base.windows)
                yield Row(
                    f"{word}, {rounding}, seed {seed}",
                    1e3 * found.kl,
                    "imatrix",
                    1e3 * base.kl,
                    ratio,
                    "KL, 1e-3",
                    BARS.get((word, rounding)),
                    f"ratio {spread[0]:.3f} to {spread[1]:.3f}; {_told(found)}; imatrix: {_told(base)}",
                    spread=spread,
                )


def _told(row: FidelityRow) -> str:
    same = f"same top {row.same_top:.2%}, same experts {row.same_experts:.2%}"
    return f"perplexity {row.perplexity:.4f}, {same}"


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__,
        reference=reference_folder(),
        types=TYPES,
        roundings=ROUNDINGS,
        text=str,
        seeds=1,
        windows=60,
        calibration_windows=110,
        threads=physical_cores(),
        quick=False,
    )
    subject = reference_subject(given.reference)
    if given.text:
        subject = replace(subject, text=read_text(given.text))
    amount = Amount(given.windows, given.calibration_windows, given.threads)
    if given.quick:
        amount = replace(amount, n_windows=2, n_calibration=2)
    with prepared(subject, amount) as bench:
        rows = list(measure(bench, subject, given.types, given.roundings, given.seeds))
        record = {**now_and_commit(), "settings": bench.settings(), "facts": bench.facts()}
    report("Calibrated rounding against an importance matrix", rows, record)


if __name__ == "__main__":
    main()
