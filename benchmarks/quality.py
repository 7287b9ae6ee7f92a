"""How good and how fast is each type compared with Q4_K_M? Sizes, speeds, and divergences.

    python -m benchmarks.train_reference                    once, half an hour: the model that is measured
    python -m benchmarks.train_reference --architecture deepseek2       once more, for the part latent
    python -m benchmarks.quality                            measure everything, update docs
    python -m benchmarks.quality --parts reference,sizes    measure some parts; the others stay as they are
    python -m benchmarks.quality --parts none               measure nothing: make tables and chart again
    python -m benchmarks.quality --quick                    does it run? the figures mean nothing

Parts: `reference`, the trained model, and what the solver makes of budgets for it; `calibrated`, that model
rounded on a calibration text; `latent`, a model trained in the same way with the attention of DeepSeek-V2;
`demo`, the model of `dsmoe demo`; `sizes` of the whole 16B shape; `speed` on the 16B shape with a few layers
and random weights.
docs/quality.json holds the figures of all parts. A part replaces its own figures there as soon as it is
measured. The tables of the document, the summaries and the chart are then made from them.

Prints the tables and one JSON line. Exit status 1 if the parts do not belong together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.support import arguments
from benchmarks.support.quality.bars import targets_hold, verdicts
from benchmarks.support.quality.chart import save_chart
from benchmarks.support.quality.choices import (
    FRONTIER,
    TARGETS,
    costs_from,
    measure_alike,
    measure_calibrated,
    measure_frontier,
    measure_sizes,
    measure_targets,
    measure_types,
)
from benchmarks.support.quality.fidelity import Amount, Bench, Subject, prepared
from benchmarks.support.quality.figures import (
    PARTS,
    ROOT,
    FidelityRow,
    Figures,
    Part,
    Reference,
    SizeRow,
    SpeedRow,
    now_and_commit,
    outdated,
    read_figures,
    write_figures,
)
from benchmarks.support.quality.speed import Timing, machine_facts, measure_speeds
from benchmarks.support.quality.tables import all_tables, summary_table
from benchmarks.support.quality.variants import LARGE
from benchmarks.support.reference_shape import CALIBRATION, HELD_OUT, LATENT, TRAINING, reference_folder
from benchmarks.support.runner import say
from benchmarks.support.tables import with_tables
from dsmoe_convert.demo.build import BuildOptions, build_demo
from dsmoe_convert.demo.calibration import N_ACTIVE
from dsmoe_local.base.paths import demo_folder
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.evaluate.text import Text, read_text
from tools.calibrate_demo import corpus

DOCUMENT, CHART = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality.svg"
SUMMARY = "recipes"
SUMMARIZED = ROOT / "README.md", ROOT / "docs" / "quantization.md"
NONE = "none"

_WINDOWS = {"reference": (60, 100), "calibrated": (60, 100), "latent": (60, 100), "demo": (12, 40)}
"""Windows of text that are measured, and windows for the importance matrix."""
_QUICK_WINDOWS = 2


def reference_subject(folder: Path, name: str = "reference") -> Subject:
    """Return a trained reference."""
    if not (folder / HELD_OUT).is_file():
        raise SystemExit(f"{folder} is not there: run python -m benchmarks.train_reference")
    held_out, calibration = (read_text(str(folder / name)) for name in (HELD_OUT, CALIBRATION))
    training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    return Subject(name, folder, held_out, calibration, {"training": training})


def _amount(given: argparse.Namespace, name: str) -> Amount:
    windows = (_QUICK_WINDOWS, _QUICK_WINDOWS) if given.quick else _WINDOWS[name]
    return Amount(*windows, given.threads)


def measure_reference(given: argparse.Namespace) -> Reference:
    """Measure the trained reference."""
    subject = reference_subject(given.reference)
    bits, shares = (FRONTIER[:2], TARGETS[:1]) if given.quick else (FRONTIER, TARGETS)
    with prepared(subject, _amount(given, "reference")) as bench:
        costs = costs_from(given.sensitivity, bench.source)
        return Reference(
            **now_and_commit(),
            settings=bench.settings(),
            rows=measure_types(bench),
            frontier=measure_frontier(bench, bits, costs),
            targets=measure_targets(bench, shares, costs),
            alike=measure_alike(bench),
            facts={**bench.facts(), **subject.facts, "costs": costs.told},
        )


def measure_rounding(given: argparse.Namespace) -> Part[FidelityRow]:
    """Measure the trained reference with calibrated rounding."""
    subject = reference_subject(given.reference)
    return _measured(given, "calibrated", subject, lambda bench: measure_calibrated(bench, subject))


def measure_latent(given: argparse.Namespace) -> Part[FidelityRow]:
    """Measure the trained reference with MLA."""
    return _measured(given, "latent", reference_subject(given.latent, "latent"), measure_types)


def measure_demo(given: argparse.Namespace) -> Part[FidelityRow]:
    """Measure the demo, with the two halves of Python's help topics."""
    folder = build_demo(demo_folder(), BuildOptions(N_ACTIVE)).folder
    held_out, calibration = (
        Text(f"help topics, {half}", corpus.text(half)) for half in ("held out", "calibration")
    )
    return _measured(given, "demo", Subject("demo", folder, held_out, calibration), measure_types)


