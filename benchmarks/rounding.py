"""How much divergence does rounding that is calibrated on text save, at the same types and sizes?

    python -m benchmarks.train_reference                      once, half an hour: the model that is measured
    python -m benchmarks.rounding                             all types, GPTQ and learned rounding
    python -m benchmarks.rounding --seeds 3                   with three choices of calibration windows
    python -m benchmarks.rounding --text code.py              measure on text of another kind
    python -m benchmarks.rounding --reference DIR             another model: see benchmarks.train_reference
    python -m benchmarks.rounding --quick                     does it run? the figures mean nothing

Each file is compared with one that has the same types and was made with an importance matrix. Both are made
with as many tokens of the calibration text. Embedding and output are Q8_0 in all files: they are not
calibrated, and in a small model they would decide. Ratios are those of the mean KL divergence, with 95%
bootstrap intervals over windows. Prints a table, the bars that were missed, and one JSON line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from benchmarks.quality import reference_subject
from benchmarks.support import arguments
from benchmarks.support.quality.bars import at_most, ratio_of
from benchmarks.support.quality.calibrated import calibration_of, calibration_windows
from benchmarks.support.quality.fidelity import Amount, Bench, Subject, prepared
from benchmarks.support.quality.figures import FidelityRow, now_and_commit
from benchmarks.support.quality.variants import Variant
from benchmarks.support.reference_shape import reference_folder
from benchmarks.support.runner import Bar
from benchmarks.support.tables import show
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.evaluate.text import read_text
from dsmoe_local.model.ggml import GgmlType
from dsmoe_quantize.calibrated.calibration import Rounding
from dsmoe_quantize.policy.choice import Overrides
from dsmoe_quantize.policy.types import resolve

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
_QUICK_WINDOWS = 2
_SAME = Overrides(output=GgmlType.Q8_0, embedding=GgmlType.Q8_0)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibrated file compared with `base`, the file of the same types made with an importance matrix."""

    word: str
    rounding: Rounding
    seed: int
    row: FidelityRow
    base: FidelityRow
    seconds: float

    @property
    def ratio(self) -> tuple[float, tuple[float, float]]:
        """The ratio of the KL divergences, and its 95% interval."""
        return ratio_of(self.row.windows, self.base.windows)

    @property
    def bar(self) -> Bar | None:
        """The bar of the ratio, if there is one."""
        return BARS.get((self.word, self.rounding))

    def as_json(self) -> dict[str, Any]:
        """Return it for `json.dumps`."""
        ratio, interval = self.ratio
        return {
            "type": self.word,
            "rounding": self.rounding,
            "seed": self.seed,
            "ratio": ratio,
            "interval": interval,
            "bar": None if self.bar is None else str(self.bar),
            "holds": None if self.bar is None else self.bar.holds(ratio),
            "seconds": round(self.seconds, 1),
            "row": msgspec.to_builtins(self.row),
            "base": msgspec.to_builtins(self.base),
        }


def measure(
    bench: Bench, subject: Subject, types: Sequence[str], roundings: Sequence[Rounding], n_seeds: int
) -> Iterator[Calibrated]:
    """Measure each type with each way of rounding."""
    windows = calibration_windows(bench, subject)
    for word in types:
        plan = bench.plan_of(resolve(word), _SAME, imatrix=True)
        base = bench.measure(plan, Variant(word, True), "")
        for rounding in roundings:
            for seed in range(n_seeds):
                calibration = calibration_of(windows, subject, bench.amount.n_calibration, rounding, seed)
                started = time.monotonic()
                row = bench.measure(plan, Variant(f"{word}, {rounding}", False), "", calibration)
                yield Calibrated(word, rounding, seed, row, base, time.monotonic() - started)


def report(found: Sequence[Calibrated], record: Mapping[str, Any]) -> None:
    """Print the table, the bars that were missed, and a line of JSON."""
    heads = ("type", "rounding", "KL, 1e-3", "ratio", "95%", "perplexity", "same top", "same experts")
    lines = []
    for word in dict.fromkeys(each.word for each in found):
        of_type = [each for each in found if each.word == word]
        lines.append((word, "imatrix", *_cells(of_type[0].base, "", "")))
        for each in of_type:
            ratio, (low, high) = each.ratio
            label = f"{each.rounding}, seed {each.seed}"
            lines.append(("", label, *_cells(each.row, f"{ratio:.3f}", f"{low:.3f}-{high:.3f}")))
    show("Calibrated rounding against an importance matrix", heads, "llrrrrrr", lines)
    for each in found:
        ratio = each.ratio[0]
        if each.bar is not None and not each.bar.holds(ratio):
            print(f"MISSED: {each.word}, {each.rounding}, seed {each.seed}: {ratio:.3f}, bar {each.bar}")
    print(json.dumps({"benchmark": "rounding", **record, "rows": [each.as_json() for each in found]}))


def _cells(row: FidelityRow, ratio: str, interval: str) -> tuple[str, ...]:
    kl = f"{1e3 * row.kl:.3f} ± {1e3 * row.kl_error:.3f}"
    return (kl, ratio, interval, f"{row.perplexity:.4f}", f"{row.same_top:.2%}", f"{row.same_experts:.2%}")


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
    few = _QUICK_WINDOWS if given.quick else None
    amount = Amount(few or given.windows, few or given.calibration_windows, given.threads)
    with prepared(subject, amount) as bench:
        found = list(measure(bench, subject, given.types, given.roundings, given.seeds))
        report(found, {**now_and_commit(), "settings": bench.settings(), "facts": bench.facts()})


if __name__ == "__main__":
    main()
