"""Runs that are killed: a child process that reports when it starts to work, and a kill at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.faults import POINTS

_REPEATED = frozenset({"output.slab", "output.synced", "output.journaled"})
_FEW = frozenset({"split.renamed"})

_PRELUDE = """
import sys
from dsmoe_quantize.write import pipeline
pipeline.SYNC_BYTES = int(sys.argv.pop(1))
pipeline.SYNC_SECONDS = 0.01
"""


@dataclass(frozen=True)
class Job:
    """A piece of Python that writes `out` from `arguments`; imports first, `started()`, then the work.

    Tensors are synced and journaled after `sync_bytes` (by default each on its own), so that there is much to
    resume.
    """

    code: str
    arguments: Sequence[str]
    out: Path
    sync_bytes: int = 1

    def spawn(self, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """The running child, at the moment it begins to work."""
        code = _PRELUDE + "def started(): print('started', flush=True)\n" + self.code
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(self.sync_bytes), *self.arguments, str(self.out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n", child.communicate()[1]
        return child

    def run(self, fault: str = "") -> tuple[int, str]:
        """Exit status and stderr of one run, killed at a named point if one is given."""
        child = self.spawn({"DSMOE_FAULT": fault})
        _, errors = child.communicate()
        return child.returncode, errors

    @property
    def journal(self) -> Path:
        """The journal of an unfinished run."""
        return self.out.with_name(f".{self.out.name}.part.journal")

    def content(self) -> bytes | None:
        """The output that somebody would use; None if there is none."""
        return self.out.read_bytes() if self.out.exists() else None

    def is_clean(self) -> bool:
        """Whether nothing but the output is left in its folder."""
        return [path.name for path in self.out.parent.iterdir()] == [self.out.name]


def points_of(suite: str) -> list[str]:
    """The named points of one way of writing: `output` (converter, quantizer), `batch`."""
    return [point for point in POINTS if point.startswith(f"{suite}.")]


def check_every_point(make_job: Callable[[], Job], expected: bytes, *suites: str) -> None:
    """Kill at each named point, early and late; the next run must end in the expected bytes, and clean up.

    `suites` are those of `points_of` to visit besides `output`.
    """
    for point in (point for suite in ("output", *suites) for point in points_of(suite)):
        for ordinal in (1, 9) if point in _REPEATED else (1, 2) if point in _FEW else (1,):
            job = make_job()
            status, errors = job.run(f"{point}:{ordinal}")
            assert status == -signal.SIGKILL, f"{point}:{ordinal} is never reached; {errors}"
            assert_whole_or_absent(job, expected)
            status, errors = job.run()
            assert status == 0, f"after {point}:{ordinal}: {errors}"
            assert job.content() == expected, f"after {point}:{ordinal}"
            assert job.is_clean()


def check_random_kills(make_job: Callable[[], Job], expected: bytes, n_kills: int, seed: int) -> None:
    """Kill at random moments, on one output again and again until a run gets through, then on the next."""
    generator = random.Random(seed)
    job = make_job()
    child = job.spawn()
    began = time.monotonic()
    assert child.communicate() == ("", "")
    duration = time.monotonic() - began
    assert job.content() == expected
    job = make_job()
    n_killed = 0
    for _ in range(n_kills):
        child = job.spawn()
        try:
            child.wait(timeout=generator.uniform(0, duration))
        except subprocess.TimeoutExpired:
            child.kill()
        _, errors = child.communicate()
        assert_whole_or_absent(job, expected)
        assert child.returncode in (0, -signal.SIGKILL), errors
        n_killed += child.returncode == -signal.SIGKILL
        if job.content() is not None and not job.journal.exists():
            job = make_job()
    assert n_killed, "every run ended before it could be killed"
    status, errors = job.run()
    assert status == 0, errors
    assert job.content() == expected
    assert job.is_clean()


def assert_whole_or_absent(job: Job, expected: bytes) -> None:
    """No half output under the final names, ever."""
    assert job.content() in (None, expected)
