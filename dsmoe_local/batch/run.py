"""Run a prepared batch: start requests, write their records, and survive crashes of the engine."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started, ignore
from dsmoe_local.batch.job import Job
from dsmoe_local.batch.line_engine import Collector, LineEngine, Result, failure_of
from dsmoe_local.batch.lines import Line
from dsmoe_local.batch.summary import BatchSummary, Speedometer
from dsmoe_local.batch.writer import Acknowledgment, Records, received, record_of
from dsmoe_local.engine.errors import EngineError, WorkerLostError
from dsmoe_local.engine.interface import TextEngine

POLL_SECONDS = 0.1  # the longest time until `stop` is noticed
REPORT_SECONDS = 0.5
_CANCEL_SECONDS = 1.5  # the longest wait for replies that are being cancelled
MAX_AHEAD = 1024  # with `ordered`: replies that wait for the reply to an earlier line


def run(
    engine: TextEngine, job: Job, listen: Listener = ignore, stop: threading.Event | None = None
) -> BatchSummary:
    """Answer the lines of a job that have no record yet.

    A record counts once it is synced. A line that fails becomes an error record. If the engine's process dies
    or llama.cpp fails, the running requests are retried one at a time; a request that also fails on its own
    becomes an error record. Setting `stop` cancels the running replies and raises InterruptedRunError.

    Raises FileError if the output cannot be written or the model was replaced, ErrorLimitError, and the error
    of a model that cannot be loaded again.
    """
    job.check_model()
    job.require(engine.info)
    stop = stop or threading.Event()
    with running(job, engine.info.name, listen, stop):
        work = _Run(engine, job, listen, stop)
        try:
            work.until_done()
        finally:
            work.end()
        work.records.check_complete(stopped=stop.is_set())
    return job.summary


@contextmanager
def running(job: Job, model: str, listen: Listener, stop: threading.Event) -> Iterator[None]:
    """Open the output for the block, which answers all lines with the model of that name. Report it."""
    job.output.open()
    if job.index.model_named not in ("", model):
        listen(Note(f"{model} answers all lines, including those that name another model"))
    listen(Started("answering", job.summary.n_requests, job.summary.n_requests - job.plan.n_lines, "records"))
    began = time.perf_counter()
    try:
        yield
    finally:
        job.summary.seconds = time.perf_counter() - began
    listen(Finished("answering"))
    job.finish(listen, stop)


class _Run:
    """The main loop. A single queue delivers finished requests, written records, and the writer's error."""

    def __init__(self, engine: TextEngine, job: Job, listen: Listener, stop: threading.Event) -> None:
        self._engine = engine
        self._job = job
        self._listen = listen
        self._stop = stop
        self._inbox: queue.SimpleQueue[Collector | Acknowledgment] = queue.SimpleQueue()
        self._lines = LineEngine(engine, job.options, self._inbox.put)
        self.records = Records(job, listen, self._inbox.put)
        self._suspects: list[int] = []
        self._next = 0
        self._speed = Speedometer()
        self._reported = time.perf_counter()

    def until_done(self) -> None:
        """Work until every record counts, `stop` is set, or too many lines have failed."""
        records = self.records
        while not (records.complete or self._stop.is_set() or records.too_many_failed):
            try:
                self._fill()
            except InterruptedRunError:
                # `stop` ended the reload of a model after a crash.
                if not self._stop.is_set():
                    raise
                return
            self._take(POLL_SECONDS)
            self._report()

    def end(self) -> None:
        """Cancel the running requests and write the finished records."""
        try:
            self._lines.cancel_all()
            deadline = time.perf_counter() + _CANCEL_SECONDS
            while self._lines.running and time.perf_counter() < deadline:
                self._take(POLL_SECONDS, ending=True)
        finally:
            self.records.close()
        self._take(0, ending=True)

    def _fill(self) -> None:
        """Start requests until the engine has enough of them. After a crash, start one suspect at a time."""
        running, records = self._lines.running, self.records
        if self._suspects:
            if not running:
                # `encode` loads the model again here, so that a load error is not blamed on the suspect.
                self._job.check_model()
                self._engine.encode("a")
                self._begin(self._suspects.pop(0), alone=True)
            return
        if any(collector.alone for collector, _ in running.values()):
            return
        while (
            self._next < self._job.plan.n_lines
            and len(running) < self._lines.capacity
            and not records.behind
            and self._next - records.n_put < MAX_AHEAD
            and not self._suspects
            and not records.too_many_failed
        ):
            self._next += 1
            self._begin(self._next - 1)

    def _begin(self, task: int, *, alone: bool = False) -> None:
        line = self._job.line(task)
        self._accept(task, line, self._lines.begin(task, line, alone=alone), alone=alone)

    def _take(self, seconds: float, *, ending: bool = False) -> None:
        """Handle what is in the inbox; wait up to `seconds` for the first item."""
        for item in received(self._inbox, seconds):
            if not isinstance(item, Collector):
                self.records.confirm(item)
            elif ending and item.error is not None:
                del self._lines.running[item.task]
            else:
                self._accept(item.task, item.line, self._lines.settle(item), alone=item.alone)

    def _accept(self, task: int, line: Line, result: Result, *, alone: bool) -> None:
        """Write a record, or queue the request for a retry; if it crashed on its own, its line has failed."""
        if isinstance(result, EngineError):
            if alone and isinstance(result, WorkerLostError):
                raise result  # not the fault of the line
            if not alone:
                self._retry(task, result)
                return
            result = failure_of(line, result)
        if result is not None:
            self._job.summary.count_tokens(result)
            self.records.add(task, record_of(self._job.options.form, line, result))

    def _retry(self, task: int, error: EngineError) -> None:
        if not self._suspects:
            self._listen(Note(f"{error.what}: the lines it was working on are retried one at a time"))
        self._suspects.append(task)

    def _report(self) -> None:
        now = time.perf_counter()
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            detail = self._speed.detail(self._job.summary, self._lines.n_running_tokens)
            self._listen(Advanced(0, detail))
