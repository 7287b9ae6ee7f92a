"""The benchmark of calibrated rounding: from a checkpoint to its report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import WIDE, write_checkpoint

from benchmarks import rounding
from benchmarks.rounding import measure, report
from benchmarks.support.quality.calibrated import calibration_of
from benchmarks.support.quality.fidelity import Amount, Subject, prepared
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_quantize.calibrated.calibration import Rounding
from dsmoe_quantize.policy.types import resolve


def test_rows_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a base with other types or another size, a seed without effect, a ratio of other windows."""
    folder = write_checkpoint(tmp_path / "checkpoint", WIDE, form="single")
    text = built_in().content
    subject = Subject("tiny", folder, Text("a", text[:1500]), Text("b", text[3000:7000]))
    with prepared(subject, Amount(2, 3, 1, n_context=64)) as bench:
        found = list(measure(bench, subject, ["IQ4_NL"], [Rounding.NEAREST, Rounding.GPTQ], 2))
    assert [(each.rounding, each.seed) for each in found] == [
        ("nearest", 0),
        ("nearest", 1),
        ("gptq", 0),
        ("gptq", 1),
    ]
    for each in found:
        assert each.row.bits_per_weight == each.base.bits_per_weight
        assert each.row.windows != each.base.windows
        assert each.ratio[0] == pytest.approx(each.row.kl / each.base.kl, rel=1e-4)
    assert found[2].row.windows != found[3].row.windows != found[1].row.windows
    report(found, {"commit": "c"})
    *lines, last = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 5
    told = json.loads(last)
    assert [row["seed"] for row in told["rows"]] == [0, 1, 0, 1]
    missed = [line for line in lines if line.startswith("MISSED")]
    assert len(missed) == sum(row["holds"] is False for row in told["rows"])


def test_seeds_choose_windows() -> None:
    """Guards: a seed that reorders the same windows when there are more."""
    windows = np.arange(40, dtype=np.int32).reshape(10, 4)
    subject = Subject("s", Path(), Text("a", "a"), Text("b", "b"))
    first, again, other = (
        calibration_of(windows, subject, 3, Rounding.GPTQ, seed).tokens.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(first) != sorted(other)
    assert len(calibration_of(windows, subject, None, Rounding.GPTQ, 0).tokens) == 10


@pytest.mark.parametrize("word", rounding.TYPES)
def test_types_exist(word: str) -> None:
    """Guards: a type that is renamed."""
    assert resolve(word)
    assert all((word, way) in rounding.BARS for way in rounding.ROUNDINGS)
