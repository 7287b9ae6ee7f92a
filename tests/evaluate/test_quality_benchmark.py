"""The benchmark of quality: its ratios and bars, what it refuses, and the published tables. The parts in
these tests are the published ones, with figures replaced where a test needs others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.checkpoints import write_checkpoint

from benchmarks import quality
from benchmarks.make_checkpoint import make_pool
from benchmarks.support import quality_speed
from benchmarks.support.quality_bars import (
    DECODE,
    KL,
    PROMPT,
    SIZE,
    Verdict,
    ratio_of,
    targets_hold,
    verdicts,
)
from benchmarks.support.quality_chart import chart, description
from benchmarks.support.quality_fidelity import Amount, Kept, Subject, exact_recorders, load, prepared
from benchmarks.support.quality_figures import (
    AlikeRow,
    FidelityRow,
    Part,
    TargetRow,
    kept_parts,
    load_part,
    missing,
    part_of,
    save_part,
    stale,
)
from benchmarks.support.quality_measure import (
    Costs,
    costs_from,
    measure_alike,
    measure_eight,
    measure_frontier,
    measure_points,
    measure_steps,
    measure_targets,
    measure_types,
)
from benchmarks.support.quality_recipes import (
    ALIKE,
    BASE,
    EIGHT,
    EIGHT_BASE,
    LARGE,
    OURS,
    POINTS,
    STEPPED,
    Variant,
    digest_of,
    steps_of,
)
from benchmarks.support.quality_speed import Pair, Timing, measure_speeds, time_pair
from benchmarks.support.quality_tables import all_tables, spread, summary_table
from benchmarks.support.random_models import with_layers, write_random
from benchmarks.support.reference_shape import HP
from benchmarks.support.runner import compare
from benchmarks.support.sizes import choices_of, size_of, types_digest
from benchmarks.support.tables import with_tables
from dsmoe_convert.convert import ConvertOptions, convert_folder
from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import Workload
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget import sensitivity_file
from dsmoe_quantize.budget.sensitivity import Probes, Sensitivity
from dsmoe_quantize.policy.named_recipes import RECIPES
from dsmoe_quantize.policy.recipes import KINDS, recipe_for
from dsmoe_quantize.write import kernels

RANDOM = np.random.default_rng(0)
PARTS = quality.published_parts()


def found_of(parts: Mapping[str, Part], word: str, measure: str) -> Verdict:
    """The verdict on a recipe without an importance matrix."""
    (found,) = (
        each
        for each in verdicts(parts)
        if (each.recipe, each.measure, each.imatrix) == (word, measure, False)
    )
    return found


def changed(part: Part, word: str, **figures: Any) -> Part:
    """The part with other figures of a type, without an importance matrix and with one."""
    rows = tuple(replace(row, **figures) if row.type == word else row for row in part.rows)
    return replace(part, rows=rows)


def test_the_document_is_of_its_figures() -> None:
    """Guards: tables and a chart of other figures than those beside them; types that have changed since."""
    content = json.loads(quality.FIGURES.read_text(encoding="utf-8"))
    assert json.loads(json.dumps({name: asdict(part) for name, part in PARTS.items()})) == content
    document = quality.DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(document, all_tables(PARTS)) == document
    for path in quality.SUMMARIZED:
        text = path.read_text(encoding="utf-8")
        assert with_tables(text, {quality.SUMMARY: summary_table(PARTS)}) == text
    assert escape(description(PARTS["reference"])) in quality.CHART.read_text(encoding="utf-8")
    assert [name for part in PARTS.values() for name in stale(part)] == []
    with pytest.raises(ValueError, match="no place for the table x"):
        with_tables(document, {"x": ""})


def test_the_chart_shows_every_type() -> None:
    """Guards: a type that is missing, or marked where another one is; bits and divergences mixed up."""
    part = PARTS["reference"]
    (axes,) = chart(part).axes
    shown = [row for row in part.rows if row.type not in ("Q8_0", "Q6_K", "q8")]
    lines = [np.asarray(line.get_xydata()) for line in axes.lines]
    marks = {tuple(line[0]) for line in lines if len(line) == 1}
    assert marks >= {(row.bits_per_weight, row.kl) for row in shown}
    assert {text.get_text() for text in axes.texts} >= {row.type for row in shown}
    assert "Further right, without imatrix: Q8_0 and q8, 8.54 bits" in axes.get_xlabel()


def test_the_interval_is_that_of_theory() -> None:
    """Guards: both sides drawn by themselves, so that texts that differ hide what does not; quantiles of
    something else than the ratio, or of too few draws: against the delta method.
    """
    theirs = RANDOM.lognormal(0, 1, 200)
    ratio, (low, high) = ratio_of((0.8 * theirs).tolist(), theirs.tolist())
    assert (ratio, low, high) == pytest.approx((0.8, 0.8, 0.8))
    theirs = RANDOM.normal(1, 0.3, 400)
    ours = 0.9 * theirs + RANDOM.normal(0, 0.1, 400)
    ratio, (low, high) = ratio_of(ours.tolist(), theirs.tolist())
    error = (ours - ratio * theirs).std(ddof=1) / np.sqrt(400) / theirs.mean()
    assert ratio == pytest.approx(ours.sum() / theirs.sum())
    assert (ratio - low, high - ratio) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)
    with pytest.raises(ValueError, match="no pairs"):
        ratio_of([1.0, 2.0], [1.0])


def test_ratios_are_ours_by_the_bases() -> None:
    """Guards: a ratio upside down, or of other figures; a bar read the wrong way round."""
    sizes = changed(changed(PARTS["sizes"], BASE, n_bytes=1000), "q4-fast", n_bytes=920)
    assert found_of({"sizes": sizes}, "q4-fast", SIZE).ratio == 0.92
    assert found_of({"sizes": sizes}, "q4-fast", SIZE).holds is False
    speed = changed(PARTS["speed"], BASE, prompt_ratio=[1.0], decode_ratio=[1.0])
    speed = changed(speed, "q4-fast", prompt_ratio=[1.2, 1.3, 5.0], decode_ratio=[0.9, 1.0, 1.1])
    assert found_of({"speed": speed}, "q4-fast", PROMPT).ratio == 1.3  # the median of the rounds' own ratios
    assert found_of({"speed": speed}, "q4-fast", PROMPT).holds is True
    assert found_of({"speed": speed}, "q4-fast", DECODE).holds is False
    reference = PARTS["reference"]
    alike = tuple(replace(row, windows=reference.row(row.variant).windows) for row in reference.alike)
    doubled = [2 * kl for kl in reference.row(Variant("q4", False)).windows]
    reference = changed(replace(reference, alike=alike), "q4", windows=doubled)
    assert found_of({"reference": reference}, "q4", KL).ratio == pytest.approx(2)


@pytest.mark.parametrize(
    ("ratio", "is_difference"), [(1.07, False), (0.91, False), (1.13, True), (0.88, True)]
)
def test_what_the_control_is_off_is_no_difference(ratio: float, is_difference: bool) -> None:
    """Guards: a gain claimed that two files of the same types show as well; a bar called met for certain by
    the same.
    """
    speed = changed(PARTS["speed"], BASE, prompt_ratio=[0.9, 1.0, 1.05])
    speed = changed(speed, "q4", prompt_ratio=[ratio - 0.01, ratio, ratio + 0.01])
    verdict = found_of({"speed": speed}, "q4", PROMPT)
    assert verdict.is_difference is is_difference
    assert verdict.interval == pytest.approx(((ratio - 0.01) * 0.9, (ratio + 0.01) / 0.9))
    assert verdict.is_uncertain is not is_difference  # the bar is 1
    assert spread([ratio], verdict.control) == f"{ratio:.3f} x" + ("" if is_difference else ", no difference")
    told = next(line for line in summary_table({**PARTS, "speed": speed}).splitlines() if "`q4`" in line)
    assert told.split(" | ")[3] == (f"{ratio:.2f} x" if is_difference else "no difference")


def test_as_good_is_not_better() -> None:
    """Guards: "below Q8_0's" met by the same divergence; another name of a type called better than it."""
    part = PARTS["reference"]
    assert found_of({"reference": part}, "q8", KL).holds is None
    other = changed(part, "q8", digest="another")
    assert found_of({"reference": other}, "q8", KL).ratio == 1
    assert found_of({"reference": other}, "q8", KL).holds is False


@pytest.mark.parametrize(("size", "holds"), [(1000, True), (990, True), (989, False), (1001, False)])
def test_a_target_is_used_to_a_hundredth(size: int, holds: bool) -> None:
    """Guards: a budget that was exceeded, or hardly used, called met."""
    part = replace(PARTS["reference"], targets=[TargetRow(1000, size)])
    assert [each for _, each in targets_hold(part)] == [holds]


def test_the_last_line_has_every_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a bar or a target that was missed and is not told."""
    missed = replace(PARTS["reference"], targets=[TargetRow(1000, 900)])
    quality.report({**PARTS, "reference": missed})
    *told, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["targets"] == [{"used": 0.9, "holds": False}]
    n_missed = [each["holds"] for each in found["bars"]].count(False)
    assert len([line for line in told if line.startswith("MISSED")]) == n_missed + 1


