"""Run a prepared batch on a cluster: hand out lines, write records as they arrive, replace lost workers.

The journal, the output and the index are those of a run on this machine, and so are their rules. What has not
been answered is not journaled, so the next run hands it out again.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started, ignore
from dsmoe_local.base.text import count
from dsmoe_local.batch.cluster.interface import (
    Answer,
    Cluster,
    Event,
    Item,
    Joined,
    Lost,
    Refused,
    Report,
    Reported,
)
from dsmoe_local.batch.cluster.scheduler import Scheduler
from dsmoe_local.batch.job import Job
from dsmoe_local.batch.line_engine import failure_of
from dsmoe_local.batch.lines import Key
from dsmoe_local.batch.output import Record
from dsmoe_local.batch.run import MAX_AHEAD, POLL_SECONDS, REPORT_SECONDS, running
from dsmoe_local.batch.sources import Span
from dsmoe_local.batch.summary import BatchSummary, WorkerSummary
from dsmoe_local.batch.writer import Acknowledgment, Records, received, record_of
from dsmoe_local.engine.errors import WorkerLostError
from dsmoe_local.engine.process.child import SILENT_SECONDS
from dsmoe_local.engine.types import ModelInfo
from dsmoe_local.protocol.errors import describe

_SPEED_SECONDS = 15.0
_MAX_SPEEDS = 4  # the speeds of more workers are shown as a range
_STALLED = f"no progress for {SILENT_SECONDS:g} s"

Clock = Callable[[], float]


def run_on_cluster(
    cluster: Cluster,
    job: Job,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
    clock: Clock = time.perf_counter,
) -> BatchSummary:
    """Answer the lines of a job that have no record yet with the workers of a cluster.

    `batch.run.run` says what is guaranteed. The lines of a worker that is lost, or makes no progress, are
    handed out again; a line that is lost with several workers becomes an error record. Nodes that cannot be
    used are reported as notes; if none is left, `Cluster.poll` raises the error.
    """
    stop = stop or threading.Event()
    events, info = _until_joined(cluster, listen, stop)
    job.require(info)
    with running(job, info.name, listen, stop):
        work = _Run(cluster, job, job.loaded(info), listen, clock)
        try:
            work.handle(events)
            work.until_done(stop)
        finally:
            work.end()
        work.records.check_complete(stopped=stop.is_set())
    return job.summary


def _until_joined(cluster: Cluster, listen: Listener, stop: threading.Event) -> tuple[list[Event], ModelInfo]:
    """Wait for the first worker. Return the events up to then, and the model that the worker has loaded."""
    events: list[Event] = []
    listen(Started("starting workers", 1, unit="workers"))
    while True:
        found = cluster.poll(POLL_SECONDS)
        events += found
        _announce(found, listen)
        joined = next((event for event in found if isinstance(event, Joined)), None)
        if joined is not None:
            listen(Finished("starting workers"))
            return events, joined.info
        if stop.is_set():
            raise InterruptedRunError(
                "interrupted: no worker is ready yet", remedy="run the same command again"
            )


def _announce(events: Sequence[Event], listen: Listener) -> None:
    """Tell the user about workers and nodes that were lost or cannot be used."""
    for event in events:
        if isinstance(event, Lost):
            listen(
                Note(
                    f"a worker on {event.node} was lost; others answer the lines that it had: {event.reason}"
                )
            )
        elif isinstance(event, Refused):
            listen(Note(f"a worker on {event.node} cannot be used: {describe(event.error)[1]}"))


@dataclass(slots=True)
class _Worker:
    """What is known about a worker. `busy_since`: when it last made progress, or got work."""

    node: str
    summary: WorkerSummary
    busy_since: float
    reported: float
    progress: int = 0
    n_tokens: int = 0
    speed: float = 0.0  # tokens per second over the last _SPEED_SECONDS

    def update(self, report: Report, now: float) -> None:
        """Count what a report says."""
        if report.progress != self.progress:
            self.progress, self.busy_since = report.progress, now
        if now > self.reported:
            weight = -math.expm1((self.reported - now) / _SPEED_SECONDS)
            self.speed += weight * ((report.n_tokens - self.n_tokens) / (now - self.reported) - self.speed)
        self.summary.n_tokens += report.n_tokens - self.n_tokens
        self.summary.seconds += now - self.reported
        self.n_tokens, self.reported = report.n_tokens, now


class _Run:
    """The main loop. The cluster delivers answers, the inbox written records and the writer's error."""

    def __init__(
        self, cluster: Cluster, job: Job, loaded: Mapping[str, str], listen: Listener, clock: Clock
    ) -> None:
        self._cluster = cluster
        self._job = job
        self._loaded = loaded
        self._listen = listen
        self._clock = clock
        self._inbox: queue.SimpleQueue[Acknowledgment] = queue.SimpleQueue()
        self.records = Records(job, listen, self._inbox.put)
        self._scheduler = Scheduler(job.plan.n_lines, self._group, ordered=job.options.ordered)
        # Of tasks that are in groups or with workers, so that the index is read once for each group.
        self._entries: dict[int, tuple[Span, Key]] = {}
        self._workers: dict[str, _Worker] = {}
        self._idle: dict[str, None] = {}  # workers without a line, in the order in which they ran out
        self._n_ahead = MAX_AHEAD
        self._reported = clock()

    def until_done(self, stop: threading.Event) -> None:
        """Work until every record counts, `stop` is set, or too many lines have failed."""
        records = self.records
        while not (records.complete or stop.is_set() or records.too_many_failed):
            if records.behind or not self._scheduler.n_unanswered:
                self._confirm(POLL_SECONDS)
                continue
            events = self._cluster.poll(POLL_SECONDS)
            _announce(events, self._listen)
            self.handle(events)
            self._wake()
            self._confirm(0)
            self._watch()

    def end(self) -> None:
        """Write the finished records."""
        self.records.close()
        self._confirm(0)

    def handle(self, events: Sequence[Event]) -> None:
        """Handle what has happened in the cluster."""
        for event in events:
            if isinstance(event, Reported):
                self._take(event.worker, event.report)
            elif isinstance(event, Joined):
                self._join(event)
            else:
                reason = describe(event.error)[1] if isinstance(event, Refused) else event.reason
                self._lose(event.worker, event.node, reason)

    def _join(self, event: Joined) -> None:
        loaded = self._job.loaded(event.info)
        if self._job.options.deterministic and loaded != self._loaded:
            changed = [f"{name}: {value}" for name, value in loaded.items() if value != self._loaded[name]]
            self._cluster.discard(event.worker, for_good=True)
            self._listen(Note(f"{event.node} is not used: replies may differ there ({'; '.join(changed)})"))
            return
        if self._scheduler.is_bad(event.worker, event.node):
            self._refuse(event.worker, event.node)
            return
        now = self._clock()
        summaries = self._job.summary.workers
        summary = summaries.setdefault(event.worker, WorkerSummary(event.node))
        self._workers[event.worker] = _Worker(event.node, summary, now, now)
        self._scheduler.join(event.worker, event.capacity, event.node)
        self._n_ahead = max(MAX_AHEAD, 2 * event.capacity * len(self._workers))
        self._give(event.worker)

    def _take(self, worker: str, report: Report) -> None:
        now = self._clock()
        self._workers[worker].update(report, now)
        for answer in report.answers:
            self._accept(worker, answer, now)
        if report.crash is None:
            self._give(worker)
            return
        alone = self._scheduler.is_alone(worker)
        failed = self._scheduler.crash(worker)
        node = self._workers.pop(worker).node
        for task in failed:
            self._fail(task, report.crash)
        if self._scheduler.is_bad(worker, node):
            self._refuse(worker, node)
            return
        if not alone:
            self._listen(Note(f"{node}: {report.crash.what}: its lines are retried one at a time"))
        self._cluster.reload(worker)

    def _refuse(self, worker: str, node: str) -> None:
        """Use a worker no more that fails with lines that others can answer."""
        self._scheduler.lose(worker)
        self._cluster.discard(worker, for_good=True)
        self._listen(Note(f"a worker on {node} is not used any more: other workers answer lines that end it"))

    def _give(self, worker: str) -> bool:
        """Give a worker its next lines. False if it has nothing to do; it then waits in `_idle`."""
        now, job, scheduler = self._clock(), self._job, self._scheduler
        items: list[Item] = []
        if not scheduler.holds(worker):
            self._workers[worker].busy_since = now
        if not self.records.too_many_failed:
            before = self.records.n_put + self._n_ahead if job.options.ordered else job.plan.n_lines
            tasks = scheduler.take(worker, now, before)
            items = [Item(task, job.line_at(*self._entries[task])) for task in tasks]
        if not scheduler.holds(worker):
            self._idle[worker] = None
            return False
        self._idle.pop(worker, None)
        self._cluster.give(worker, items)
        return True

    def _wake(self) -> None:
        """Give lines to idle workers, if there are some again."""
        for worker in list(self._idle):
            if not self._give(worker) and not self._scheduler.n_suspects:
                break

    def _group(self, task: int, n_most: int) -> int:
        entries = self._job.index.group(task, n_most)
        self._entries.update(enumerate(entries, task))
        return len(entries)

    def _accept(self, worker: str, answer: Answer, now: float) -> None:
        if not self._scheduler.answer(worker, answer.task, now):
            return  # another worker was faster
        _, key = self._entries.pop(answer.task)
        summary = self._job.summary
        summary.n_prompt_tokens += answer.n_prompt_tokens
        summary.n_cached_tokens += answer.n_cached_tokens
        summary.n_completion_tokens += answer.n_completion_tokens
        self._workers[worker].summary.n_records += 1
        self.records.add(answer.task, Record(key, answer.content, answer.failure))

    def _lose(self, worker: str, node: str, reason: str) -> None:
        """Hand out the lines of a worker again. A line that was lost too often has failed."""
        self._idle.pop(worker, None)
        self._workers.pop(worker, None)
        what = f"the worker that had this line was lost, repeatedly; the last one on {node}: {reason}"
        for task in self._scheduler.lose(worker):
            self._fail(task, WorkerLostError(what))

    def _fail(self, task: int, error: DsmoeError) -> None:
        line = self._job.line_at(*self._entries.pop(task))
        self._scheduler.fail(task)
        self.records.add(task, record_of(self._job.options.form, line, failure_of(line, error)))

    def _confirm(self, seconds: float) -> None:
        """Count the records that are written; wait up to `seconds` for the first of them."""
        for item in received(self._inbox, seconds):
            self.records.confirm(item)

    def _watch(self) -> None:
        """Replace workers that make no progress, and report the speeds."""
        now = self._clock()
        if now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        for worker, state in list(self._workers.items()):
            if self._scheduler.holds(worker) and now - state.busy_since > SILENT_SECONDS:
                self._listen(Note(f"a worker on {state.node} is replaced: {_STALLED}"))
                self._cluster.discard(worker, for_good=False)
                self._lose(worker, state.node, _STALLED)
        self._listen(Advanced(0, self._detail()))

    def _detail(self) -> str:
        """Return the speeds of the workers, and what waits, in at most 40 characters."""
        speeds = sorted((state.speed for state in self._workers.values()), reverse=True)
        if len(speeds) > _MAX_SPEEDS:
            told = f"{speeds[-1]:.0f}–{speeds[0]:.0f}"
        else:
            told = "+".join(f"{speed:.0f}" for speed in speeds) or "0"
        parts = [f"{count(len(speeds), 'worker')} {told}/s", f"{self._scheduler.n_waiting:,} wait"]
        if self._cluster.n_starting:
            parts.append(f"{self._cluster.n_starting} start")
        return ", ".join(parts)
