"""The work of a prepared batch: requests to the engine, outcomes to the writer, crashes survived."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, InterruptedRunError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started, ignore
from dsmoe_local.base.text import count
from dsmoe_local.batch.collector import Collector, reply_lead
from dsmoe_local.batch.job import BatchOptions, Job, prepared
from dsmoe_local.batch.journal import Record
from dsmoe_local.batch.lines import describe, kind_of
from dsmoe_local.batch.responses import FORMATS, Failure, Outcome
from dsmoe_local.batch.summary import BatchSummary, Speedometer, failures_in_words
from dsmoe_local.batch.writer import RecordWriter
from dsmoe_local.engine.errors import (
    EngineCrashError,
    EngineError,
    ModelLoadError,
    NativeError,
    OutOfMemoryError,
)
from dsmoe_local.engine.types import TextEngine, Ticket

_TICK = 0.1  # how long a stop may go unnoticed
_REPORT = 0.5
_PATIENCE = 1.5  # for replies that are being cancelled
_MOST_UNWRITTEN = 4096
_MOST_AHEAD = 1024  # replies that wait for an earlier line's, with `ordered`
# They end all that was worked on, whoever is to blame.
_SHARED = (EngineCrashError, NativeError)
# The model cannot be had any more: no line can be answered, and none is to blame.
_FATAL = (ModelLoadError, OutOfMemoryError, FileError, FormatError, InterruptedRunError)


class ErrorLimitError(DsmoeError):
    """More lines failed than were allowed; the records that are finished stay."""


def run_batch(
    engine: TextEngine,
    options: BatchOptions,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> BatchSummary:
    """Answer every line of the input that has no record yet. See `prepared` and `run` for what is raised."""
    with prepared(options, listen, stop) as job:
        return run(engine, job, listen, stop)


def run(
    engine: TextEngine, job: Job, listen: Listener = ignore, stop: threading.Event | None = None
) -> BatchSummary:
    """Answer what is left of a job.

    A record counts once it is synced. A line that fails becomes an error record, and the others go on. When
    the engine's process dies or llama.cpp fails, what it was working on is tried again, one request at a
    time; one that fails alone becomes an error record. Setting `stop` cancels the replies on their way and
    raises InterruptedRunError. Raises FileError (the disk), ErrorLimitError, and what keeps the model from
    being loaded again.
    """
    job.hold_to(engine.info)
    job.output.open()
    work = _Run(engine, job, listen, stop or threading.Event())
    if job.index.model_named not in ("", engine.info.name):
        listen(Note(f"{engine.info.name} answers all lines, whatever model they name"))
    listen(Started("answering", job.summary.n_requests, job.summary.n_requests - len(job.order), "records"))
    began = time.perf_counter()
    try:
        work.until_done()
    finally:
        work.end()
        job.summary.seconds = time.perf_counter() - began
    work.check_done()
    listen(Finished("answering"))
    job.finish()
    return job.summary


class _Run:
    """The loop. Everything reaches it through one queue: ended requests, and records that are on the disk."""

    def __init__(self, engine: TextEngine, job: Job, listen: Listener, stop: threading.Event) -> None:
        self._engine = engine
        self._lead = reply_lead(engine)
        self._job = job
        self._listen = listen
        self._stop = stop
        self._inbox: queue.SimpleQueue[Collector | Sequence[Record] | BaseException] = queue.SimpleQueue()
        self._writer = RecordWriter(job.output, self._inbox.put)
        self._in_flight = max(2 * engine.info.n_parallel, engine.info.n_parallel + 2)
        self._running: dict[int, tuple[Collector, Ticket]] = {}
        self._suspects: list[int] = []
        self._next = 0
        self._n_put = 0
        self._n_written = 0
        self._failures = Counter[str]()
        # With `ordered`: finished, but an earlier line is not. Else unused.
        self._waiting: dict[int, Outcome] = {}
        self._n_emitted = 0
        self._speed = Speedometer()
        self._reported = time.perf_counter()

    def until_done(self) -> None:
        """Work until every record counts."""
        while self._n_written < len(self._job.order) and not self._stop.is_set() and not self._too_many():
            try:
                self._fill()
            except InterruptedRunError:
                # The model was about to be loaded again.
                if not self._stop.is_set():
                    raise
                return
            self._take(_TICK)
            self._report()

    def end(self) -> None:
        """Cancel what runs, write what is finished."""
        try:
            for _, ticket in list(self._running.values()):
                ticket.cancel()
            deadline = time.perf_counter() + _PATIENCE
            while self._running and time.perf_counter() < deadline:
                self._take(_TICK, ending=True)
        finally:
            self._writer.close()
        self._take(0, ending=True)

    def _too_many(self) -> bool:
        most = self._job.options.max_errors
        return most is not None and self._failures.total() > most

    def check_done(self) -> None:
        """Raise what kept the work from being done."""
        job = self._job
        if self._n_written == len(job.order):
            reach("batch.complete")
        elif self._stop.is_set():
            n_records, n_requests = job.summary.n_records, job.summary.n_requests
            raise InterruptedRunError(
                f"interrupted: {n_records:,} of {count(n_requests, 'record')} are written",
                remedy="the same command goes on from there",
            )
        else:
            failures = failures_in_words(self._failures)
            raise ErrorLimitError(
                f"given up: {failures}, more than --max-errors {job.options.max_errors}",
                where=job.output.path,
                remedy="see the error records; the same command goes on with the other lines",
            )

    def _fill(self) -> None:
        """Start as many requests as the engine should have at hand."""
        if self._suspects:
            if not self._running:
                # Loads the model again, if it can be had: what follows is then the suspect's doing.
                self._engine.encode("a")
                self._begin(self._suspects.pop(0), alone=True)
            return
        if any(collector.alone for collector, _ in self._running.values()):
            return
        order = self._job.order
        while (
            self._next < len(order)
            and len(self._running) < self._in_flight
            and self._n_put - self._n_written < _MOST_UNWRITTEN
            and self._next - self._n_emitted < _MOST_AHEAD
            and not self._suspects
            and not self._too_many()
        ):
            position = order[self._next]
            self._next += 1
            self._begin(position)

    def _begin(self, position: int, *, alone: bool = False) -> None:
        line = self._job.line(position)
        try:
            request = self._job.request(line, position)
            collector = Collector(position, request, self._inbox.put, kept=line.kept, alone=alone)
            ticket = self._engine.start(request, collector.deliver)
        except EngineCrashError as error:
            self._crashed(position, alone, error)
        except _FATAL:
            raise
        except DsmoeError as error:
            self._fail(position, error)
        else:
            self._running[position] = collector, ticket

    def _take(self, patience: float, *, ending: bool = False) -> None:
        """Handle what has arrived; wait a moment for the first."""
        try:
            item = self._inbox.get(timeout=patience) if patience else self._inbox.get_nowait()
            while True:
                self._handle(item, ending)
                item = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, item: Collector | Sequence[Record] | BaseException, ending: bool) -> None:
        if isinstance(item, Collector):
            self._settle(item, ending)
        elif isinstance(item, BaseException):
            raise item
        else:
            summary = self._job.summary
            self._n_written += len(item)
            summary.n_records += len(item)
            summary.failures.update(record.failure for record in item if record.failure)
            self._listen(Advanced(len(item)))

    def _settle(self, collector: Collector, ending: bool) -> None:
        del self._running[collector.position]
        error = collector.error
        if error is None:
            reply = collector.reply(self._engine.info.name, self._lead)
            if reply is not None:
                self._emit(collector.position, reply)
        elif ending:
            return
        elif isinstance(error, _SHARED):
            self._crashed(collector.position, collector.alone, error)
        elif isinstance(error, DsmoeError) and not isinstance(error, _FATAL):
            self._fail(collector.position, error)
        else:
            raise error

    def _crashed(self, position: int, alone: bool, error: EngineError) -> None:
        """Try it again alone; it is to blame if it was."""
        if alone:
            self._fail(position, error)
            return
        if not self._suspects:
            self._listen(Note(f"{error.what}: the lines it was working on are tried again, one at a time"))
        self._suspects.append(position)

    def _fail(self, position: int, error: DsmoeError) -> None:
        line = self._job.line(position)
        code, message = describe(error)
        message = f"line {line.number}: {message}"
        self._emit(position, Failure(line.id, line.number, code, message, kind_of(error), line.kept))

    def _emit(self, position: int, outcome: Outcome) -> None:
        """Hand an outcome to the writer, when its turn has come."""
        self._job.summary.count_tokens(outcome)
        if not self._job.options.ordered:
            self._put(position, outcome)
            return
        self._waiting[position] = outcome
        order = self._job.order
        while (
            not self._too_many() and self._n_emitted < len(order) and order[self._n_emitted] in self._waiting
        ):
            position = order[self._n_emitted]
            self._put(position, self._waiting.pop(position))

    def _put(self, position: int, outcome: Outcome) -> None:
        # Counted here and not when it failed: with `ordered`, a record that waits is lost with the run.
        if isinstance(outcome, Failure):
            self._failures[outcome.kind] += 1
        record = FORMATS[self._job.options.form](outcome)
        content = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        failure = outcome.kind if isinstance(outcome, Failure) else ""
        self._writer.put(Record(self._job.index.key(position), content, failure))
        self._n_put += 1
        self._n_emitted += 1

    def _report(self) -> None:
        now = time.perf_counter()
        if now - self._reported >= _REPORT:
            self._reported = now
            n_running = sum(collector.n_tokens for collector, _ in self._running.values())
            self._listen(Advanced(0, self._speed.detail(self._job.summary, n_running)))