def test_a_quick_run_is_not_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: figures that mean nothing in the documents."""
    monkeypatch.setattr(sys, "argv", ["quality", "--quick", "--save"])
    with pytest.raises(SystemExit):
        quality.arguments()
    assert "the figures of --quick mean nothing" in capsys.readouterr().err


def complete() -> dict[str, Part]:
    """The published parts as if they had been measured with these kernels, and nothing were missing."""
    parts = {
        name: replace(part, settings={**part.settings, "kernels": kernels.version()})
        for name, part in PARTS.items()
    }
    reference = parts["reference"]
    rows = [
        AlikeRow(**{**asdict(reference.row(Variant(word, imatrix))), "base": base})
        for imatrix in (False, True)
        for word, base in ALIKE
    ]
    parts["reference"] = replace(reference, alike=tuple(rows))
    return parts


def other_settings(part: Part, **settings: object) -> Part:
    return replace(part, settings={**part.settings, **settings})


PUBLISHED = complete()
REFERENCE, STEPS, SPEED = (PUBLISHED[name] for name in ("reference", "steps", "speed"))
REFUSED = [
    (changed(REFERENCE, "q4", digest="old"), "these types have changed: q4, q4, imatrix."),
    (replace(PUBLISHED["sizes"], rows=[replace(PUBLISHED["sizes"].rows[0], type="q9")]), "have changed: q9."),
    (replace(REFERENCE, eight=[replace(REFERENCE.eight[0], digest="old")]), "have changed: q8-value."),
    (replace(REFERENCE, frontier=(), alike=REFERENCE.alike[1:]), "incomplete, without frontier, Q4_K_M with"),
    (replace(SPEED, rows=SPEED.rows[1:]), "incomplete, without Q8_0."),
    (replace(STEPS, rows=STEPS.rows[:1]), "incomplete, without q4, q4-fast."),
    (replace(PUBLISHED["points"], rows=PUBLISHED["points"].rows[1:]), f"without {POINTS[0].name}."),
    (other_settings(SPEED, kernels="0.0.1"), "it is of llama-cpp-python 0.0.1, and this is "),
    (other_settings(STEPS, model="x", n_windows=2), "not of what reference is of: model, n_windows differ."),
    (other_settings(PUBLISHED["points"], layers=7), "not of what speed is of: layers differ."),
    (
        other_settings(STEPS, text_digest=REFERENCE.settings["text_digest"]),
        "recipes would be chosen on the text of their bars.",
    ),
]


@pytest.mark.parametrize(("part", "why"), REFUSED, ids=[f"{part.name}: {why[:30]}" for part, why in REFUSED])
def test_parts_that_do_not_belong_together_are_refused(
    part: Part, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: figures of a recipe that has changed, of another model or other kernels, or of only some of the
    types, beside those of the others.
    """
    for each in PUBLISHED.values():
        save_part(each, tmp_path)
    assert kept_parts(tmp_path).keys() == PUBLISHED.keys()
    save_part(part, tmp_path)
    assert part.name not in kept_parts(tmp_path)
    told = capsys.readouterr().err
    assert f"{part.name}: refused, since " in told
    assert why in told
    (tmp_path / f"{part.name}.json").write_text('{"name": "sizes"}')
    assert load_part(part.name, tmp_path) is None


