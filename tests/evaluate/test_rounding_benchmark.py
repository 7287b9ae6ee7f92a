"""The benchmark of calibrated rounding: from a checkpoint to its report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import WIDE, write_checkpoint

from benchmarks import rounding
from benchmarks.rounding import measure
from benchmarks.support.quality.choices import calibration_of
from benchmarks.support.quality.fidelity import Amount, Subject, prepared
from dsmoe_local.evaluate.text import Text, built_in
from dsmoe_quantize.calibrated.calibration import Rounding
from dsmoe_quantize.policy.types import resolve


def test_each_file_is_compared_with_its_base(tmp_path: Path) -> None:
    """Guards: a seed without effect, a base that is rounded in the same way, a ratio of other windows."""
    folder = write_checkpoint(tmp_path / "checkpoint", WIDE, form="single")
    text = built_in().content
    subject = Subject("tiny", folder, Text("a", text[:1500]), Text("b", text[3000:7000]))
    with prepared(subject, Amount(2, 3, 1, n_context=64)) as bench:
        found = list(measure(bench, subject, ["IQ4_NL"], [Rounding.NEAREST, Rounding.GPTQ], 2))
    assert [each.measure for each in found] == [
        "IQ4_NL, nearest, seed 0",
        "IQ4_NL, nearest, seed 1",
        "IQ4_NL, gptq, seed 0",
        "IQ4_NL, gptq, seed 1",
    ]
    for each in found:
        assert each.ours != each.theirs
        assert each.result == pytest.approx(each.ours / each.theirs, rel=1e-4)
        assert each.spread is not None
        assert each.spread[0] <= each.result <= each.spread[1]
    assert found[2].ours != found[3].ours != found[1].ours


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
