"""The benchmark of quality: its intervals, its bars, what it refuses, its tables and its chart."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import write_checkpoint

from benchmarks import quality
from benchmarks.support import quality_fidelity
from benchmarks.support.label_places import Box, Label, place
from benchmarks.support.quality_bars import at_most, ratio_of, speed_of, targets_hold, verdicts
from benchmarks.support.quality_chart import chart
from benchmarks.support.quality_fidelity import Amount, Subject, measure_types, prepared
from benchmarks.support.quality_rows import (
    FidelityRow,
    Part,
    SizeRow,
    SpeedRow,
    TargetRow,
    load_part,
    parse_part,
    part_of,
    save_part,
)
from benchmarks.support.quality_speed import timed_variants
from benchmarks.support.quality_tables import all_tables, with_tables
from benchmarks.support.quality_types import BASE, Variant, variants
from benchmarks.support.rows import Bar
from dsmoe_local.evaluate.text import Text, built_in

RANDOM = np.random.default_rng(0)


def fidelity(variant: Variant, bits: float, kl: float, digest: str = "") -> FidelityRow:
    windows = (kl * np.array([0.5, 1.0, 1.5])).tolist()
    return FidelityRow(
        variant.word, variant.imatrix, digest or variant.digest, int(1e6 * bits), bits, 1e5 * bits, 20.0, 0.1,
        kl, kl / 10, kl, 9 * kl, 0.9, 0.8, 0.95, windows,
    )  # fmt: skip


def reference_part() -> Part:
    """Stock types on a line, our recipes below it, and a frontier below them."""
    rows = []
    for number, variant in enumerate(variants()):
        bits = 4.4 + 0.13 * (number % 12)
        rows.append(fidelity(variant, bits, 0.01 * 2 ** (4 - bits) * (0.7 if variant.imatrix else 1)))
    line = tuple(
        fidelity(Variant(f"{bits:g} bpw", imatrix), bits, 0.006 * 2 ** (4 - bits), "of no type")
        for imatrix in (False, True)
        for bits in (4.4, 5.0, 6.0)
    )
    return part_of("reference", {"model": "m"}, rows, frontier=line, targets=(TargetRow(1000, 995),))


def sizes_part(ratios: Mapping[str, float]) -> Part:
    rows = [
        SizeRow(each.word, each.imatrix, each.digest, int(1e9 * ratio), 5 * ratio, 1e8 * ratio)
        for each in variants()
        if (ratio := ratios.get(each.word, 1.0))
    ]
    return part_of("sizes", {}, rows)


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


def test_bars_are_the_issues() -> None:
    """Guards: a bar held against the interval, the wrong side, or the other kind of file."""
    sizes = sizes_part({"q4": 0.96, "q4-fast": 0.9, "q4-small": 0.86})
    speed = part_of(
        "speed",
        {},
        [
            SpeedRow(each.word, False, each.digest, [10 * factor, 20 * factor, 30], [1.0, 2.0, 3.0])
            for each in timed_variants()
            if (factor := 1.0 if each.word == BASE else 1.2)
        ],
    )
    found = {
        (each.recipe, each.imatrix, each.measure, each.against): each
        for each in verdicts({"sizes": sizes, "speed": speed, "reference": reference_part()})
    }
    assert not found["q4", False, "size", BASE].holds
    assert found["q4-fast", True, "size", BASE].holds
    assert found["q4-small", False, "size", BASE].holds
    # The median of the rounds' own ratios.
    assert found["q4", False, "prompt", BASE].ratio == pytest.approx(1.2)
    assert not found["q4-fast", False, "prompt", BASE].holds
    assert found["q4", True, "decode", BASE].holds
    assert not found["q4-fast", True, "decode", BASE].holds
    divergence = found["q4", True, "KL", BASE]
    assert divergence.interval == pytest.approx((divergence.ratio, divergence.ratio))
    assert divergence.bar == at_most(0.78)
    assert str(Bar(0.95)) == ">= 0.95"
    assert {
        measure for recipe, _, measure, against in found if (recipe, against) == ("q4-small", "IQ4_XS")
    } == {"KL"}


@pytest.mark.parametrize(("size", "holds"), [(1000, True), (990, True), (989, False), (1001, False)])
def test_a_target_is_used_to_a_hundredth(size: int, holds: bool) -> None:
    """Guards: a budget that was exceeded, or hardly used, called met."""
    part = replace(reference_part(), targets=[TargetRow(1000, size)])
    assert [each for _, each in targets_hold(part)] == [holds]


def test_figures_of_changed_types_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: figures of a recipe beside its name when it is another one by now, or gone."""
    part = sizes_part({})
    save_part(part, tmp_path)
    assert load_part("sizes", tmp_path) == part
    assert list(quality.kept_parts(tmp_path)) == ["sizes"]
    changed = [replace(row, digest="another") if row.type == "q4" else row for row in part.rows]
    save_part(replace(part, rows=[*changed, replace(part.rows[0], type="q9")]), tmp_path)
    assert quality.kept_parts(tmp_path) == {}
    assert "refused, since these types have changed: q4, q4, imatrix, q9." in capsys.readouterr().err
    (tmp_path / "sizes.json").write_text('{"name": "sizes"}')
    assert load_part("sizes", tmp_path) is None