def test_speed_is_beside_the_bytes_of_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a speed of few layers beside the bytes per token of the whole shape; rounds mixed up."""
    numbers = iter(range(1, 1000))
    monkeypatch.setattr(quality_speed, "model_file", lambda _, __, word: Path(word))
    first = []

    def time_pair(path: Path, base: Path, timing: Timing, *, base_first: bool) -> Pair:
        number = next(numbers)
        first.append((base.name, base_first))
        rates = ({"model": [factor * number], "base": [number]} for factor in (2, 3))
        prompt, reply = (compare("", each, "model", "base") for each in rates)
        return prompt, reply

    monkeypatch.setattr(quality_speed, "time_pair", time_pair)
    timing = Timing(3, 16, 4, 2, 1, 1)
    rows = measure_speeds(timing)
    assert (rows[0].prompt, rows[0].decode) == ([2, 4 * len(rows)], [3, 6 * len(rows)])
    assert (rows[0].prompt_ratio, rows[0].decode_ratio) == ([2, 2], [3, 3])
    assert set(first) == {(BASE, False), (BASE, True)}
    few = with_layers(LARGE, 3)
    assert all(row.n_bytes_per_token == size_of(few, row.type).n_bytes_per_token for row in rows)


@pytest.mark.parametrize("base_first", [False, True])
def test_a_pair_is_timed_in_turn(base_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a ratio upside down; a warm-up that counts; one side always first."""
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
    prompt, reply = time_pair(Path("mine"), Path("base"), Timing(1, 8, 16, 1, 3, 1), base_first=base_first)
    assert loaded == (["base", "mine"] if base_first else ["mine", "base"])
    assert (prompt.ours, prompt.result, reply.ours, reply.result) == (8 / 2, 2 / 1, 16 / 4, 4 / 4)
    assert [label for _, label in timed] == ["pp8"] * 8 + ["tg16"] * 20
    assert [name for name, _ in timed[2:8]] == ["base", "mine", "mine", "base", "base", "mine"]


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


