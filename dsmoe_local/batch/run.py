"""Run a prepared batch: start requests, write their records, and survive crashes of the engine."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, InterruptedRunError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started, ignore
from dsmoe_local.base.text import count
from dsmoe_local.batch.collector import Collector
from dsmoe_local.batch.job import Job
from dsmoe_local.batch.lines import Line, kind_of
from dsmoe_local.batch.output import Output, Record
from dsmoe_local.batch.records import FORMATS, Failure, Outcome
from dsmoe_local.batch.summary import BatchSummary, Speedometer, failures_in_words
from dsmoe_local.engine.errors import (
    EngineCrashError,
    EngineError,
    ModelLoadError,
    NativeError,
    OutOfMemoryError,
    WorkerLostError,
)
from dsmoe_local.engine.interface import TextEngine, Ticket
from dsmoe_local.protocol.errors import describe
from dsmoe_local.protocol.replies import ReplyBuilder, reply_lead

_POLL_SECONDS = 0.1  # the longest time until `stop` is noticed
_REPORT_SECONDS = 0.5
_CANCEL_SECONDS = 1.5  # the longest wait for replies that are being cancelled
_MAX_UNWRITTEN = 4096
_MAX_AHEAD = 1024  # with `ordered`: replies that wait for the reply to an earlier line
_MAX_GROUP = 256  # records that are synced together
# These errors end all running requests, whichever request caused them.
_SHARED = (EngineCrashError, NativeError)
# These errors end the batch. They are not the fault of one line.
_FATAL = (ModelLoadError, OutOfMemoryError, FileError, FormatError, InterruptedRunError)


class ErrorLimitError(DsmoeError):
    """More lines failed than --max-errors allows. The records so far are kept."""


def run(
    engine: TextEngine, job: Job, listen: Listener = ignore, stop: threading.Event | None = None
) -> BatchSummary:
    """Answer the lines of a job that have no record yet.

    A record counts once it is synced. A line that fails becomes an error record. If the engine's process dies
    or llama.cpp fails, the running requests are retried one at a time; a request that also fails on its own
    becomes an error record. Setting `stop` cancels the running replies and raises InterruptedRunError.

    Raises FileError if the output cannot be written, ErrorLimitError, and the error of a model that cannot be
    loaded again.
    """
    job.require(engine.info)
    job.output.open()
    work = _Run(engine, job, listen, stop or threading.Event())
    if job.index.model_named not in ("", engine.info.name):
        listen(Note(f"{engine.info.name} answers all lines, including those that name another model"))
    listen(Started("answering", job.summary.n_requests, job.summary.n_requests - job.plan.n_lines, "records"))
    began = time.perf_counter()
    try:
        work.until_done()
    finally:
        work.end()
        job.summary.seconds = time.perf_counter() - began
    work.check_done()
    listen(Finished("answering"))
    job.finish(listen, stop)
    return job.summary


class _RecordWriter:
    """A thread that writes records in groups: while one group is synced, the next one is collected.

    `acknowledge` is called in that thread with the records of a synced group, or with the error that
    ended the thread.
    """

    def __init__(
        self, output: Output, acknowledge: Callable[[Sequence[Record] | BaseException], None]
    ) -> None:
        self._output = output
        self._acknowledge = acknowledge
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dsmoe-batch-writer", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Queue a record."""
        self._queue.put(record)

    def close(self) -> None:
        """Write what is queued, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while group := self._next_group():
                self._output.append(group)
                self._acknowledge(group)
        except BaseException as error:  # noqa: BLE001 - raised again in the main loop
            self._acknowledge(error)

    def _next_group(self) -> list[Record]:
        group: list[Record] = []
        while len(group) < _MAX_GROUP:
            try:
                record = self._queue.get(block=not group)
            except queue.Empty:
                break
            if record is None:
                # Write this group first. The next call gets the None.
                self._queue.put(None)
                break
            group.append(record)
        return group


class _Run:
    """The main loop. A single queue delivers finished requests, written records, and the writer's error."""

    def __init__(self, engine: TextEngine, job: Job, listen: Listener, stop: threading.Event) -> None:
        self._engine = engine
        self._lead = reply_lead(engine)
        self._job = job
        self._listen = listen
        self._stop = stop
        self._inbox: queue.SimpleQueue[Collector | Sequence[Record] | BaseException] = queue.SimpleQueue()
        self._writer = _RecordWriter(job.output, self._inbox.put)
        self._in_flight = max(2 * engine.info.n_parallel, engine.info.n_parallel + 2)
        self._running: dict[int, tuple[Collector, Ticket]] = {}
        self._suspects: list[int] = []
        self._next = 0
        self._n_put = 0
        self._n_written = 0
        self._failures = Counter[str]()
        # Only with `ordered`: records that wait for the record of an earlier line.
        self._waiting: dict[int, Record] = {}
        self._speed = Speedometer()
        self._reported = time.perf_counter()

    def until_done(self) -> None:
        """Work until every record counts, `stop` is set, or too many lines have failed."""
        while self._n_written < self._job.plan.n_lines and not self._stop.is_set() and not self._too_many():
            try:
                self._fill()
            except InterruptedRunError:
                # `stop` ended the reload of a model after a crash.
                if not self._stop.is_set():
                    raise
                return
            self._take(_POLL_SECONDS)
            self._report()

    def end(self) -> None:
        """Cancel the running requests and write the finished records."""
        try:
            for _, ticket in list(self._running.values()):
                ticket.cancel()
            deadline = time.perf_counter() + _CANCEL_SECONDS
            while self._running and time.perf_counter() < deadline:
                self._take(_POLL_SECONDS, ending=True)
        finally:
            self._writer.close()
        self._take(0, ending=True)

    def _too_many(self) -> bool:
        most = self._job.options.max_errors
        return most is not None and self._failures.total() > most

    def check_done(self) -> None:
        """Raise the reason why the work is not complete, if it is not."""
        job = self._job
        if self._n_written == job.plan.n_lines:
            reach("batch.complete")
        elif self._stop.is_set():
            n_records, n_requests = job.summary.n_records, job.summary.n_requests
            raise InterruptedRunError(
                f"interrupted: {n_records:,} of {count(n_requests, 'record')} are written",
                remedy="run the same command again to continue",
            )
        else:
            failures = failures_in_words(self._failures)
            raise ErrorLimitError(
                f"stopped: {failures}, more than --max-errors {job.options.max_errors}",
                where=job.output.path,
                remedy="see the error records; run the same command again for the other lines",
            )

    def _fill(self) -> None:
        """Start requests until the engine has enough of them. After a crash, start one suspect at a time."""
        if self._suspects:
            if not self._running:
                # `encode` loads the model again here, so that a load error is not blamed on the suspect.
                self._engine.encode("a")
                self._begin(self._suspects.pop(0), alone=True)
            return
        if any(collector.alone for collector, _ in self._running.values()):
            return
        while (
            self._next < self._job.plan.n_lines
            and len(self._running) < self._in_flight
            and self._n_put - self._n_written < _MAX_UNWRITTEN
            and self._next - self._n_put < _MAX_AHEAD
            and not self._suspects
            and not self._too_many()
        ):
            self._next += 1
            self._begin(self._next - 1)

    def _begin(self, task: int, *, alone: bool = False) -> None:
        line = self._job.line(task)
        try:
            request = self._job.request(line)
            builder = ReplyBuilder(request, self._lead)
            collector = Collector(task, line, builder, self._inbox.put, alone=alone)
            ticket = self._engine.start(request, collector.deliver)
        except EngineCrashError as error:
            self._crashed(task, line, error, alone=alone)
        except _FATAL:
            raise
        except DsmoeError as error:
            self._fail(task, line, error)
        else:
            self._running[task] = collector, ticket

    def _take(self, seconds: float, *, ending: bool = False) -> None:
        """Handle what is in the inbox; wait up to `seconds` for the first item."""
        try:
            item = self._inbox.get(timeout=seconds) if seconds else self._inbox.get_nowait()
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
        del self._running[collector.task]
        error = collector.error
        if error is None:
            reply = collector.builder.reply(self._engine.info.name)
            if reply is not None:
                self._emit(collector.task, collector.line, reply)
        elif ending:
            return
        elif isinstance(error, _SHARED):
            self._crashed(collector.task, collector.line, error, alone=collector.alone)
        elif isinstance(error, DsmoeError) and not isinstance(error, _FATAL):
            self._fail(collector.task, collector.line, error)
        else:
            raise error

    def _crashed(self, task: int, line: Line, error: EngineError, *, alone: bool) -> None:
        """Queue the request for a retry on its own; if it was running on its own, fail its line."""
        if alone and isinstance(error, WorkerLostError):
            raise error  # not the fault of the line
        if alone:
            self._fail(task, line, error)
            return
        if not self._suspects:
            self._listen(Note(f"{error.what}: the lines it was working on are retried one at a time"))
        self._suspects.append(task)

    def _fail(self, task: int, line: Line, error: DsmoeError) -> None:
        code, message = describe(error)
        message = f"{line.place}: {message}"
        failure = Failure(line.id, line.number, code, message, kind_of(error))
        self._emit(task, line, failure)

    def _emit(self, task: int, line: Line, outcome: Outcome) -> None:
        """Write the record of an outcome; with `ordered`, after the records of all earlier lines."""
        self._job.summary.count_tokens(outcome)
        values = FORMATS[self._job.options.form](outcome)
        if line.kept:
            values["kept"] = line.kept
        content = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        record = Record(line.key, content, outcome.kind if isinstance(outcome, Failure) else "")
        if not self._job.options.ordered:
            self._put(record)
            return
        self._waiting[task] = record
        while self._n_put in self._waiting and not self._too_many():
            self._put(self._waiting.pop(self._n_put))

    def _put(self, record: Record) -> None:
        # Not counted earlier: with `ordered`, a waiting record may never be written.
        if record.failure:
            self._failures[record.failure] += 1
        self._writer.put(record)
        self._n_put += 1

    def _report(self) -> None:
        now = time.perf_counter()
        if now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            n_running = sum(collector.builder.n_tokens for collector, _ in self._running.values())
            self._listen(Advanced(0, self._speed.detail(self._job.summary, n_running)))