def test_known_rows_are_of_the_same_model() -> None:
    """Guards: a row of another model, or of another text, taken over."""
    part = reference_part()
    assert len(quality_fidelity.known_rows({"model": "m"}, part)) == len(part.rows)
    assert quality_fidelity.known_rows({"model": "another"}, part) == {}
    stale = replace(part, rows=[replace(part.rows[0], digest="another"), *part.rows[1:]])
    assert len(quality_fidelity.known_rows({"model": "m"}, stale)) == len(part.rows) - 1


def test_each_kind_of_file_is_timed_once() -> None:
    """Guards: minutes spent on a stock type by another name; a recipe whose speed is not found."""
    timed = list(timed_variants())
    assert len({each.digest for each in timed}) == len(timed)
    rows = [SpeedRow(each.word, False, each.digest, [1.0], [1.0]) for each in timed]
    part = part_of("speed", {}, rows)
    assert all(speed_of(part, Variant(word, False)) is not None for word in ("q8", "q4", "q4-small", BASE))


def test_tables_are_of_the_figures() -> None:
    """Guards: columns that are mixed up; lines of another length; a document that keeps old figures."""
    parts = {"reference": reference_part(), "sizes": sizes_part({"q4": 0.9})}
    tables = all_tables(parts)
    for table in tables.values():
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| **`q4`** | 0.900 | 4.50 | 0.900 x | 0.090 | 0.900 x |" in tables["sizes"]
    first = parts["reference"].rows[0]
    assert f"| `Q8_0` | without | {first.file_size / 1e6:.2f} | 4.40 |" in tables["reference"]
    assert "| 1,000 | 995 | 99.50% | met |" in tables["targets"]
    text = "a\n<!-- table: sizes -->\nold\n<!-- end -->\nb\n"
    written = with_tables(text, {"sizes": "| new |"})
    assert written == "a\n<!-- table: sizes -->\n| new |\n<!-- end -->\nb\n"
    assert with_tables(written, {"sizes": "| new |"}) == written
    with pytest.raises(ValueError, match="no place for the table x"):
        with_tables(text, {"x": ""})


def test_figures_survive_their_file() -> None:
    """Guards: a figure that JSON changes."""
    part = reference_part()
    assert parse_part(json.loads(json.dumps(part.as_json()))) == part


def test_the_chart_shows_every_type() -> None:
    """Guards: a file that is no XML, types without a name, names over each other or outside."""
    part = reference_part()
    rows = [replace(row, bits_per_weight=8.5) if row.type == "Q8_0" else row for row in part.rows]
    root = ElementTree.fromstring(chart(replace(part, rows=rows)))
    space = "{http://www.w3.org/2000/svg}"
    assert [root.find(f"{space}{name}") is not None for name in ("title", "desc")] == [True, True]
    texts = {element.text: element for element in root.iter(f"{space}text")}
    for word in {row.type for row in rows} - {"Q8_0"}:
        assert word in texts
    assert any("Further right" in (text or "") and "Q8_0" in (text or "") for text in texts)
    assert len(list(root.iter(f"{space}polyline"))) == 2
    boxes = []
    for word in {row.type for row in rows} - {"Q8_0"}:
        x, y = (float(texts[word].get(name, "")) for name in ("x", "y"))
        half = 3.6 * len(word)
        boxes.append(Box(x - half, y - 10, x + half, y + 2))
    assert all(box.left > 0 and box.right < 860 and box.top > 90 for box in boxes)
    assert not [(a, b) for a in boxes for b in boxes if a is not b and a.overlap(b) > 1]


def test_labels_find_room() -> None:
    """Guards: labels over each other or over marks where there is room beside them."""
    marks = [Box(x, 100 + y, x + 10, 110 + y) for x, y in ((50, 0), (58, 4), (66, 0), (52, 14), (300, 50))]
    labels = [Label(40, 12, [mark]) for mark in marks]
    frame = Box(0, 0, 400, 300)
    boxes = place(labels, marks, frame)
    everything = [*boxes, *marks]
    assert all(a is b or a.overlap(b) == 0 for a in boxes for b in everything)
    assert all(box.overlap(frame) == box.area for box in boxes)
    assert boxes == place(labels, marks, frame)


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
        frontier = quality_fidelity.measure_frontier(bench, [8.0], {})
        targets = quality_fidelity.measure_targets(bench, [1.0], {"output": 3.0})
    assert kept == [1, 2, 3, 4]
    assert [row.windows for row in again] == [row.windows for row in rows]
    found = {Variant(row.type, row.imatrix): row for row in rows}
    assert found[Variant("Q8_0", False)].kl < found[Variant("Q4_0", False)].kl
    assert found[Variant("Q4_0", True)].kl != found[Variant("Q4_0", False)].kl
    for row in (*rows, *frontier):
        assert len(row.windows) == 3
        assert np.mean(row.windows) == pytest.approx(row.kl, rel=1e-4)
        assert row.kl_upper == pytest.approx(row.kl, rel=1e-6)
    assert all(row.bits_per_weight <= 8 for row in frontier)
    assert all(row.file_size <= row.budget for row in targets)


DOCUMENT = quality.DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.skipif(not quality.FIGURES.exists(), reason="nothing was saved yet")
def test_the_document_is_of_its_figures() -> None:
    """Guards: tables and a chart of other figures than those beside them; types that have changed since."""
    content = json.loads(quality.FIGURES.read_text(encoding="utf-8"))
    parts = {name: parse_part(part) for name, part in content.items()}
    assert with_tables(DOCUMENT, all_tables(parts)) == DOCUMENT
    assert quality.CHART.read_text(encoding="utf-8") == chart(parts["reference"])
    assert {name: part.stale() for name, part in parts.items() if part.stale()} == {}
