"""The benchmark of predicted errors: what it prints, what its figures depend on, what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.models import tiny_model

from benchmarks import predicted_error
from benchmarks.predicted_error import Row, mean_log_ratio, rank_correlation
from dsmoe_local.evaluate.text import built_in
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget.error_weights import WEIGHTS
from dsmoe_quantize.budget.sensitivity_file import start, write_sensitivity

ROWS = [
    Row("Q4_0", 4.5, 0.02, 0.01, 0.001),
    Row("Q5_0", 5.5, 0.01, 0.02, 0.001),
    Row("Q8_0", 8.5, 0.001, 0.001, 0.001),
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(predicted_error, "N_CONTEXT", 64)
    monkeypatch.setattr(sys, "argv", ["predicted_error", *map(str, arguments)])
    assert predicted_error.main() == 0


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: figures that do not say of what text, how much of it, and from which costs they are."""
    text = tmp_path / "text.txt"
    text.write_text(built_in().content[1000:1600])
    kept = tmp_path / "costs.json"
    file, _ = read_model(tiny_model())
    write_sensitivity(replace(start(file, None, 4096), weights=dict.fromkeys(WEIGHTS, 2.0)), kept)
    options = ("--types", "Q4_0", "--chunks", "3", "--threads", "1", "--sensitivity", kept)
    run(monkeypatch, tiny_model(), "--text", text, *options)
    told = capsys.readouterr().out
    assert "Q4_0" in told.splitlines()[4]
    found = json.loads(told.splitlines()[-1])
    settings = found["settings"]
    assert (settings["text"], settings["n_context"], settings["n_windows"]) == ("text.txt", 64, 3)
    assert (settings["costs"], settings["imatrix"]) == ("measured", None)
    assert 0 < settings["share_of_weights_tried"] < 1
    (row,) = found["rows"]
    assert row["type"] == "Q4_0"
    assert row["predicted"] > 0
    assert row["measured"] > 0
    assert row["ratio"] == pytest.approx(row["predicted"] / row["measured"], rel=0.01)
    assert found["rank_correlation"] is None


def test_nothing_divides_by_nothing() -> None:
    """Guards: no result of an hour's run, since a type loses nothing."""
    nothing = [Row("BF16", 16, 0.0, 0.0, 0.0), Row("Q8_0", 8.5, 0.001, 0.0, 0.0)]
    assert [row.ratio for row in nothing] == [None, None]
    assert mean_log_ratio(nothing) is None
    assert mean_log_ratio([*ROWS, *nothing]) == pytest.approx(0, abs=1e-9)
    assert rank_correlation(ROWS) == 0.5
    assert rank_correlation(ROWS[:1]) is None
    assert json.loads(json.dumps([row.as_json() for row in nothing]))[0]["ratio"] is None
