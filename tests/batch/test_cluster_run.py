"""Batches on a simulated cluster, with a real input, journal and output: every record once."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.batches import batch, by_id, records

from benchmarks.support.simulated_cluster import CRASH, INFO, Behaviour, SimulatedCluster
from dsmoe_local.base.errors import FileError, InterruptedRunError
from dsmoe_local.base.progress import Advanced, Event, Note
from dsmoe_local.batch.cluster import interface
from dsmoe_local.batch.cluster.interface import Item, Joined, Lost, Refused, Report, Reported
from dsmoe_local.batch.cluster.run import run_on_cluster
from dsmoe_local.batch.job import BatchOptions, prepared
from dsmoe_local.batch.lines import Line
from dsmoe_local.batch.summary import BatchSummary
from dsmoe_local.batch.writer import ErrorLimitError

N_LINES = 300


def content(line: Line) -> bytes:
    return json.dumps({"id": line.id, "text": line.values["prompt"], "error": None}).encode() + b"\n"


def options_of(folder: Path, n_lines: int = N_LINES, **changes: Any) -> BatchOptions:
    return batch(folder, *({"id": str(n), "prompt": f"p{n}"} for n in range(n_lines)), **changes)


def behaviour(**changes: Any) -> Behaviour:
    return replace(Behaviour(n_workers=4, record=content), **changes)


def run(
    cluster: SimulatedCluster, options: BatchOptions, stop: threading.Event | None = None
) -> tuple[BatchSummary, list[Event]]:
    events: list[Event] = []
    with prepared(options) as job:
        return run_on_cluster(cluster, job, events.append, stop, cluster.clock), events


def check(options: BatchOptions, n_lines: int = N_LINES) -> None:
    found = by_id(records(options.out))
    assert {name: record["text"] for name, record in found.items()} == {
        str(n): f"p{n}" for n in range(n_lines)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_slow": 2},
        {"seconds_to_death": 20.0},
        {"seconds_to_hang": 100.0},
        {"n_workers": 30, "n_slow": 10, "seconds_to_death": 40.0, "seconds_to_hang": 100.0},
        {"more_seconds": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("ordered", [False, True])
def test_every_record_once(tmp_path: Path, changes: dict[str, Any], ordered: bool) -> None:
    """Guards: records that are lost or doubled when workers are slow, die or hang."""
    options = options_of(tmp_path, ordered=ordered)
    cluster = SimulatedCluster(behaviour(**changes), seed=1)
    summary, _ = run(cluster, options)
    check(options)
    assert summary.n_records == N_LINES
    assert sum(worker.n_records for worker in summary.workers.values()) == N_LINES
    assert summary.n_completion_tokens == 40 * N_LINES
    if ordered:
        assert [record["id"] for record in records(options.out)] == [str(n) for n in range(N_LINES)]


def test_a_line_that_crashes_engines(tmp_path: Path) -> None:
    """Guards: a line that is handed out for ever; lines beside it that fail with it."""
    options = options_of(tmp_path)
    summary, events = run(SimulatedCluster(behaviour(kills=lambda line: line.id == "77")), options)
    found = by_id(records(options.out))
    assert [name for name, record in found.items() if record["error"]] == ["77"]
    assert found["77"]["error"]["code"] == "engine_crash_error"
    assert "SIGSEGV" in found["77"]["error"]["message"]
    assert len(found) == N_LINES
    assert summary.n_failed == 1
    assert any("retried one at a time" in event.text for event in events if isinstance(event, Note))


class Broken(SimulatedCluster):
    """A cluster whose first worker crashes with every line. Each worker is on a node of its own."""

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(behaviour)
        self.discarded: list[str] = []

    def poll(self, seconds: float) -> Sequence[interface.Event]:
        return [self.changed(event) for event in super().poll(seconds)]

    def changed(self, event: interface.Event) -> interface.Event:
        if isinstance(event, Joined):
            return replace(event, node=f"node of {event.worker}")
        if isinstance(event, Reported) and event.worker == "worker-0" and event.report.answers:
            return Reported(event.worker, Report((), CRASH))
        return event

    def discard(self, worker: str, *, for_good: bool) -> None:
        self.discarded.append(worker)
        super().discard(worker, for_good=for_good)


@pytest.mark.parametrize("n_workers", [2, 4, 20])
@pytest.mark.parametrize("ordered", [False, True])
def test_one_broken_node(tmp_path: Path, n_workers: int, ordered: bool) -> None:
    """Guards: lines that fail only because one machine is broken; a machine that crashes for ever."""
    options = options_of(tmp_path, ordered=ordered)
    cluster = Broken(behaviour(n_workers=n_workers, seconds=20.0))
    summary, events = run(cluster, options)
    check(options)
    assert summary.n_failed == 0
    notes = [event.text for event in events if isinstance(event, Note)]
    told = "a worker on node of worker-0 is not used any more"
    if n_workers < 20:  # not over before
        assert cluster.discarded == ["worker-0"]
        assert sum(told in note for note in notes) == 1, notes


def test_many_bad_lines_leave_good_nodes(tmp_path: Path) -> None:
    """Guards: good machines that are given up because a part of the input crashes engines."""
    options = options_of(tmp_path)

    class Good(Broken):
        def changed(self, event: interface.Event) -> interface.Event:
            return replace(event, node=event.worker) if isinstance(event, Joined) else event

    cluster = Good(behaviour(kills=lambda line: 100 <= int(line.id) < 120))
    summary, _ = run(cluster, options)
    assert summary.n_failed == 20
    assert cluster.discarded == []


def test_the_reason_of_losses(tmp_path: Path) -> None:
    """Guards: an error record that says that workers were lost, and not why."""
    options = options_of(tmp_path, 1)
    lost: list[interface.Event] = []
    for number in range(4):
        lost += [
            Joined(f"w{number}", "host", INFO, 1),
            Lost(f"w{number}", "host", "OutOfMemoryError: killed"),
        ]
    run(Scripted(*lost), options)
    (record,) = records(options.out)
    assert record["error"]["code"] == "worker_lost_error"
    assert "the last one on host: OutOfMemoryError: killed" in record["error"]["message"]


def test_too_many_failed_lines(tmp_path: Path) -> None:
    """Guards: --max-errors that does not stop a cluster."""
    options = options_of(tmp_path, max_errors=2)
    with pytest.raises(ErrorLimitError, match="more than --max-errors 2"):
        run(SimulatedCluster(behaviour(kills=lambda line: True)), options)
    assert len(records(options.out)) < 10


def test_interrupted_and_continued(tmp_path: Path) -> None:
    """Guards: records that are written again by the next run, or on another number of workers."""
    options = options_of(tmp_path)
    stop = threading.Event()
    cluster = SimulatedCluster(behaviour())

    class Stopping(SimulatedCluster):
        def poll(self, seconds: float) -> Sequence[interface.Event]:
            if self.n_lines > 100:
                stop.set()
            return super().poll(seconds)

    with pytest.raises(InterruptedRunError, match="records are written"):
        run(Stopping(behaviour()), options, stop)
    n_first = len(records(options.out))
    assert 0 < n_first < N_LINES
    summary, _ = run(cluster, options)
    assert summary.n_resumed == n_first
    assert cluster.n_lines <= N_LINES - n_first + 32  # and copies of late lines
    check(options)


def test_slow_workers_cost_little(tmp_path: Path) -> None:
    """Guards: a batch that ends when its slowest worker does. The ideal time is that of the speeds' sum."""
    options = options_of(tmp_path, 2000)
    cluster = SimulatedCluster(behaviour(n_workers=20, n_slow=5, spread=0.5, speed_spread=0.0))
    run(cluster, options)
    ideal = 2000 * 0.4 / (4 * (15 + 5 * 0.1))
    assert cluster.now < 1.25 * ideal
    assert cluster.n_lines < 1.1 * 2000


