"""The benchmark of quality: its intervals, its bars, what it refuses, its tables and its chart."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.checkpoints import write_checkpoint
from support.quality_parts import points_part, reference_part, sizes_part, speed_part, steps_part

from benchmarks import quality
from benchmarks.make_checkpoint import make_pool
from benchmarks.support import quality_fidelity, quality_speed
from benchmarks.support.quality_bars import (
    KL,
    PROMPT,
    Below,
    Verdict,
    control_of,
    ratio_of,
    speed_of,
    targets_hold,
    verdicts,
)
from benchmarks.support.quality_budgets import Costs, costs_from, measure_frontier, measure_targets
from benchmarks.support.quality_chart import chart, description
from benchmarks.support.quality_eight import EIGHT, EIGHT_BASE, measure_eight
from benchmarks.support.quality_fidelity import (
    Amount,
    Subject,
    exact_recorders,
    load,
    measure_types,
    prepared,
)
from benchmarks.support.quality_kept import changes
from benchmarks.support.quality_points import POINTS, measure_points
from benchmarks.support.quality_rows import SpeedRow, TargetRow, parse_part, part_of
from benchmarks.support.quality_speed import Pair, Timing, measure_speeds, time_pair, timed_variants
from benchmarks.support.quality_steps import STEPPED, measure_steps, steps_of
from benchmarks.support.quality_tables import all_tables, spread, summary_table
from benchmarks.support.quality_types import BASE, LARGE, OURS, Variant, digest_of
from benchmarks.support.random_models import with_layers, write_random
from benchmarks.support.reference_shape import HP
from benchmarks.support.runner import Bar
from benchmarks.support.sizes import choices_of, size_of, types_digest
from benchmarks.support.tables import with_tables
from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.workload import Workload, workloads_of
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize import sensitivity_file
from dsmoe_quantize.groups import KINDS
from dsmoe_quantize.named_recipes import RECIPES
from dsmoe_quantize.recipes import recipe_for
from dsmoe_quantize.sensitivity import Probes, Sensitivity

RANDOM = np.random.default_rng(0)


def test_the_interval_is_of_pairs() -> None:
    """Guards: both sides drawn by themselves, so that texts that differ hide what does not."""
    theirs = RANDOM.lognormal(0, 1, 200)
    ratio, (low, high) = ratio_of((0.8 * theirs).tolist(), theirs.tolist())
    assert (ratio, low, high) == pytest.approx((0.8, 0.8, 0.8))


def test_the_interval_is_that_of_theory() -> None:
    """Guards: quantiles of something else than the ratio, or of too few draws: against the delta method."""
    theirs = RANDOM.normal(1, 0.3, 400)
    ours = 0.9 * theirs + RANDOM.normal(0, 0.1, 400)
    ratio, (low, high) = ratio_of(ours.tolist(), theirs.tolist())
    error = (ours - ratio * theirs).std(ddof=1) / np.sqrt(400) / theirs.mean()
    assert ratio == pytest.approx(ours.sum() / theirs.sum())
    assert (ratio - low, high - ratio) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)
    with pytest.raises(ValueError, match="no pairs"):
        ratio_of([1.0, 2.0], [1.0])


ISSUE = """
q4       | size                  | Q4_K_M | <= 0.95
q4       | bytes per token       | Q4_K_M | <= 1
q4       | prompt                | Q4_K_M | >= 1
q4       | decode                | Q4_K_M | >= 0.95
q4       | KL, same embedding and output | Q4_K_M | <= 0.78
q4       | size of the reference | Q4_K_M | <= 1
q4-fast  | size                  | Q4_K_M | <= 0.91
q4-fast  | bytes per token       | Q4_K_M | <= 1
q4-fast  | prompt                | Q4_K_M | >= 1.25
q4-fast  | decode                | Q4_K_M | >= 1.05
q4-fast  | KL, same embedding and output | Q4_K_M | <= 0.95
q4-fast  | size of the reference | Q4_K_M | <= 1
q4-small | size                  | Q4_K_M | <= 0.86
q4-small | bytes per token       | Q4_K_M | <= 0.95
q4-small | prompt                | Q4_K_M | >= 1.1
q4-small | decode                | Q4_K_M | >= 1.05
q4-small | KL, same embedding and output | IQ4_XS | < 1
q4-small | size of the reference | Q4_K_M | <= 1
q8       | size                  | Q8_0   | <= 1
q8       | KL, same embedding and output | Q8_0   | < 1
"""


def test_bars_are_the_issues() -> None:
    """Guards: a bar that is another than what was set, or on the other side; one that is held against another
    type, or is not told of at all.
    """
    parts = {"sizes": sizes_part({}), "speed": speed_part(), "reference": reference_part()}
    wanted = sorted(tuple(cell.strip() for cell in line.split("|")) for line in ISSUE.split("\n") if line)
    for imatrix in (False, True):
        found = [each for each in verdicts(parts) if each.imatrix is imatrix]
        assert sorted((each.recipe, each.measure, each.against, str(each.bar)) for each in found) == wanted


def test_ratios_are_of_the_same_kind_of_file() -> None:
    """Guards: a ratio of other figures, of a file with a matrix to one without; a bar held against the
    interval.
    """
    sizes = sizes_part({"q4": 0.96, "q4-fast": 0.91, "q4-small": 0.86})
    reference = reference_part()
    found = {
        (each.recipe, each.imatrix, each.measure, each.against): each
        for each in verdicts({"sizes": sizes, "speed": speed_part(1.2), "reference": reference})
    }
    assert found["q4", False, "size", BASE].holds is False
    assert found["q4-fast", True, "size", BASE].holds is True
    assert found["q4-small", False, "size", BASE].holds is True
    # The median of the rounds' own ratios.
    assert found["q4", False, "prompt", BASE].ratio == pytest.approx(1.2)
    assert found["q4-fast", False, "prompt", BASE].holds is False
    assert found["q4", True, "decode", BASE].holds is True
    assert found["q4-fast", True, "decode", BASE].holds is False
    # Of files with the same embedding and output.
    divergence = found["q4", True, KL, BASE]
    assert divergence.ratio == pytest.approx(reference.row(Variant("q4", True)).kl / 0.01)
    assert divergence.interval == pytest.approx((divergence.ratio, divergence.ratio))


def test_what_the_control_is_off_is_no_difference() -> None:
    """Guards: a gain claimed that two files of the same types show as well; a bar called met for certain by
    the same.
    """
    # The control is between 0.9 and 1.05 of itself.
    for ratio, is_difference in ((1.07, False), (0.91, False), (1.13, True), (0.88, True)):
        part = speed_part(ratio)
        rows = [
            row if row.type == BASE else replace(row, prompt_ratio=[ratio - 0.01, ratio, ratio + 0.01])
            for row in part.rows
        ]
        part = replace(part, rows=rows)
        found = {each.recipe: each for each in verdicts({"speed": part}) if each.measure == PROMPT}
        verdict = found["q4"]
        assert verdict.is_difference is is_difference
        assert verdict.interval == pytest.approx(((ratio - 0.01) * 0.9, (ratio + 0.01) / 0.9))
        # The bar is 1.
        assert verdict.is_uncertain == (ratio not in (1.13, 0.88))
        told = spread([ratio], control_of(part, PROMPT))
        assert told == f"{ratio:.3f} x" + ("" if is_difference else ", no difference")
    summary = summary_table(
        {"sizes": sizes_part({"q4": 0.9}), "speed": speed_part(1.1), "reference": reference_part()}
    )
    line = next(line for line in summary.splitlines() if "`q4`" in line)
    assert line.startswith("| **`q4`** | 0.90 x | 0.90 x | no difference | no difference |")


def test_as_good_is_not_better() -> None:
    """Guards: "below IQ4_XS's" met by the same divergence; another name of a type called better than it."""
    part = reference_part()
    theirs = part.alike_row(Variant("q4-small", False), "IQ4_XS")
    assert theirs is not None
    rows = [
        replace(row, windows=theirs.windows) if (row.type, row.imatrix) == ("q4-small", False) else row
        for row in part.rows
    ]
    found = {
        (each.recipe, each.imatrix, each.measure): each
        for each in verdicts({"reference": replace(part, rows=rows), "sizes": sizes_part({})})
    }
    assert found["q4-small", False, KL].ratio == 1
    assert found["q4-small", False, KL].holds is False
    assert found["q4-fast", False, "size of the reference"].bar == Bar(1, at_most=True)
    for measure in (KL, "size"):
        assert found["q8", True, measure].holds is None
        assert found["q8", True, measure].as_json()["holds"] is None
    assert Verdict("q4", False, KL, "Q4_0", 0.999, Below(1)).holds is True


@pytest.mark.parametrize(("size", "holds"), [(1000, True), (990, True), (989, False), (1001, False)])
def test_a_target_is_used_to_a_hundredth(size: int, holds: bool) -> None:
    """Guards: a budget that was exceeded, or hardly used, called met."""
    part = replace(reference_part(), targets=[TargetRow(1000, size)])
    assert [each for _, each in targets_hold(part)] == [holds]


def test_each_kind_of_file_is_timed_once() -> None:
    """Guards: minutes spent on a stock type by another name; a recipe whose speed is not found."""
    timed = list(timed_variants())
    assert len({each.digest for each in timed}) == len(timed)
    rows = [SpeedRow(each.word, False, each.digest, 1e8, [1.0], [1.0], [1.0], [1.0]) for each in timed]
    part = part_of("speed", {}, rows)
    assert all(speed_of(part, Variant(word, False)) is not None for word in ("q8", "q4", "q4-small", BASE))


def test_speed_is_beside_the_bytes_of_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a speed of few layers beside the bytes per token of the whole shape; rounds mixed up."""
    numbers = iter(range(1, 1000))
    monkeypatch.setattr(quality_speed, "model_file", lambda _, __, word: Path(word))
    beside = set()

    def time_pair(path: Path, base: Path, *_: object, base_first: bool) -> Pair:
        beside.add((base, base_first))
        number = next(numbers)
        return Pair([number, 2 * number], [3 * number, 4 * number])

    monkeypatch.setattr(quality_speed, "time_pair", time_pair)
    timing = Timing(3, 16, 4, 2, 1, 1)
    rows = measure_speeds(timing)
    rounds = [1, 2 * len(rows)]
    found = rows[0].prompt, rows[0].decode, rows[0].prompt_ratio, rows[0].decode_ratio
    assert found == tuple([factor * number for number in rounds] for factor in (1, 2, 3, 4))
    assert beside == {(Path(BASE), False), (Path(BASE), True)}
    few = with_layers(LARGE, 3)
    for row in rows:
        assert row.n_bytes_per_token == size_of(few, row.type).n_bytes_per_token
    assert timing.settings()["layers"] == 3


