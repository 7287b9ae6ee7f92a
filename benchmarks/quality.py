"""How good and how fast is each type, against Q4_K_M? Sizes, speeds, and divergences from unquantized models.

    python -m benchmarks.train_reference                    once, half an hour: the model that is measured
    python -m benchmarks.quality                            everything, then all tables and bars
    python -m benchmarks.quality --parts reference,sizes    some parts; the others as they were kept
    python -m benchmarks.quality --parts none --save        none anew; write the tables and the chart to docs
    python -m benchmarks.quality --published --save         tables and chart from docs/quality.json
    python -m benchmarks.quality --quick                    does it run? the figures mean nothing

Parts: `reference`, the trained model, and what the solver makes of budgets for it; `steps`, what another type
for one kind of group would change in a recipe; `demo`, the model of `dsmoe demo`; `sizes` of the whole 16B
shape; `speed` on the 16B shape with a few layers and random weights; `points`, other choices, by all of them.
Parts are kept in the cache folder as JSON, and so is the row of each file that was compared: it is not
measured again for the same model, text and types (`--again` does). A part that is incomplete, of types that
have changed since, of another version of llama.cpp, or of another model than the others is refused.

The tables, what missed its bar, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.support.quality_bars import targets_hold, verdicts
from benchmarks.support.quality_chart import save_chart
from benchmarks.support.quality_fidelity import Amount, Kept, Subject, prepared
from benchmarks.support.quality_figures import (
    PARTS,
    ROOT,
    Part,
    folder_of,
    kept_parts,
    parse_part,
    part_of,
    save_part,
)
from benchmarks.support.quality_measure import (
    FRONTIER,
    TARGETS,
    costs_from,
    measure_alike,
    measure_eight,
    measure_frontier,
    measure_points,
    measure_sizes,
    measure_steps,
    measure_targets,
    measure_types,
)
from benchmarks.support.quality_recipes import LARGE, POINTS, variants
from benchmarks.support.quality_speed import Timing, measure_speeds, time_beside_base
from benchmarks.support.quality_tables import all_tables, summary_table
from benchmarks.support.reference_shape import CALIBRATION, HELD_OUT, TRAINING, reference_folder
from benchmarks.support.runner import say
from benchmarks.support.tables import with_tables
from dsmoe_convert.demo import corpus
from dsmoe_convert.demo.build import BuildOptions, build_demo
from dsmoe_convert.demo.calibration import N_ACTIVE
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.paths import demo_folder
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.evaluate.text import Text, read_text

DOCUMENT, CHART, FIGURES = (ROOT / "docs" / name for name in ("quality.md", "quality.svg", "quality.json"))
SUMMARY = "recipes"
SUMMARIZED = ROOT / "README.md", ROOT / "docs" / "quantization.md"
NONE = "none"

_WINDOWS = {"reference": 60, "demo": 12}
_CALIBRATION_WINDOWS = {"reference": 100, "demo": 40}
_QUICK_WINDOWS, _QUICK_STEPS = 2, 2


def _of_parts(amounts: Mapping[str, int]) -> str:
    return ", ".join(f"{part} {amount}" for part, amount in amounts.items())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), metavar="P,P|none", help=f"[{','.join(PARTS)}]")
    parser.add_argument("--again", action="store_true", help="measure also what has not changed")
    parser.add_argument("--published", action="store_true", help="nothing anew; the figures in docs")
    parser.add_argument("--save", action="store_true", help="write tables, chart and figures to docs")
    parser.add_argument(
        "--reference", type=Path, default=reference_folder(), metavar="DIR", help="the trained model [cache]"
    )
    parser.add_argument(
        "--sensitivity", type=Path, metavar="FILE", help="take what errors cost from a sensitivity file"
    )
    parser.add_argument("--windows", type=int, metavar="N", help=f"of text [{_of_parts(_WINDOWS)}]")
    parser.add_argument("--layers", type=int, default=10, metavar="N", help="of the shape for speeds [10]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of speeds [3]")
    parser.add_argument("--turns", type=int, default=2, metavar="N", help="in each round, for prompts [2]")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="tokens [512]")
    parser.add_argument("-n", "--n-gen", type=int, default=48, metavar="N", help="tokens [48]")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N")
    parser.add_argument("--quick", action="store_true", help="little of everything; kept apart")
    given = parser.parse_args()
    given.parts = [] if given.published or given.parts == NONE else given.parts.split(",")
    if min(given.rounds, given.turns) < 1:
        parser.error("--rounds and --turns are 1 at least")
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"--parts: {min(unknown)} is none of {', '.join(PARTS)}")
    if given.quick and given.save:
        parser.error("--save: the figures of --quick mean nothing")
    if given.sensitivity and "reference" not in given.parts:
        parser.error("--sensitivity: only the part reference goes by it")
    return given


def reference_subject(folder: Path) -> Subject:
    """The trained reference."""
    if not (folder / HELD_OUT).is_file():
        raise SystemExit(f"{folder} is not there: run python -m benchmarks.train_reference")
    held_out, calibration = (read_text(str(folder / name)) for name in (HELD_OUT, CALIBRATION))
    training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    return Subject("reference", folder, held_out, calibration, {"training": training})


def demo_subject() -> Subject:
    """The demo, and the halves of the help topics."""
    folder = build_demo(demo_folder(), BuildOptions(N_ACTIVE)).folder
    held_out, calibration = (
        Text(f"help topics, {half}", corpus.text(half)) for half in ("held out", "calibration")
    )
    return Subject("demo", folder, held_out, calibration)


def measure_fidelity(given: argparse.Namespace, subject: Subject) -> Part:
    """The part of a model with real weights."""
    name = subject.name
    with prepared(subject, _amount(given, name), _kept(given)) as bench:
        costs = costs_from(given.sensitivity, bench.source) if name == "reference" else None
        rows = measure_types(bench, variants())
        facts = {**bench.facts(), **subject.facts}
        oldest = min(bench.kept.stamps, default="")
        part = part_of(name, bench.settings(), rows, facts=facts, oldest=oldest)
        if costs is None:
            return part
        bits, shares = (FRONTIER[:2], TARGETS[:1]) if given.quick else (FRONTIER, TARGETS)
        return replace(
            part,
            frontier=measure_frontier(bench, bits, costs),
            targets=measure_targets(bench, shares, costs),
            alike=measure_alike(bench),
            eight=measure_eight(bench),
            facts={**facts, "costs": costs.told},
        )


def _amount(given: argparse.Namespace, name: str) -> Amount:
    windows = given.windows or (_QUICK_WINDOWS if given.quick else _WINDOWS[name])
    return Amount(windows, _QUICK_WINDOWS if given.quick else _CALIBRATION_WINDOWS[name], given.threads)


def _kept(given: argparse.Namespace) -> Kept:
    return Kept(folder_of(quick=given.quick), given.again)


def measure_step_rows(given: argparse.Namespace) -> Part:
    """The part of single steps away from recipes, on the text that the costs of errors are measured on."""
    subject = reference_subject(given.reference)
    subject = replace(subject, text=subject.calibration)
    with prepared(subject, _amount(given, subject.name), _kept(given), imatrix=False) as bench:
        return part_of("steps", bench.settings(), measure_steps(bench, _QUICK_STEPS if given.quick else None))


def measure_speed(given: argparse.Namespace) -> Part:
    """The part of speeds."""
    timing = _timing(given)
    facts = timing.facts()
    return part_of("speed", timing.settings(), measure_speeds(timing), facts=facts)


def measure_other_points(given: argparse.Namespace) -> Part:
    """The part of other choices beside the recipes."""
    subject, timing = reference_subject(given.reference), _timing(given)
    facts = timing.facts()
    rounds = time_beside_base(timing, {recipe.name: recipe for recipe in POINTS})
    with prepared(subject, _amount(given, subject.name), _kept(given), imatrix=False) as bench:
        settings = {**timing.settings(), **bench.settings()}
        return part_of("points", settings, measure_points(bench, rounds), facts=facts)


def _timing(given: argparse.Namespace) -> Timing:
    if given.quick:
        return Timing(2, 16, 4, 1, 2, given.threads, quick=True)
    return Timing(given.layers, given.n_prompt, given.n_gen, given.rounds, given.turns, given.threads)


def published_parts() -> dict[str, Part]:
    """Those of the figures beside the document."""
    content = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {name: parse_part(part) for name, part in content.items()}


def save(parts: Mapping[str, Part], tables: Mapping[str, str]) -> None:
    """Write the document's tables, the summary where it is shown, the chart, and the figures of them all."""
    if missing := [name for name in PARTS if name not in parts]:
        raise SystemExit(f"nothing is saved: {', '.join(missing)} must be measured first")
    figures = {name: asdict(parts[name]) for name in PARTS}
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), tables), encoding="utf-8")
    summary = {SUMMARY: summary_table(parts)}
    for path in SUMMARIZED:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), summary), encoding="utf-8")
    save_chart(parts["reference"], CHART)
    FIGURES.write_text(json.dumps(figures, separators=(",", ":")) + "\n", encoding="utf-8")


