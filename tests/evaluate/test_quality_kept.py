"""What benchmarks/quality.py keeps, takes again, and refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.quality_parts import (
    SETTINGS,
    fidelity,
    points_part,
    reference_part,
    sizes_part,
    speed_part,
    steps_part,
)

from benchmarks import quality
from benchmarks.support import quality_rows
from benchmarks.support.quality_bars import KL
from benchmarks.support.quality_fidelity import Subject, known_rows
from benchmarks.support.quality_kept import kept_parts
from benchmarks.support.quality_points import POINTS
from benchmarks.support.quality_rows import FidelityRow, Part, load_part, part_of, save_part
from benchmarks.support.quality_steps import STEPPED
from benchmarks.support.quality_types import Variant, variants
from dsmoe_local.evaluate.text import Text

SUBJECT = Subject("reference", Path("folder"), Text("a", "a"), Text("b", "b"))


class InterruptedBench:
    """Measures two types; then somebody wants to go home."""

    source = Path("model.gguf")

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._n_measured = 0

    def settings(self) -> dict[str, Any]:
        return self._settings

    def facts(self) -> dict[str, Any]:
        return {"perplexity": 1.0}

    def plan(self, variant: Variant) -> None:
        """Nothing is planned."""

    def measure(self, plan: None, variant: Variant, digest: str) -> FidelityRow:
        self._n_measured += 1
        if self._n_measured > 2:
            raise KeyboardInterrupt
        return fidelity(variant, 5.0, 0.5, digest)


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, settings: dict[str, Any]) -> Part:
    """What is kept of a run that measures everything anew, and is interrupted at the third type."""

    @contextmanager
    def prepared(*_: object) -> Iterator[InterruptedBench]:
        yield InterruptedBench(settings)

    monkeypatch.setattr(quality, "prepared", prepared)
    monkeypatch.setattr(quality, "folder_of", lambda quick: folder)
    given = argparse.Namespace(again=True, quick=False, sensitivity=None, windows=None, threads=1)
    with pytest.raises(KeyboardInterrupt):
        quality.measure_fidelity(given, SUBJECT)
    found = load_part("reference", folder)
    assert found is not None
    return found


def test_an_interrupted_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an hour's rows replaced by the first few of a run that was stopped."""
    old = replace(reference_part(), measured="yesterday", commit="abc")
    save_part(old, tmp_path)
    found = interrupted(monkeypatch, tmp_path, dict(old.settings))
    assert [row.kl for row in found.rows[:2]] == [0.5, 0.5]
    assert list(found.rows[2:]) == list(old.rows[2:])
    assert (found.frontier, found.targets, found.alike) == (old.frontier, old.targets, old.alike)
    assert (found.eight, found.facts) == (old.eight, {"perplexity": 1.0, "costs": "built in"})
    assert found.oldest == "yesterday, commit abc"
    assert list(kept_parts(tmp_path)) == ["reference"]


def test_what_remains_of_a_run_is_refused_if_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: rows of a model joined with those of another; verdicts on what was not measured; what the
    solver made of an older recipe beside a new one.
    """
    old = reference_part()
    save_part(old, tmp_path)
    found = interrupted(monkeypatch, tmp_path, {**old.settings, "model": "another"})
    assert len(found.rows) == 2
    assert kept_parts(tmp_path) == {}
    assert "reference: refused, since it is incomplete, without Q5_K_M, " in capsys.readouterr().err
    save_part(replace(old, rows=[replace(old.rows[0], digest="old"), *old.rows[1:]]), tmp_path)
    found = interrupted(monkeypatch, tmp_path, dict(old.settings))
    assert (len(found.rows), found.frontier) == (len(old.rows), ())
    assert kept_parts(tmp_path) == {}
    assert "incomplete, without frontier, targets, alike, eight. Run" in capsys.readouterr().err


def test_incomplete_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a part without a type that verdicts are on."""
    speed, steps = speed_part(), steps_part()
    for part, missing in (
        (replace(speed, rows=speed.rows[1:]), "Q8_0"),
        (replace(steps, rows=steps.rows[:1]), ", ".join(STEPPED)),
        (replace(points_part(), rows=points_part().rows[1:]), POINTS[0].name),
        (replace(sizes_part({}), rows=sizes_part({}).rows[:-1]), str(list(variants())[-1])),
    ):
        save_part(part, tmp_path)
        assert part.name not in kept_parts(tmp_path)
        assert f"{part.name}: refused, since it is incomplete, without {missing}. Run --parts" in (
            capsys.readouterr().err
        )


