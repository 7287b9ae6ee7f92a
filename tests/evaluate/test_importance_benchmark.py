"""The benchmark of importance matrices: what it finds where two files differ, and where a program fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.imatrix import SAME, Bench, differences
from benchmarks.support.tools import Failure
from dsmoe_quantize.imatrix import Imatrix, Statistics

DENSE, ROUTED = "blk.0.attn_q.weight", "blk.1.ffn_down_exps.weight"


def matrix(scale: float = 1.0, more: int = 0, seen: int = 1) -> Imatrix:
    """Three experts of which the last was seen `seen` times; the second has `scale` in place of 1."""
    entries = {
        DENSE: Statistics(np.full((1, 4), 50, np.float32), np.array([10])),
        ROUTED: Statistics(
            np.array([[3] * 4, [5 * scale] * 4, [seen] * 4], np.float32), np.array([3, 5, seen])
        ),
    }
    entries[DENSE].counts[0] += more
    entries[DENSE].sums[0] *= (10 + more) / 10
    return Imatrix(entries, (), 1, 10)


def test_the_worst_expert_is_found() -> None:
    """Guards: sums that are compared without their counts, an expert that others make up for, NaN where
    nothing was seen.
    """
    alike = differences(matrix(), matrix())
    assert [row.result for row in alike] == [0, 0]
    assert alike[0].passed
    squares, counts = differences(matrix(1.001), matrix())
    assert squares.result == pytest.approx(1000, rel=1e-3)
    assert squares.note == ROUTED
    assert squares.result > SAME.value
    assert squares.passed is False
    assert counts.result == 0
    fewer = replace(matrix(), entries={ROUTED: matrix().entries[ROUTED]})
    with pytest.raises(Failure, match="attn_q"):
        differences(fewer, matrix())
    squares, counts = differences(matrix(more=2), matrix())
    assert squares.result == pytest.approx(0, abs=1)
    assert (counts.result, counts.note) == (2, DENSE)
    assert differences(matrix(seen=0), matrix(seen=0))[0].result == 0


@pytest.mark.parametrize(
    ("lines", "status"), [("computing over 2 chunks", 0), ("computing over\nFinal estimate", 1)]
)
def test_a_program_that_fails_gives_no_figure(lines: str, status: int, tmp_path: Path) -> None:
    """Guards: a speed of a run that has read nothing, or only half."""
    program = tmp_path / "llama-imatrix"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{lines}'\nexit {status}\n")
    program.chmod(0o755)
    bench = Bench(Path("m.gguf"), Path("t.txt"), tmp_path, tmp_path, 2, 16, 1)
    with pytest.raises(Failure):
        bench.theirs()
    program.write_text("#!/bin/sh\necho computing over\necho Final estimate\n")
    assert bench.theirs() > 0