def test_a_slow_worker_with_ordered(tmp_path: Path) -> None:
    """Guards: --ordered that stands still at the limit of unwritten records, or beyond it in memory, while
    the worker with the first line is slow.
    """
    n_lines = 3000
    options = options_of(tmp_path, n_lines, ordered=True)

    class Stuck(SimulatedCluster):
        def give(self, worker: str, items: Sequence[Item]) -> None:
            if worker == "worker-0":
                self._workers[worker].speed = 1e-4
            super().give(worker, items)

    cluster = Stuck(behaviour())
    run(cluster, options)
    check(options, n_lines)
    assert cluster.now < 2 * n_lines * 0.4 / (3 * 4)


def test_a_new_worker_is_used(tmp_path: Path) -> None:
    """Guards: a node that is added and stays idle."""
    options = options_of(tmp_path, 2000)

    class Growing(SimulatedCluster):
        def poll(self, seconds: float) -> Sequence[interface.Event]:
            if self.n_lines > 300 and self.n_starting == 0 and len(self._workers) == 1:
                self.add_worker()
            return super().poll(seconds)

    summary, _ = run(Growing(behaviour(n_workers=1)), options)
    first, second = (worker.n_records for worker in summary.workers.values())
    assert first + second == 2000
    assert second > 500


def test_progress_names_workers_and_what_waits(tmp_path: Path) -> None:
    """Guards: a bar that says nothing about workers; a detail that the bar cuts off."""
    for n_workers in (1, 4, 1000):
        folder = tmp_path / str(n_workers)
        folder.mkdir()
        n_lines = 20 + 2 * n_workers
        _, events = run(
            SimulatedCluster(behaviour(n_workers=n_workers, seconds=2.0)), options_of(folder, n_lines)
        )
        details = [event.detail for event in events if isinstance(event, Advanced) and event.detail]
        assert details
        assert all(len(detail) <= 40 for detail in details), max(details, key=len)
        assert any("worker" in detail and "/s" in detail and "wait" in detail for detail in details)


