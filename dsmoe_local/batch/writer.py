"""Write the records of a run in a thread, in the order of the input if asked for, and count them."""

from __future__ import annotations

import json
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

from dsmoe_local.base.errors import DsmoeError, InterruptedRunError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Listener
from dsmoe_local.base.text import count
from dsmoe_local.batch.job import Job
from dsmoe_local.batch.lines import Line
from dsmoe_local.batch.output import Output, Record
from dsmoe_local.batch.records import FORMATS, Failure, Outcome
from dsmoe_local.batch.summary import failures_in_words

T = TypeVar("T")

_MAX_GROUP = 256  # records that are synced together
_MAX_UNWRITTEN = 4096

Acknowledgment: TypeAlias = Sequence[Record] | BaseException
"""The records of a synced group, or the error that ended the writer."""


class ErrorLimitError(DsmoeError):
    """More lines failed than --max-errors allows. The records so far are kept."""


def record_of(form: str, line: Line, outcome: Outcome) -> Record:
    """Return the record of an outcome in the output format `form`."""
    values = FORMATS[form](outcome)
    if line.kept:
        values["kept"] = line.kept
    content = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return Record(line.key, content, outcome.kind if isinstance(outcome, Failure) else "")


def received(inbox: queue.SimpleQueue[T], seconds: float) -> Iterator[T]:
    """Yield what is in a queue. Wait up to `seconds` for the first item."""
    try:
        yield inbox.get(timeout=seconds)
        while True:
            yield inbox.get_nowait()
    except queue.Empty:
        return


class Records:
    """Writes the records of a run and counts them.

    `n_put` records were passed to the writer, `n_written` of them are synced. `acknowledge` is called in the
    writer's thread; what it gets must be passed to `confirm` in the main thread.
    """

    def __init__(self, job: Job, listen: Listener, acknowledge: Callable[[Acknowledgment], None]) -> None:
        self.n_put = 0
        self.n_written = 0
        self._job = job
        self._listen = listen
        self._writer = _Writer(job.output, acknowledge)
        self._failures = Counter[str]()
        # Only with `ordered`: records that wait for the record of an earlier line.
        self._waiting: dict[int, Record] = {}

    @property
    def complete(self) -> bool:
        """True if every line has a synced record."""
        return self.n_written == self._job.plan.n_lines

    @property
    def behind(self) -> bool:
        """True if so many records wait for the disk that no more lines should be started."""
        return self.n_put - self.n_written >= _MAX_UNWRITTEN

    @property
    def too_many_failed(self) -> bool:
        """True if more lines failed than `max_errors` allows."""
        most = self._job.options.max_errors
        return most is not None and self._failures.total() > most

    def add(self, task: int, record: Record) -> None:
        """Write the record of a task; with `ordered`, after the records of all earlier tasks."""
        if not self._job.options.ordered:
            self._put(record)
            return
        self._waiting[task] = record
        while self.n_put in self._waiting and not self.too_many_failed:
            self._put(self._waiting.pop(self.n_put))

    def confirm(self, item: Acknowledgment) -> None:
        """Count the records of a group that is synced. Raises the error of the writer."""
        if isinstance(item, BaseException):
            raise item
        summary = self._job.summary
        self.n_written += len(item)
        summary.n_records += len(item)
        summary.failures.update(record.failure for record in item if record.failure)
        self._listen(Advanced(len(item)))

    def close(self) -> None:
        """Write what was added, and end the writer."""
        self._writer.close()

    def check_complete(self, *, stopped: bool) -> None:
        """Raise the reason why the work is not complete, if it is not. `stopped`: the user interrupted it."""
        job = self._job
        if self.complete:
            reach("batch.complete")
        elif stopped:
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

    def _put(self, record: Record) -> None:
        # Not counted earlier: with `ordered`, a waiting record may never be written.
        if record.failure:
            self._failures[record.failure] += 1
        self._writer.put(record)
        self.n_put += 1


class _Writer:
    """A thread that writes records in groups: while one group is synced, the next one is collected.

    `acknowledge` is called in that thread with the records of a synced group, or with the error that
    ended the thread.
    """

    def __init__(self, output: Output, acknowledge: Callable[[Acknowledgment], None]) -> None:
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
