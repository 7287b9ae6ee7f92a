"""Runs that are killed at a named point or at any moment, in child processes.

The children are forked from a server that has already imported what they need, so that each starts in
milliseconds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from dsmoe_local.base import faults
from dsmoe_local.base.faults import POINTS
from dsmoe_local.base.progress import Advanced, Event, Listener
from dsmoe_quantize.write import pipeline

_REPEATED = frozenset({"output.slab", "output.synced", "output.journaled"})
_FEW = frozenset({"split.renamed"})
_PRELOADED = ["dsmoe_convert.sources", "pytest", "support.batches", "support.checkpoints", "support.kills"]


@cache
def _context() -> ForkServerContext:
    """Start the server. Before Python 3.13 it finds modules only by PYTHONPATH, and ignores missing ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Job:
    """A function that writes `out`, called in a child process with `arguments` and `out`.

    Tensors are synced and journaled after `sync_bytes` (by default each on its own), so that there is much to
    resume.
    """

    work: Callable[..., object]
    arguments: Sequence[str]
    out: Path
    sync_bytes: int = 1

    def spawn(self, fault: str = "") -> Child:
        """Return the running child when it begins to work. It is killed at the named point `fault`."""
        ours, theirs = _context().Pipe()
        arguments = [*self.arguments, str(self.out)]
        process = _context().Process(target=_run, args=(theirs, self.work, arguments, self.sync_bytes, fault))
        process.start()
        theirs.close()
        assert ours.recv() == "started"
        return Child(process, ours)

    def run(self, fault: str = "") -> tuple[int, str]:
        """Return the exit status and the error of one run, killed at a named point if one is given."""
        return self.spawn(fault).ending()

    @property
    def journal(self) -> Path:
        """The journal of an unfinished run."""
        return self.out.with_name(f".{self.out.name}.part.journal")

    def content(self) -> bytes | None:
        """Return the output that somebody would use, or None."""
        return self.out.read_bytes() if self.out.exists() else None

    def is_clean(self) -> bool:
        """Return True if nothing but the output is left in its folder."""
        return [path.name for path in self.out.parent.iterdir()] == [self.out.name]


class Child:
    """A running job."""

    def __init__(self, process: ForkServerProcess, connection: Connection) -> None:
        self._process = process
        self._connection = connection

    def kill_after(self, seconds: float) -> None:
        """Kill the child unless it ends earlier."""
        self._process.join(seconds)
        self._process.kill()

    def ending(self) -> tuple[int, str]:
        """Wait until the child ends. Return its exit status and its traceback, or ""."""
        self._process.join()
        status = self._process.exitcode
        assert status is not None
        try:
            return status, self._connection.recv()
        except EOFError:
            return status, ""


def _run(
    connection: Connection, work: Callable[..., object], arguments: list[str], sync_bytes: int, fault: str
) -> None:
    os.environ["DSMOE_FAULT"] = fault
    importlib.reload(faults)  # it reads the environment once
    pipeline.SYNC_BYTES, pipeline.SYNC_SECONDS = sync_bytes, 0.01
    connection.send("started")
    try:
        work(*arguments)
    except BaseException:  # noqa: BLE001 - the parent shows it
        connection.send(traceback.format_exc())
        raise SystemExit(1) from None


def paced(out: Path) -> Listener:
    """A listener that holds the encoder back until the journal is at most a few tensors behind.

    So a tiny model is journaled in many steps however slow the disk is. Its encoder must have one thread.
    """
    journal = Job(print, [], out).journal
    begun: set[str] = set()

    def listen(event: Event) -> None:
        if isinstance(event, Advanced):
            begun.add(event.detail)
            # Line 1 is the fingerprint; two tensors may be in the hands of workers, one of them this one.
            while journal.read_bytes().count(b"\n") - 1 < len(begun) - 3:
                time.sleep(0.0005)

    return listen


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
    assert child.ending() == (0, "")
    duration = time.monotonic() - began
    assert job.content() == expected
    job = make_job()
    n_killed = 0
    while n_killed < n_kills:
        child = job.spawn()
        child.kill_after(generator.uniform(0, duration))
        status, errors = child.ending()
        assert_whole_or_absent(job, expected)
        assert status in (0, -signal.SIGKILL), errors
        n_killed += status == -signal.SIGKILL
        if job.content() is not None and not job.journal.exists():
            job = make_job()
    status, errors = job.run()
    assert status == 0, errors
    assert job.content() == expected
    assert job.is_clean()


def assert_whole_or_absent(job: Job, expected: bytes) -> None:
    """No half output under the final names, ever."""
    assert job.content() in (None, expected)