def test_other_choices_are_comparable() -> None:
    """Guards: a point that is a recipe of ours by another name; a candidate for q8 that is better because it
    is larger.
    """
    digests = [Variant(word, False).digest for word in OURS]
    digests += [digest_of(recipe, imatrix=False) for recipe in POINTS]
    assert len(set(digests)) == len(digests)
    for recipe in EIGHT:
        for hp in (LARGE, HP):
            assert size_of(hp, recipe).n_bytes <= size_of(hp, EIGHT_BASE).n_bytes


def test_divergences_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an error of the KV cache counted as one of the type; divergences without the tail of a large
    vocabulary.
    """
    seen: list[ModelOptions] = []
    monkeypatch.setattr(EngineClient, "load", seen.append)
    load(Path("model.gguf"), Amount(1, 1, 1))
    assert [(each.cache_type_k, each.cache_type_v) for each in seen] == [("f32", "f32")]
    path = tmp_path / "model.gguf"
    write_random(path, replace(HP, n_vocab=5000), make_pool(0), "Q8_0")
    parameters = dict(exact_recorders(tmp_path, path)[0].parameters)
    assert (parameters["top"], parameters["mass"]) == (5000, 1.0)


def test_a_model_is_measured(tmp_path: Path) -> None:
    """Guards: a row of another file or of other windows; a matrix that is not used; a target exceeded."""
    folder = write_checkpoint(tmp_path / "checkpoint", form="single")
    text = built_in().content
    subject = Subject("tiny", folder, Text("a", text[:3000]), Text("b", text[3000:6000]))
    wanted = [Variant(word, imatrix) for imatrix in (False, True) for word in ("Q8_0", "Q4_0")]
    kept = Kept(tmp_path / "kept")
    with prepared(subject, Amount(3, 3, 1, n_context=64), kept) as bench:
        rows = measure_types(bench, wanted)
        assert kept.stamps == []
        assert measure_types(bench, wanted[:2]) == rows[:2]
        assert len(kept.stamps) == 2
        frontier = measure_frontier(bench, [8.0], Costs())
        targets = measure_targets(bench, [1.0], Costs({"output": 3.0}))
        alike = measure_alike(bench)
        eight = measure_eight(bench)
        steps = measure_steps(bench, 1)
        figures = compare("", {"model": [3.0], "base": [2.0]}, "model", "base")
        points = measure_points(bench, {recipe.name: [(figures, figures)] for recipe in POINTS})
        # Measured on what dsmoe convert makes of the same folder.
        convert_folder(folder, tmp_path / "another.gguf", ConvertOptions("f32"))
        start = sensitivity_file.start(read_model(tmp_path / "another.gguf")[0], None, None)
        check_costs(start, tmp_path / "costs.json", bench.source)
    found = {row.variant: row for row in rows}
    assert found[Variant("Q8_0", False)].kl < found[Variant("Q4_0", False)].kl
    assert found[Variant("Q4_0", True)].kl != found[Variant("Q4_0", False)].kl
    for row in (*rows, *frontier, *alike):
        assert len(row.windows) == 3
        assert np.mean(row.windows) == pytest.approx(row.kl, rel=1e-4)
        assert row.kl_upper == pytest.approx(row.kl, rel=1e-6)
    assert all(row.bits_per_weight <= 8 for row in frontier)
    assert all(row.file_size <= row.budget for row in targets)
    part = part_of("reference", {}, rows, frontier=frontier, targets=targets, alike=alike, eight=eight)
    assert stale(part) == []
    assert {name.removesuffix(", imatrix") for name in missing(part)}.isdisjoint(
        {"frontier", "targets", *(recipe.name for recipe in EIGHT)}
    )
    # Only every third layer pays, and the model has two.
    assert 0 < eight[0].predicted_ratio < 1
    told = [(row.type, row.kind != "") for row in steps]
    assert told == [(BASE, False), *((word, is_step) for word in STEPPED for is_step in (False, True))]
    # So narrow a model has Q8_0 in place of Q6_K as well.
    assert len({tuple(row.windows) for row in steps[:3]}) == 3
    assert stale(part_of("points", {}, points)) == missing(part_of("points", {}, points)) == []
    assert {(*row.prompt_ratio, *row.decode_ratio) for row in points} == {(1.5, 1.5)}


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


def test_an_interrupted_run_loses_nothing(tmp_path: Path) -> None:
    """Guards: an hour's rows lost with a run that was stopped; a row of another model taken over."""
    row, other = PARTS["reference"].rows[:2]

    def stopped() -> FidelityRow:
        raise KeyboardInterrupt

    kept = Kept(tmp_path)
    assert kept.row(["model", "Q8_0"], lambda: row) == row
    assert Kept(tmp_path).row(["model", "Q8_0"], stopped) == row
    assert Kept(tmp_path).row(["another", "Q8_0"], lambda: other) == other
    with pytest.raises(KeyboardInterrupt):
        Kept(tmp_path, again=True).row(["model", "Q8_0"], stopped)