def _measured(
    given: argparse.Namespace,
    name: str,
    subject: Subject,
    measure: Callable[[Bench], list[FidelityRow]],
) -> Part[FidelityRow]:
    with prepared(subject, _amount(given, name)) as bench:
        rows, facts = measure(bench), {**bench.facts(), **subject.facts}
        return Part(**now_and_commit(), settings=bench.settings(), rows=rows, facts=facts)


def sizes_part(_: argparse.Namespace) -> Part[SizeRow]:
    """Count the bytes of the 16B shape."""
    return Part(**now_and_commit(), settings={"shape": LARGE.name}, rows=measure_sizes())


def measure_speed(given: argparse.Namespace) -> Part[SpeedRow]:
    """Time the types."""
    timing, facts = _timing(given), machine_facts()
    return Part(**now_and_commit(), settings=timing.settings(), rows=measure_speeds(timing), facts=facts)


def _timing(given: argparse.Namespace) -> Timing:
    if given.quick:
        return Timing(2, 16, 4, 1, 2, given.threads, quick=True)
    return Timing(given.layers, given.n_prompt, given.n_gen, given.rounds, given.turns, given.threads)


_MAKERS = {
    "reference": measure_reference,
    "calibrated": measure_rounding,
    "latent": measure_latent,
    "demo": measure_demo,
    "sizes": sizes_part,
    "speed": measure_speed,
}


def save(figures: Figures) -> None:
    """Write the document's tables, the summary where it is shown, and the chart."""
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), all_tables(figures)), "utf-8")
    summary = {SUMMARY: summary_table(figures)}
    for path in SUMMARIZED:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), summary), encoding="utf-8")
    save_chart(figures, CHART)


def report(figures: Figures) -> None:
    """Print the tables and a line of JSON."""
    for name, table in all_tables(figures).items():
        print(f"{name}\n\n{table}\n")
    found = {
        "bars": [verdict.as_json() for verdict in verdicts(figures)],
        "targets": [
            {"used": round(share, 5), "holds": holds} for share, holds in targets_hold(figures.reference)
        ],
    }
    print(json.dumps(found))


def main() -> int:
    """Measure the parts that are asked for, print everything, and save it."""
    given = arguments.parse(
        __doc__,
        parts=PARTS,
        reference=reference_folder(),
        latent=reference_folder(architecture=LATENT.architecture),
        sensitivity=Path,
        layers=10,
        rounds=3,
        turns=2,
        n_prompt=512,
        n_gen=48,
        threads=physical_cores(),
        quick=False,
    )
    makers = {name: _MAKERS[name] for name in given.parts if name != NONE}
    figures = read_figures()
    for name, make in makers.items():
        say(f"{name}:")
        figures = msgspec.structs.replace(figures, **{name: make(given)})
        if not given.quick:
            write_figures(figures)
    report(figures)
    if given.quick:
        return 0
    save(figures)
    problems = list(outdated(figures))
    for problem in problems:
        say(f"measure again: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