@pytest.mark.parametrize("base_first", [False, True])
def test_a_pair_is_timed_in_turn(base_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a ratio upside down, or of times that are far apart; a warm-up that counts; one side always
    first.
    """
    timed: list[tuple[str, str]] = []
    seconds = {
        "mine": iter([90.0, 1.0, 2.0, 8.0, 90.0, *[4.0] * 9]),
        "base": iter([90.0, 2.0, 4.0, 2.0, 90.0, *[2.0, 4.0, 8.0] * 3]),
    }

    class Fake:
        def __init__(self, engine: str) -> None:
            self.name = engine

        def time(self, workload: Workload) -> float:
            timed.append((self.name, workload.label))
            return next(seconds[self.name])

    loaded = []

    def load(options: ModelOptions) -> nullcontext[str]:
        loaded.append(options.path.name)
        return nullcontext(options.path.name)

    monkeypatch.setattr(quality_speed, "Timer", Fake)
    monkeypatch.setattr(quality_speed, "EngineClient", SimpleNamespace(load=load))
    pair = time_pair(Path("mine"), Path("base"), workloads_of([8], [16]), 3, 1, base_first=base_first)
    assert loaded == (["base", "mine"] if base_first else ["mine", "base"])
    assert pair.rates == [8 / 2, 16 / 4]
    assert pair.ratios == [2 / 1, 4 / 4]
    assert [label for _, label in timed] == ["pp8"] * 8 + ["tg16"] * 20
    assert [name for name, _ in timed[2:8]] == ["base", "mine", "mine", "base", "base", "mine"]


def test_tables_are_of_the_figures() -> None:
    """Guards: columns that are mixed up; lines of another length; a document that keeps old figures."""
    parts = {
        "reference": replace(reference_part(), oldest="yesterday, commit abc"),
        "sizes": sizes_part({"q4": 0.9}),
        "steps": steps_part(),
        "speed": speed_part(),
        "points": points_part(),
        "demo": replace(reference_part(), name="demo"),
    }
    tables = all_tables(parts)
    for table in tables.values():
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| **`q4`** | 0.900 | 4.50 | 0.900 x | 0.090 | 0.900 x |" in tables["sizes"]
    first = parts["reference"].rows[0]
    assert f"| `Q8_0` | without | {first.file_size / 1e6:.2f} | 4.40 |" in tables["reference"]
    assert "| 1,000 | 995 | 99.50% | met |" in tables["targets"]
    assert "| embedding in `Q8_0` | 0.950 x | 0.990 x | 0.300 x |" in tables["steps"]
    ours = parts["reference"].row(Variant("q4-fast", False))
    assert f"| **`q4-fast`** | without | `Q4_K_M` | {ours.bits_per_weight / 5:.3f} x |" in tables["alike"]
    assert "| **`q4-small`** | without | `IQ4_XS` | " in tables["alike"]
    base = parts["reference"].row(Variant("Q8_0", True))
    assert (
        f"| {EIGHT[0].why} | with | 0.900 x | {4_312_000 / base.file_size:.3f} x | 100.0000 |" in tables["q8"]
    )
    assert tables["q8"].splitlines()[2].endswith("| 1.50 x |")
    assert (
        f"| {POINTS[0].why} | 0.950 x | 0.990 x | 20.000 x | 1.250 x (1.000 – 1.500)"
        " | 1.000 x (0.900 – 1.100), no difference |" in tables["points"]
    )
    ours = parts["reference"].row(Variant("q4", False)).kl / 0.01
    assert f"| **`q4`** | 0.900 x | 0.900 x | {ours:.3f} x | 1.200 x (1.080 – 5.000) | " in tables["points"]
    assert "| 1.200 | 0.972 – 5.556 | >= 1.25 | **MISSED**, uncertain |" in tables["bars"]
    assert "| 1.200 | 0.972 – 5.556 | >= 1 | met, uncertain |" in tables["bars"]
    assert "`Q4_K_M`, the control | 20.0 | 1.000 x (0.900 – 1.050), no difference |" in tables["speed"]
    for line in (
        "| reference | measured | ",
        "|  | the oldest rows | yesterday, commit abc |",
        "|  | training | 30 minutes, seed 0: 1,234 steps, 2.5M tokens, 1.2 epochs |",
        "|  | unquantized perplexity | 25.5000 ± 0.5000 |",
        "|  | text | held-out.txt: 3 windows of 512 tokens, 765 tokens scored |",
        "|  | importance matrix | 100 windows of 512 tokens |",
        "|  | costs of errors, for the solver | built in |",
        "|  | processor | Some CPU, 2 threads, load before 0.1 |",
    ):
        assert line in tables["settings"]
    # The document has a place for each.
    assert with_tables(DOCUMENT, tables) != DOCUMENT
    text = "a\n<!-- table: sizes -->\nold\n<!-- end -->\nb\n"
    written = with_tables(text, {"sizes": "| new |"})
    assert written == "a\n<!-- table: sizes -->\n| new |\n<!-- end -->\nb\n"
    assert with_tables(written, {"sizes": "| new |"}) == written
    with pytest.raises(ValueError, match="no place for the table x"):
        with_tables(text, {"x": ""})


def test_figures_survive_their_file() -> None:
    """Guards: a figure that JSON changes."""
    for part in (reference_part(), speed_part(), steps_part(), sizes_part({}), points_part()):
        assert parse_part(json.loads(json.dumps(part.as_json()))) == part


@pytest.mark.parametrize("word", STEPPED)
def test_steps_change_one_kind_each(word: str) -> None:
    """Guards: a step that changes more than it says, nothing at all, or misses a kind of group."""
    recipe = RECIPES[word]
    before = recipe_for(recipe, LARGE.n_layers).types
    steps = list(steps_of(recipe))
    for step in steps:
        after = recipe_for(step.recipe, LARGE.n_layers).types
        assert [kind for kind in after if after[kind] != before[kind]] == [step.kind]
        assert set(after[step.kind].values()) == {GgmlType.__members__[step.word]}
        for hp in (LARGE, HP):  # whose widths may not take the type
            assert types_digest(choices_of(hp, step.recipe)) != types_digest(choices_of(hp, recipe))
    assert {step.kind for step in steps} == set(KINDS)


def test_points_are_other_choices() -> None:
    """Guards: a point that is a recipe of ours by another name, or another point."""
    digests = [Variant(word, False).digest for word in OURS]
    digests += [digest_of(recipe, imatrix=False) for recipe in POINTS]
    assert len(set(digests)) == len(digests)


def test_candidates_are_no_larger_than_what_they_replace() -> None:
    """Guards: a candidate that is better because it is larger, or that is nothing else."""
    for recipe in EIGHT:
        for hp in (LARGE, HP):
            assert size_of(hp, recipe).n_bytes <= size_of(hp, EIGHT_BASE).n_bytes
        assert "F16" in recipe.types.values()


def test_a_model_is_loaded_with_an_exact_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an error of the KV cache counted as one of the type, or as none of the unquantized model."""
    seen: list[ModelOptions] = []
    monkeypatch.setattr(EngineClient, "load", seen.append)
    load(Path("model.gguf"), Amount(1, 1, 1))
    assert [(each.cache_type_k, each.cache_type_v) for each in seen] == [("f32", "f32")]


def test_the_chart_shows_every_type() -> None:
    """Guards: a type that is missing, or marked where another one is; bits and divergences mixed up."""
    part = reference_part()
    rows = [replace(row, bits_per_weight=8.5) if row.type == "Q8_0" else row for row in part.rows]
    (axes,) = chart(replace(part, rows=rows)).axes
    shown = [row for row in rows if row.type != "Q8_0"]
    lines = [np.asarray(line.get_xydata()) for line in axes.lines]
    marks = {tuple(line[0]) for line in lines if len(line) == 1}
    assert marks >= {(row.bits_per_weight, row.kl) for row in shown}
    assert {text.get_text() for text in axes.texts} >= {row.type for row in shown}
    assert "Further right, without imatrix: Q8_0, 8.50 bits" in axes.get_xlabel()


def test_a_model_is_measured(tmp_path: Path) -> None:
    """Guards: a row of another file or of other windows; a matrix that is not used; a target exceeded."""
    folder = write_checkpoint(tmp_path / "checkpoint", form="single")
    text = built_in().content
    subject = Subject("tiny", folder, Text("a", text[:3000]), Text("b", text[3000:6000]))
    wanted = [Variant(word, imatrix) for imatrix in (False, True) for word in ("Q8_0", "Q4_0")]
    kept: list[int] = []
    with prepared(subject, Amount(3, 3, 1, n_context=64)) as bench:
        rows = measure_types(bench, wanted, None, lambda rows: kept.append(len(rows)))
        again = measure_types(
            bench, wanted, part_of("reference", bench.settings(), rows[:2]), lambda rows: None
        )
        frontier = measure_frontier(bench, [8.0], Costs())
        targets = measure_targets(bench, [1.0], Costs({"output": 3.0}))
        alike = quality_fidelity.measure_alike(bench)
        eight = measure_eight(bench)
        steps = measure_steps(bench, 1)
        rounds = {recipe.name: [Pair([9.0, 9.0], [1.5, 0.9])] for recipe in POINTS}
        points = measure_points(bench, rounds)
        # Measured on what dsmoe convert makes of the same folder.
        convert_folder(folder, tmp_path / "another.gguf", ConvertOptions("f32"))
        start = sensitivity_file.start(read_model(tmp_path / "another.gguf")[0], None, None)
        check_costs(start, tmp_path / "costs.json", bench.source)
    assert kept == [1, 2, 3, 4]
    assert again[:2] == rows[:2]
    # Windows are read side by side, and a router's narrow decision may fall the other way.
    for row, other in zip(again[2:], rows[2:], strict=True):
        assert row.windows == pytest.approx(other.windows, rel=0.5)
    found = {Variant(row.type, row.imatrix): row for row in rows}
    assert found[Variant("Q8_0", False)].kl < found[Variant("Q4_0", False)].kl
    assert found[Variant("Q4_0", True)].kl != found[Variant("Q4_0", False)].kl
    for row in (*rows, *frontier, *alike):
        assert len(row.windows) == 3
        assert np.mean(row.windows) == pytest.approx(row.kl, rel=1e-4)
        assert row.kl_upper == pytest.approx(row.kl, rel=1e-6)
    assert all(row.bits_per_weight <= 8 for row in frontier)
    assert all(row.file_size <= row.budget for row in targets)
    wanted_steps = [(word, "", "") for word in (BASE, *STEPPED)]
    for at, word in reversed(list(enumerate(STEPPED, start=2))):
        step = next(steps_of(RECIPES[word]))
        wanted_steps.insert(at, (word, step.kind, step.word))
    assert [(row.type, row.kind, row.word) for row in steps] == wanted_steps
    # So narrow a model has Q8_0 in place of Q6_K as well.
    assert len({tuple(row.windows) for row in steps[:3]}) == 3
    assert [(row.type, row.imatrix) for row in eight] == [
        (recipe.name, imatrix) for imatrix in (False, True) for recipe in EIGHT
    ]
    assert changes(part_of("reference", {}, [], eight=eight)) == []
    assert all(row.predicted_ratio > 0 for row in eight)
    # Only every third layer pays, and the model has two.
    assert eight[0].predicted_ratio < 1
    assert [(row.type, row.prompt_ratio, row.decode_ratio) for row in points] == [
        (recipe.name, [1.5], [0.9]) for recipe in POINTS
    ]
    assert changes(part_of("points", {}, points)) == []
    assert changes(part_of("points", {}, [replace(points[0], digest="another")])) == [POINTS[0].name]


def test_predictions_are_kept_whole(tmp_path: Path) -> None:
    """Guards: divergences without the tail of a large vocabulary."""
    hp = replace(HP, n_vocab=5000)
    path = tmp_path / "model.gguf"
    write_random(path, hp, make_pool(0), "Q8_0")
    parameters = dict(exact_recorders(tmp_path, path)[0].parameters)
    assert (parameters["top"], parameters["mass"]) == (5000, 1.0)


def check_costs(start: Sensitivity, path: Path, source: Path) -> None:
    """Costs are taken from a file of the same model only, whatever importance matrix it was measured with."""
    with pytest.raises(FileError):
        costs_from(path, source)
    assert costs_from(None, source) == Costs({}, "built in")
    sensitivity_file.write_sensitivity(replace(start, weights={"output": 3.0}, imatrix="any"), path)
    assert costs_from(path, source) == Costs({"output": 3.0}, "written by hand")
    probes = Probes("some text", "digest", 512, 8, (GgmlType.Q4_0,), 0.0)
    sensitivity_file.write_sensitivity(replace(start, weights={"output": 3.0}, probes=probes), path)
    assert costs_from(path, source).told == "measured with Q4_0 on 8 windows of 512 tokens of some text"
    sensitivity_file.write_sensitivity(start, path)
    with pytest.raises(UsageError, match="no costs"):
        costs_from(path, source)
    sensitivity_file.write_sensitivity(replace(start, weights={"output": 3.0}, source="another"), path)
    with pytest.raises(UsageError, match="another model"):
        costs_from(path, source)


DOCUMENT = quality.DOCUMENT.read_text(encoding="utf-8")


def test_the_document_is_of_its_figures() -> None:
    """Guards: tables and a chart of other figures than those beside them; types that have changed since."""
    content = json.loads(quality.FIGURES.read_text(encoding="utf-8"))
    parts = {name: parse_part(part) for name, part in content.items()}
    assert with_tables(DOCUMENT, all_tables(parts)) == DOCUMENT
    for path in quality.SUMMARIZED:
        text = path.read_text(encoding="utf-8")
        assert with_tables(text, {quality.SUMMARY: summary_table(parts)}) == text
    assert escape(description(parts["reference"])) in quality.CHART.read_text(encoding="utf-8")
    assert {name: found for name, part in parts.items() if (found := changes(part))} == {}
