"""The benchmark of quality: its ratios and bars, its measurements, and the published tables and chart."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from support.checkpoints import write_checkpoint

from benchmarks import predicted_error, quality
from benchmarks.support.quality import choices
from benchmarks.support.quality import speed as quality_speed
from benchmarks.support.quality.bars import DECODE, KL, PROMPT, SIZE, Verdict, ratio_of, verdicts
from benchmarks.support.quality.chart import chart, description
from benchmarks.support.quality.choices import (
    Costs,
    costs_from,
    measure_alike,
    measure_frontier,
    measure_targets,
    measure_types,
)
from benchmarks.support.quality.fidelity import Amount, Subject, load, prepared
from benchmarks.support.quality.figures import Figures, Part, TargetRow, outdated, read_figures
from benchmarks.support.quality.speed import Timing, time_pair
from benchmarks.support.quality.tables import all_tables, summary_table
from benchmarks.support.quality.variants import ALIKE, BASE, Variant
from benchmarks.support.runner import Bar
from benchmarks.support.tables import with_tables
from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.load.kernels import Kernels
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import Workload
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget import sensitivity_file

FIGURES = read_figures()
change = msgspec.structs.replace


def changed(part: Part[Any], word: str, **fields: Any) -> Part[Any]:
    """The part with other figures of a type."""
    return change(part, rows=[change(row, **fields) if row.type == word else row for row in part.rows])


def found_of(figures: Figures, word: str, measure: str) -> Verdict:
    """The verdict on a recipe without an importance matrix."""
    (found,) = (
        each
        for each in verdicts(figures)
        if (each.recipe, each.measure, each.imatrix) == (word, measure, False)
    )
    return found


def test_the_document_is_of_its_figures() -> None:
    """Guards: tables and a chart of other figures than those beside them; types that have changed since."""
    document = quality.DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(document, all_tables(FIGURES)) == document
    for path in quality.SUMMARIZED:
        text = path.read_text(encoding="utf-8")
        assert with_tables(text, {quality.SUMMARY: summary_table(FIGURES)}) == text
    assert escape(description(FIGURES)) in quality.CHART.read_text(encoding="utf-8")
    assert list(outdated(FIGURES)) == []
    with pytest.raises(ValueError, match="no place for the table x"):
        with_tables(document, {"x": ""})


def test_the_chart_shows_every_type() -> None:
    """Guards: a type that is missing, or marked where another one is; bits and divergences mixed up."""
    (axes,) = chart(FIGURES).axes
    shown = [row for row in FIGURES.reference.rows if row.type not in ("Q8_0", "Q6_K", "q8")]
    calibrated = [(row.bits_per_weight, row.kl) for row in FIGURES.calibrated.rows]
    assert calibrated in [list(map(tuple, np.asarray(line.get_xydata()))) for line in axes.lines]
    lines = [np.asarray(line.get_xydata()) for line in axes.lines]
    assert {tuple(line[0]) for line in lines if len(line) == 1} >= {
        (row.bits_per_weight, row.kl) for row in shown
    }
    assert {text.get_text() for text in axes.texts} >= {row.type for row in shown}
    assert "Further right, without imatrix: Q8_0 and q8, 8.54 bits" in axes.get_xlabel()


def test_the_interval_is_that_of_theory() -> None:
    """Guards: windows drawn separately for each side; quantiles of something else than the ratio. The oracle
    is the delta method.
    """
    random = np.random.default_rng(0)
    theirs = random.lognormal(0, 1, 200)
    ratio, (low, high) = ratio_of((0.8 * theirs).tolist(), theirs.tolist())
    assert (ratio, low, high) == pytest.approx((0.8, 0.8, 0.8))
    theirs = random.normal(1, 0.3, 400)
    ours = 0.9 * theirs + random.normal(0, 0.1, 400)
    ratio, (low, high) = ratio_of(ours.tolist(), theirs.tolist())
    error = (ours - ratio * theirs).std(ddof=1) / np.sqrt(400) / theirs.mean()
    assert ratio == pytest.approx(ours.sum() / theirs.sum())
    assert (ratio - low, high - ratio) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)
    with pytest.raises(ValueError, match="no pairs"):
        ratio_of([1.0, 2.0], [1.0])


def test_ratios_are_ours_by_the_bases() -> None:
    """Guards: a ratio upside down, or of other figures; a bar read the wrong way round."""
    reference = FIGURES.reference
    doubled = [2 * kl for kl in reference.alike_row(Variant(BASE, False)).windows]
    speed = changed(FIGURES.speed, BASE, prompt_ratio=[1.0], decode_ratio=[1.0])
    figures = change(
        FIGURES,
        sizes=changed(changed(FIGURES.sizes, BASE, n_bytes=1000), "q4-fast", n_bytes=880),
        speed=changed(speed, "q4-fast", prompt_ratio=[1.2, 1.9, 5.0], decode_ratio=[0.9, 0.99, 1.1]),
        reference=change(
            reference,
            alike=[change(row, windows=doubled) if row.type == "q4" else row for row in reference.alike],
        ),
    )
    found = {measure: found_of(figures, "q4-fast", measure) for measure in (SIZE, PROMPT, DECODE)}
    assert (found[SIZE].result, found[SIZE].passed) == (0.88, False)
    assert (found[PROMPT].result, found[PROMPT].passed) == (1.9, True)  # the median of the rounds' own ratios
    assert found[DECODE].passed is False
    assert found_of(figures, "q4", KL).result == pytest.approx(2)


@pytest.mark.parametrize(
    ("ratio", "is_difference"), [(1.07, False), (0.91, False), (1.13, True), (0.88, True)]
)
def test_a_ratio_within_the_control_is_no_difference(ratio: float, is_difference: bool) -> None:
    """Guards: a gain that two files of the same types show as well; a bar called certain in that case."""
    speed = changed(FIGURES.speed, BASE, prompt_ratio=[0.9, 1.0, 1.05])
    figures = change(FIGURES, speed=changed(speed, "q4", prompt_ratio=[ratio - 0.01, ratio, ratio + 0.01]))
    verdict = replace(found_of(figures, "q4", PROMPT), bar=Bar(1))
    assert (verdict.is_none, verdict.is_uncertain) == (not is_difference, not is_difference)
    assert verdict.spread == pytest.approx(((ratio - 0.01) * 0.9, (ratio + 0.01) / 0.9))
    told = next(line for line in summary_table(figures).splitlines() if "`q4`" in line)
    assert told.split(" | ")[3] == (f"{ratio:.2f} x" if is_difference else "no difference")


@pytest.mark.parametrize(("size", "holds"), [(1000, True), (990, True), (989, False), (1001, False)])
def test_the_last_line_has_every_verdict(size: int, holds: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a missed bar that is not shown; a budget that was exceeded, or hardly used, called met."""
    quality.report(change(FIGURES, reference=change(FIGURES.reference, targets=[TargetRow(1000, size)])))
    *told, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["targets"] == [{"used": size / 1000, "holds": holds}]
    n_missed = [each["passed"] for each in found["bars"]].count(False)
    assert sum(line.count("**MISSED**") for line in told) == n_missed + (not holds)


