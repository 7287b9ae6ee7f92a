"""Batches killed at every named point and at random: every line answered exactly once in the end."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.batches import by_id, records, run_batch, write_lines
from support.fake_engine import FakeEngine
from support.kills import Child, Job, points_of

from dsmoe_local.batch import writer
from dsmoe_local.batch.job import BatchOptions
from dsmoe_local.engine.types import SamplingParameters
from dsmoe_local.protocol.requests import RequestDefaults

N_LINES = 60
REPEATED = ("batch.announced", "batch.record", "batch.written", "batch.synced", "batch.committed")


def work(source: str, piped: str, out: str) -> None:
    """The work of a child: a batch from a file or from standard input, on an engine without a model."""
    writer._MAX_GROUP = 8  # so that there is a third group on a slow disk, too
    defaults = RequestDefaults(SamplingParameters(temperature=1))
    named = Path("-") if piped else Path(source)
    options = BatchOptions([named], Path(out), defaults, "simple", deterministic=True)
    sys.stdin = Path(source).open()  # noqa: SIM115 - open until the process ends
    run_batch(FakeEngine(n_parallel=2), options)


@dataclass(frozen=True)
class Run:
    """A batch in a child process, from a file or from a pipe."""

    source: Path
    out: Path
    piped: bool = False

    def spawn(self) -> Child:
        """Start the child and return it when it begins to work."""
        return self._job.spawn()

    @property
    def _job(self) -> Job:
        return Job(work, [str(self.source), "piped" if self.piped else ""], self.out)

    def run(self, fault: str = "") -> int:
        """Return the exit status of a run, killed at a named point if one is given."""
        status, errors = self._job.run(fault)
        assert errors == ""
        return status

    def whole(self) -> bytes:
        """Return the complete records of the output."""
        content = self.out.read_bytes() if self.out.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def check(self, kept: bytes) -> None:
        """Check that every line has one record, and that the output still starts with `kept`."""
        assert self.out.read_bytes().startswith(kept)
        found = by_id(records(self.out))
        assert {name: record["text"] for name, record in found.items()} == {
            f"id-{number}": f"text {number} é\u2028" for number in range(N_LINES)
        }
        names = {path.name for path in self.out.parent.iterdir()}
        assert names == {"in.jsonl", "out.jsonl", "out.jsonl.journal"}


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Run]:
    """An endless iterator of runs, each in its own folder."""

    def make() -> Iterator[Run]:
        number = 0
        while True:
            folder = tmp_path / str(number)
            folder.mkdir()
            lines = ({"id": f"id-{n}", "prompt": f"text {n} é\u2028"} for n in range(N_LINES))
            yield Run(write_lines(folder / "in.jsonl", lines), folder / "out.jsonl", piped=number % 2 == 1)
            number += 1

    return make()


@pytest.mark.parametrize("point", points_of("batch"))
def test_batch_killed_at_every_point(runs: Iterator[Run], point: str) -> None:
    """Guards: a step of the write path at which a kill loses a record, or makes it appear twice."""
    for ordinal in (1, 3) if point in REPEATED else (1,):
        for run in (next(runs), next(runs)):
            if point == "batch.spooled" and not run.piped:
                continue
            assert run.run(f"{point}:{ordinal}") == -signal.SIGKILL, f"{point}:{ordinal} is never reached"
            kept = run.whole()
            assert run.run() == 0
            run.check(kept)


def test_spooled_input_serves_a_resume(runs: Iterator[Run]) -> None:
    """Guards: a run that cannot be continued without its pipe."""
    next(runs)
    run = next(runs)
    assert run.run("batch.written:3") == -signal.SIGKILL
    kept = run.whole()
    content = run.source.read_bytes()
    run.source.write_bytes(b"")
    assert run.run() == 0
    run.source.write_bytes(content)
    run.check(kept)


def test_a_wrong_pipe_does_no_harm(runs: Iterator[Run]) -> None:
    """Guards: the kept lines replaced by those of another input, which is then refused."""
    next(runs)
    run = next(runs)
    assert run.run("batch.written:3") == -signal.SIGKILL
    kept = run.whole()
    content = run.source.read_bytes()
    run.source.write_bytes(content.replace(b"text", b"other"))
    status, errors = run.spawn().ending()
    assert status == 1
    assert "a line has changed" in errors
    assert "standard input, line" in errors
    assert run.out.with_name("out.jsonl.input").read_bytes().startswith(content)
    run.source.write_bytes(b"")
    assert run.run() == 0
    run.source.write_bytes(content)
    run.check(kept)


def test_batch_killed_at_random(runs: Iterator[Run]) -> None:
    """Guards: a crash between two named points."""
    kill_at_random(runs, n_kills=8, seed=1)


@pytest.mark.soak
def test_batch_soak(runs: Iterator[Run]) -> None:
    """Guards: crashes that eight kills do not find."""
    kill_at_random(runs, n_kills=1000, seed=int(time.time()))


def kill_at_random(runs: Iterator[Run], n_kills: int, seed: int) -> None:
    """Kill one output's runs until one gets through, then go to the next."""
    generator = random.Random(seed)
    run, kept = next(runs), b""
    began = time.monotonic()
    assert run.run() == 0
    duration = time.monotonic() - began
    run, n_killed = next(runs), 0
    while n_killed < n_kills:
        child = run.spawn()
        child.kill_after(generator.uniform(0, duration))
        status, errors = child.ending()
        assert errors == "", (seed, n_killed)
        assert run.whole().startswith(kept), (seed, n_killed)
        kept = run.whole()
        n_killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            run.check(kept)
            run, kept = next(runs), b""
    assert run.run() == 0
    run.check(kept)


def test_journal_names_what_the_output_holds(runs: Iterator[Run]) -> None:
    """Guards: a journal that other programs cannot check."""
    run = next(runs)
    assert run.run() == 0
    lines = run.out.with_name("out.jsonl.journal").read_bytes().split(b"\n")[:-1]
    header, *rest = [json.loads(line[9:]) for line in lines]
    assert set(header) == {"dsmoe_batch", "settings", "loaded", "names"}
    assert rest[-1] == "committed"
    entries = [line for line in rest if line != "committed"]
    assert len(entries) == N_LINES
    assert {len(entry[0]) for entry in entries} == {32}
    assert sum(entry[1] for entry in entries) == run.out.stat().st_size