class Scripted(SimulatedCluster):
    """A cluster with one event in front of the others."""

    def __init__(self, *events: interface.Event, n_workers: int = 0) -> None:
        super().__init__(behaviour(n_workers=n_workers))
        self.first = list(events)
        self.discarded: list[str] = []

    def poll(self, seconds: float) -> Sequence[interface.Event]:
        first, self.first = self.first, []
        return first or super().poll(seconds)

    def give(self, worker: str, items: Sequence[Item]) -> None:
        if worker in self._workers:
            super().give(worker, items)

    def discard(self, worker: str, *, for_good: bool) -> None:
        self.discarded.append(worker)


MISSING = FileError("the model is missing", where="/m.gguf", remedy="copy it there")


def test_one_node_without_the_model(tmp_path: Path) -> None:
    """Guards: a batch that fails because of one node; a node that is left out silently."""
    options = options_of(tmp_path)
    _, events = run(Scripted(Refused("w", "host", MISSING), Lost("v", "other", "gone"), n_workers=2), options)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert "a worker on host cannot be used: the model is missing; /m.gguf; copy it there" in notes
    assert any("a worker on other was lost" in note for note in notes)
    check(options)


def test_deterministic_on_equal_nodes_only(tmp_path: Path) -> None:
    """Guards: replies of a node that computes in another way; a journal of other settings continued."""
    options = options_of(tmp_path, deterministic=True)
    odd = Joined("odd", "odd host", replace(INFO, n_threads=7), 8)
    cluster = Scripted(Joined("first", "host", INFO, 8), odd, n_workers=2)
    _, events = run(cluster, options)
    assert cluster.discarded == ["odd"]
    told = next(event.text for event in events if isinstance(event, Note) and "odd host" in event.text)
    assert "replies may differ there (threads: 7)" in told
    check(options)
    options_of(tmp_path, N_LINES + 1)  # one line more
    with pytest.raises(FileError, match="threads: 1 then, 7 now"):
        run(Scripted(odd, n_workers=1), options)