def test_parts_of_other_things_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: figures of one model beside those of another, or of kernels that are no longer there."""
    parts = [reference_part(), steps_part(), sizes_part({}), speed_part(), points_part()]
    for part in parts:
        save_part(part, tmp_path)
    assert list(kept_parts(tmp_path)) == ["reference", "steps", "sizes", "speed", "points"]
    save_part(replace(steps_part(), settings=SETTINGS), tmp_path)
    save_part(replace(points_part(), settings={**points_part().settings, "layers": 7}), tmp_path)
    assert list(kept_parts(tmp_path)) == ["reference", "sizes", "speed"]
    told = capsys.readouterr().err
    assert "steps: refused, since recipes would be chosen on the text of their bars." in told
    assert "points: refused, since it is not of what speed is of: layers differ." in told
    save_part(points_part(), tmp_path)
    save_part(replace(steps_part(), settings={**SETTINGS, "model": "x", "n_windows": 2}), tmp_path)
    save_part(replace(speed_part(), settings={**speed_part().settings, "kernels": "0.0.1"}), tmp_path)
    capsys.readouterr()
    assert list(kept_parts(tmp_path)) == ["reference", "sizes", "points"]
    told = capsys.readouterr().err
    assert "steps: refused, since it is not of what reference is of: model, n_windows differ." in told
    assert "speed: refused, since it is of llama-cpp-python 0.0.1, and this is " in told


def test_figures_of_changed_types_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: figures of a recipe beside its name when it is another one by now, or gone."""
    part = sizes_part({})
    save_part(part, tmp_path)
    assert load_part("sizes", tmp_path) == part
    assert list(kept_parts(tmp_path)) == ["sizes"]
    changed = [replace(row, digest="another") if row.type == "q4" else row for row in part.rows]
    save_part(replace(part, rows=[*changed, replace(part.rows[0], type="q9")]), tmp_path)
    assert kept_parts(tmp_path) == {}
    assert "refused, since these types have changed: q4, q4, imatrix, q9." in capsys.readouterr().err
    reference = reference_part()
    save_part(replace(reference, eight=[replace(reference.eight[0], digest="another")]), tmp_path)
    assert "reference" not in kept_parts(tmp_path)
    assert f"types have changed: {reference.eight[0].type}." in capsys.readouterr().err
    (tmp_path / "sizes.json").write_text('{"name": "sizes"}')
    assert load_part("sizes", tmp_path) is None


def test_known_rows_are_of_the_same_model() -> None:
    """Guards: a row of another model, or of another text, taken over."""
    part = reference_part()
    assert len(known_rows(part.settings, part)) == len(part.rows)
    assert known_rows({**part.settings, "model": "another"}, part) == {}
    stale = replace(part, rows=[replace(part.rows[0], digest="another"), *part.rows[1:]])
    assert len(known_rows(part.settings, stale)) == len(part.rows) - 1


def test_a_quick_run_is_not_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: figures that mean nothing in the documents."""
    monkeypatch.setattr(sys, "argv", ["quality", "--quick", "--save"])
    with pytest.raises(SystemExit):
        quality.arguments()
    assert "the figures of --quick mean nothing" in capsys.readouterr().err


def test_the_last_line_has_every_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a target that was missed and is not in the line, or an alias counted as won."""
    quality.report({"reference": reference_part()})
    *told, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["targets"] == [{"used": 0.995, "holds": True}]
    holds = {(each["recipe"], each["imatrix"], each["measure"]): each["holds"] for each in found["bars"]}
    assert holds["q8", False, KL] is None
    assert len([line for line in told if line.startswith("MISSED")]) == list(holds.values()).count(False)


def test_changes_that_are_in_no_commit_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: figures of a changed checkout under the name of a commit that gives others."""
    monkeypatch.setattr(quality_rows, "ROOT", tmp_path)

    def git(*words: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = part_of("sizes", {}, []).commit
    assert len(clean) >= 7
    (tmp_path / "file").write_text("two")
    assert part_of("sizes", {}, []).commit == f"{clean}-dirty"
