"""An engine that answers lines: from a line to a running request, and from its end to the outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, InterruptedRunError
from dsmoe_local.batch.job import BatchOptions, request_for
from dsmoe_local.batch.lines import Line, kind_of
from dsmoe_local.batch.records import Failure, Outcome
from dsmoe_local.engine.errors import (
    EngineCrashError,
    EngineError,
    ModelLoadError,
    NativeError,
    OutOfMemoryError,
)
from dsmoe_local.engine.interface import TextEngine, Ticket
from dsmoe_local.engine.types import TokenEvent
from dsmoe_local.protocol.errors import describe
from dsmoe_local.protocol.replies import ReplyBuilder, reply_lead

# These errors end all running requests, whichever request caused them.
_SHARED = (EngineCrashError, NativeError)
# These errors end the work of the engine. They are not the fault of one line.
_FATAL = (ModelLoadError, OutOfMemoryError, FileError, FormatError, InterruptedRunError)

Result: TypeAlias = Outcome | EngineError | None
"""What became of a line: its outcome; the crash of the engine that ended it; or None if it was cancelled."""


def failure_of(line: Line, error: DsmoeError) -> Failure:
    """Return the outcome of a line that cannot be answered."""
    code, message = describe(error)
    return Failure(line.id, line.number, code, f"{line.place}: {message}", kind_of(error))


class Collector:
    """Collects the events of one request in `builder`. `finished` is called once, after the last event.

    `line` is the input line of `task`. `alone`: no other request runs at the same time. `n_events` counts the
    steps of the request. `deliver` runs in the engine's thread and must be fast.
    """

    def __init__(
        self,
        task: int,
        line: Line,
        builder: ReplyBuilder,
        finished: Callable[[Collector], None],
        *,
        alone: bool = False,
    ) -> None:
        self.task = task
        self.line = line
        self.builder = builder
        self.alone = alone
        self.n_events = 0
        self.error: BaseException | None = None
        self._finished = finished

    def deliver(self, event: TokenEvent | BaseException | None) -> None:
        """Add an event; None or an exception ends the request."""
        self.n_events += 1
        if isinstance(event, TokenEvent):
            self.builder.add(event)
        else:
            self.error = event
            self._finished(self)


class LineEngine:
    """Answers lines with an engine. `running` are the requests that have not ended, by task.

    `finished` is called in the engine's thread when a request has ended; `settle` then returns the result.
    Both methods raise errors that are not the fault of one line, such as those of a model that cannot be
    loaded again.
    """

    def __init__(
        self, engine: TextEngine, options: BatchOptions, finished: Callable[[Collector], None]
    ) -> None:
        self.running: dict[int, tuple[Collector, Ticket]] = {}
        self._engine = engine
        self._options = options
        self._finished = finished
        self._lead = reply_lead(engine)

    @property
    def capacity(self) -> int:
        """How many requests keep the engine busy: as many as it decodes at once wait in it."""
        n_parallel = self._engine.info.n_parallel
        return max(2 * n_parallel, n_parallel + 2)

    @property
    def n_running_tokens(self) -> int:
        """The generated tokens of unfinished replies."""
        return sum(collector.builder.n_tokens for collector, _ in self.running.values())

    def begin(self, task: int, line: Line, *, alone: bool = False) -> Result:
        """Start the request of a line. Returns the result if it has ended already, and None if it runs."""
        try:
            request = request_for(line, self._options)
            builder = ReplyBuilder(request, self._lead)
            collector = Collector(task, line, builder, self._finished, alone=alone)
            ticket = self._engine.start(request, collector.deliver)
        except EngineCrashError as error:
            return error
        except _FATAL:
            raise
        except DsmoeError as error:
            return failure_of(line, error)
        self.running[task] = collector, ticket
        return None

    def settle(self, collector: Collector) -> Result:
        """Return the result of a request that has ended."""
        del self.running[collector.task]
        error = collector.error
        if error is None:
            return collector.builder.reply(self._engine.info.name)
        if isinstance(error, _SHARED):
            return error
        if isinstance(error, DsmoeError) and not isinstance(error, _FATAL):
            return failure_of(collector.line, error)
        raise error

    def cancel_all(self) -> None:
        """Cancel all running requests."""
        for _, ticket in list(self.running.values()):
            ticket.cancel()