def test_parts_that_do_not_belong_together_are_named() -> None:
    """Guards: figures of a recipe that has changed, or of another llama.cpp, beside the others."""
    other = change(FIGURES.speed, settings={**FIGURES.speed.settings, "kernels": "x"})
    calibrated = change(FIGURES.calibrated, facts={"training": "another"})
    reference = changed(FIGURES.reference, "q4", digest="another")
    figures = change(FIGURES, speed=other, reference=reference, calibrated=calibrated)
    assert list(outdated(figures)) == [
        "reference: q4 has other types now",
        "reference: q4, imatrix has other types now",
        "calibrated and reference are different models",
        "speed and reference differ in kernels",
    ]


@pytest.mark.parametrize("base_first", [False, True])
def test_a_pair_is_timed_in_turn(base_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a ratio upside down; a warm-up that counts; one side that is always first."""
    timed: list[tuple[str, str]] = []
    loaded: list[tuple[str, str]] = []
    seconds = {
        "mine": iter([90.0, 1.0, 2.0, 8.0, 90.0, *[4.0] * 9]),
        "base": iter([90.0, 2.0, 4.0, 2.0, 90.0, *[2.0, 4.0, 8.0] * 3]),
    }

    class FakeTimer:
        def __init__(self, engine: str) -> None:
            self.name = engine

        def time(self, workload: Workload) -> float:
            timed.append((self.name, workload.label))
            return next(seconds[self.name])

    def fake_load(options: ModelOptions) -> nullcontext[str]:
        loaded.append((options.path.name, options.kernels))
        return nullcontext(options.path.name)

    monkeypatch.setattr(quality_speed, "Timer", FakeTimer)
    monkeypatch.setattr(quality_speed, "EngineClient", SimpleNamespace(load=fake_load))
    timing = Timing(1, 8, 16, 1, 3, 1)
    prompt, reply = time_pair(Path("mine"), Kernels.AUTO, Path("base"), timing, base_first=base_first)
    both = [("base", "repack"), ("mine", "auto")]
    assert loaded == (both if base_first else both[::-1])
    assert (prompt.ours, prompt.result, reply.ours, reply.result) == (8 / 2, 2 / 1, 16 / 4, 4 / 4)
    assert [label for _, label in timed] == ["pp8"] * 8 + ["tg16"] * 20
    assert [name for name, _ in timed[2:8]] == ["base", "mine", "mine", "base", "base", "mine"]


def test_the_cache_adds_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the error of an F16 KV cache counted as one of the type."""
    seen: list[ModelOptions] = []
    monkeypatch.setattr(EngineClient, "load", seen.append)
    load(Path("model.gguf"), Amount(1, 1, 1))
    assert [(each.cache_type_k, each.cache_type_v) for each in seen] == [("f32", "f32")]


def test_a_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a row of another file; an importance matrix that is not used; incomplete predictions in the
    divergence; a target exceeded; costs of another model; a prediction of another divergence.
    """
    folder = write_checkpoint(tmp_path / "checkpoint", form="single")
    text = built_in().content
    subject = Subject("tiny", folder, Text("a", text[:3000]), Text("b", text[3000:6000]))
    wanted = [Variant(word, False) for word in ("F32", "Q8_0", "Q4_0")] + [Variant("Q4_0", True)]
    monkeypatch.setattr(choices, "ALIKE", ALIKE[:1])
    monkeypatch.setattr(predicted_error, "TYPES", ["Q4_0"])
    monkeypatch.setattr(predicted_error, "BITS_PER_WEIGHT", [8.0])
    with prepared(subject, Amount(3, 3, 1, n_context=64)) as bench:
        rows = measure_types(bench, wanted)
        frontier = measure_frontier(bench, [8.0], Costs())
        targets = measure_targets(bench, [1.0], Costs({"output": 3.0}))
        alike = measure_alike(bench)
        predictions = list(predicted_error.compare(bench, Costs()))
        path = tmp_path / "costs.json"
        start = sensitivity_file.start(read_model(bench.source)[0], None, None)
        sensitivity_file.write_sensitivity(replace(start, weights={"output": 3.0}, imatrix="any"), path)
        assert costs_from(path, bench.source) == Costs({"output": 3.0}, "written by hand")
        sensitivity_file.write_sensitivity(replace(start, weights={"output": 3.0}, source="other"), path)
        with pytest.raises(UsageError, match="another model"):
            costs_from(path, bench.source)
    exact, eight_bits, four_bits, with_matrix = rows
    assert exact.kl < 1e-7
    assert 0 < eight_bits.kl < four_bits.kl
    assert with_matrix.kl != four_bits.kl
    for row in (*rows, *frontier, *alike):
        assert np.mean(row.windows) == pytest.approx(row.kl, rel=1e-4)
        assert len(row.windows) == 3
        assert row.kl_upper == pytest.approx(row.kl, rel=1e-6)
    assert all(row.bits_per_weight <= 8 for row in frontier)
    assert all(row.file_size <= row.budget for row in targets)
    assert [(row.measure, row.theirs) for row in predictions] == [
        ("Q4_0, predicted", 1e3 * four_bits.kl),
        ("8 bpw, predicted", 1e3 * frontier[0].kl),
    ]
    assert predictions[0].ours > predictions[1].ours > 0
