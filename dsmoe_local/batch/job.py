"""One batch: every input line answered in order, every record on the disk before the next begins."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base import durable
from dsmoe_local.base.errors import DsmoeError, FileError, InterruptedRunError, NoSpaceError, UsageError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started, ignore
from dsmoe_local.batch.records import BatchDefaults, Line, check_ids, describe, read_lines, request_of
from dsmoe_local.batch.responses import FORMATS, Failure, Reply
from dsmoe_local.engine.types import FinishReason, Message, Request, TextEngine


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What to read, where to write, and how."""

    source: Path
    out: Path
    defaults: BatchDefaults
    form: str = "openai"
    force: bool = False


@dataclass(slots=True)
class BatchSummary:
    """What came of it."""

    n_records: int = 0
    n_failed: int = 0
    n_prompt_tokens: int = 0
    n_completion_tokens: int = 0
    seconds: float = 0.0

    def count(self, outcome: Reply | Failure) -> None:
        """Add one record."""
        self.n_records += 1
        if isinstance(outcome, Failure):
            self.n_failed += 1
        else:
            self.n_prompt_tokens += outcome.usage.prompt_tokens
            self.n_completion_tokens += outcome.usage.completion_tokens


def check_paths(options: BatchOptions) -> int:
    """Everything that can be wrong before a model is loaded; returns the number of requests.

    Raises UsageError (input is output), FileError (the input cannot be read, the output exists), FormatError
    (an id occurs twice).
    """
    if durable.same_file(options.source, options.out):
        raise UsageError("input and output are the same file", where=str(options.out))
    if options.source.exists() and not options.source.is_file():
        raise FileError(
            "the input is not a regular file, and it is read twice",
            where=options.source,
            remedy="write the lines to a file first",
        )
    if options.out.exists() and not options.force:
        raise FileError(
            "the output exists", where=options.out, remedy="name another, or replace it with --force"
        )
    _check_folder(options.out)
    return check_ids(options.source)


def _check_folder(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise FileError("the output's folder does not exist", where=out.absolute().parent)


def run_batch(
    engine: TextEngine,
    options: BatchOptions,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> BatchSummary:
    """Answer every line of the input, in order.

    A record counts once its whole line is synced. A crash can leave one more line behind, without its
    newline: cut short it is no JSON, so it never passes for a record. Setting `stop` ends the running reply
    without a record and raises InterruptedRunError. A line that fails becomes an error record, and the others
    go on.
    """
    stop = stop or threading.Event()
    started = time.perf_counter()
    summary = BatchSummary()
    _check_folder(options.out)
    with durable.locked(options.out):
        # Again, now that nobody else can write it.
        total = check_paths(options)
        with _appending(options.out) as descriptor:
            listen(Started("answering", total, unit="records"))
            for line in read_lines(options.source):
                outcome = None if stop.is_set() else _answer(engine, line, options.defaults, stop)
                if outcome is None:
                    raise InterruptedRunError(
                        f"interrupted: {summary.n_records} of {total} records are written"
                    )
                _append(descriptor, options, outcome)
                summary.count(outcome)
                listen(Advanced(1, f"{summary.n_failed} failed" if summary.n_failed else ""))
            listen(Finished("answering"))
    summary.seconds = time.perf_counter() - started
    return summary


@contextmanager
def _appending(out: Path) -> Iterator[int]:
    """A new output file, its folder entry synced."""
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    try:
        durable.sync_folder(out.absolute().parent)
        yield descriptor
    finally:
        os.close(descriptor)


def _append(descriptor: int, options: BatchOptions, outcome: Reply | Failure) -> None:
    """Write and sync one record as a whole; FileError, and the file as before, if the disk cannot take it."""
    record = FORMATS[options.form](outcome)
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    before = os.fstat(descriptor).st_size
    try:
        # One write, so that a kill leaves all of it or none.
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        durable.sync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, before)
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else FileError
        raise kind(f"a record cannot be written: {error.strerror}", where=options.out) from error


def _answer(
    engine: TextEngine, line: Line, defaults: BatchDefaults, stop: threading.Event
) -> Reply | Failure | None:
    """The line's outcome; None if it was interrupted."""
    try:
        request = request_of(line, defaults)
        with _cancelling(engine, request, stop):
            return _reply(engine, request)
    except DsmoeError as error:
        code, message = describe(error)
        return Failure(line.id, line.number, code, f"line {line.number}: {message}")


def _reply(engine: TextEngine, request: Request) -> Reply | None:
    chat = not isinstance(request.prompt, str) and isinstance(request.prompt[0], Message)
    pieces: list[str] = []
    for event in engine.submit(request):
        pieces.append(event.text)
        if event.finish_reason is None or event.usage is None:
            continue
        if event.finish_reason is FinishReason.CANCELLED:
            return None
        text = "".join(pieces)
        # The space before a chat reply belongs to the template.
        text = text.lstrip() if chat else text
        return Reply(request.id, engine.info.name, chat, text, event.finish_reason, event.usage)
    return None


@contextmanager
def _cancelling(engine: TextEngine, request: Request, stop: threading.Event) -> Iterator[None]:
    """Cancel the request when `stop` is set, also while its prompt is read and no event arrives."""
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if stop.wait(0.05):
                engine.cancel(request.id)
                return

    watcher = threading.Thread(target=watch, name="dsmoe-batch-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