def report(parts: Mapping[str, Part]) -> dict[str, str]:
    """Print the tables, what was missed, and a line of JSON. Returns the tables."""
    tables = all_tables(parts)
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    found = verdicts(parts)
    for verdict in found:
        if verdict.holds is False:
            with_imatrix = "with" if verdict.imatrix else "without"
            uncertain = ", uncertain" if verdict.is_uncertain else ""
            print(
                f"MISSED: {verdict.recipe} {with_imatrix} imatrix, {verdict.measure} against"
                f" {verdict.against}: {verdict.ratio:.3f}, bar {verdict.bar}{uncertain}"
            )
    targets = targets_hold(parts["reference"]) if "reference" in parts else ()
    for share, holds in targets:
        if not holds:
            print(f"MISSED: a target of a size is used to {share:.2%}")
    told = {
        "bars": [verdict.as_json() for verdict in found],
        "targets": [{"used": round(share, 5), "holds": holds} for share, holds in targets],
    }
    print(json.dumps(told))
    return tables


def main() -> int:
    """Measure what is asked for, join, print, save."""
    given = arguments()
    folder = folder_of(quick=given.quick)
    makers: Mapping[str, Callable[[], Part]] = {
        "reference": lambda: measure_fidelity(given, reference_subject(given.reference)),
        "steps": lambda: measure_step_rows(given),
        "demo": lambda: measure_fidelity(given, demo_subject()),
        "sizes": lambda: part_of("sizes", {"shape": LARGE.name}, measure_sizes()),
        "speed": lambda: measure_speed(given),
        "points": lambda: measure_other_points(given),
    }
    for name in given.parts:
        say(f"{name}:")
        try:
            save_part(makers[name](), folder)
        except DsmoeError as error:
            raise SystemExit(f"{name}: {error}") from error
    parts = published_parts() if given.published else kept_parts(folder)
    tables = report(parts)
    if given.save:
        save(parts, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
