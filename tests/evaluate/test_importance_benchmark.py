"""The benchmark of importance matrices: what it finds where two files differ, and where a program fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import imatrix as benchmark
from benchmarks.imatrix import SAME, TYPES, Bench, differences, encoding
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
    squares, counts = differences(matrix(more=2), matrix())
    assert squares.result == pytest.approx(0, abs=1)
    assert (counts.result, counts.note) == (2, DENSE)
    assert differences(matrix(seen=0), matrix(seen=0))[0].result == 0


def test_other_tensors_are_no_difference_but_a_failure() -> None:
    """Guards: a tensor that one of both has left out, unseen."""
    fewer = matrix()
    with pytest.raises(Failure, match="attn_q"):
        differences(replace(fewer, entries={ROUTED: fewer.entries[ROUTED]}), matrix())


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


def script(path: Path, lines: str) -> Path:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


def test_both_read_with_the_same_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: two programs compared of which one has all cores."""
    answer = '{"n_windows": 2, "tokens_per_second": 5.5}'
    script(tmp_path / "dsmoe", f"echo \"$@\" > {tmp_path}/ours; echo '{answer}'")
    script(
        tmp_path / "llama-imatrix",
        f'echo "$@" > {tmp_path}/theirs; echo computing over; echo Final estimate',
    )
    monkeypatch.setattr(benchmark, "_program", lambda name: tmp_path / name)
    bench = Bench(Path("m.gguf"), Path("t.txt"), tmp_path, tmp_path, 2, 16, 3)
    assert bench.ours() == 5.5
    bench.theirs()
    for who in ("ours", "theirs"):
        assert " -t 3" in (tmp_path / who).read_text()
        assert "-c 16 --chunks 2" in (tmp_path / who).read_text()


def test_each_type_is_encoded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a claim of docs/imatrix.md about a type that was timed mixed with others, or never."""
    for name in ("dsmoe-quantize", "llama-quantize"):
        script(tmp_path / name, f'echo "$@" >> {tmp_path}/{name}.log')
    monkeypatch.setattr(benchmark, "_program", lambda name: tmp_path / name)
    # So short a process takes no time that could be divided by.
    monkeypatch.setattr(benchmark, "_of_children", iter(range(10**6)).__next__)
    bench = Bench(Path("m.gguf"), Path("t.txt"), tmp_path, tmp_path, 2, 16, 3)
    rows = encoding(bench, 1)
    assert len(rows) == 3 * len(TYPES)
    told = (Path(__file__).parents[2] / "docs" / "imatrix.md").read_text()
    for kind in TYPES:
        assert kind in told or (kind.startswith("IQ4") and "the IQ4 types" in told)
        for name in ("dsmoe-quantize", "llama-quantize"):
            lines = (tmp_path / f"{name}.log").read_text().splitlines()
            lines = [line for line in lines if kind in line.split()]
            assert all("--pure" in line for line in lines)
            assert sorted({"--imatrix" in line for line in lines}) == [False, True]
    last = [row for row in rows if "with by without" in row.measure]
    assert [row.measure.partition(",")[0] for row in last] == list(TYPES)
