"""Progress of long work on the screen, and its interruption by signals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Event, Finished, Listener, Note, Started
from dsmoe_local.base.signals import handling
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.output import console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")

_LINE_SECONDS = 30.0
"""The time between two lines of progress in a file or a pipe."""
_SAME_SECONDS = 1.0
"""Signals within this time of the first one are ignored: a double Ctrl-C is one interruption."""


class ProgressView:
    """Shows progress events: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._view = _Bar(console) if console.is_terminal else _Lines(console, clock)
        self._lock = threading.Lock()

    def listen(self, event: Event) -> None:
        """Show one event. Thread-safe."""
        with self._lock:
            if isinstance(event, Note):
                self.console.print(f"note: {safe_line(event.text, 400)}")
            else:
                self._view.show(event)

    def close(self) -> None:
        """Remove the bar."""
        self._view.close()


class _Bar:
    """A bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    def show(self, event: Started | Advanced | Finished) -> None:
        if isinstance(event, Started):
            self.close()
            self._progress = _progress_bar(self._console, in_bytes=event.unit == "bytes")
            self._progress.start()
            self._progress.add_task(
                safe_line(event.stage, 40), total=event.total, completed=event.done, detail=""
            )
        elif self._progress is not None and isinstance(event, Advanced):
            task = self._progress.tasks[0]
            detail = safe_line(event.detail, 40) or task.fields["detail"]
            self._progress.update(task.id, advance=event.amount, detail=detail)
        elif isinstance(event, Finished):
            self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Lines:
    """A line every half minute; work that ends sooner prints nothing."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._told = clock()
        self._stage: Started | None = None
        self._n_done = 0

    def show(self, event: Started | Advanced | Finished) -> None:
        if isinstance(event, Started):
            self._stage, self._n_done = event, event.done
        elif self._stage is not None and isinstance(event, Advanced):
            self._n_done += event.amount
            now = self._clock()
            if now - self._told >= _LINE_SECONDS:
                self._told = now
                self._console.print(f"{safe_line(self._stage.stage, 100)}: {self._amount(self._stage)}")
        elif isinstance(event, Finished):
            self._stage = None

    def close(self) -> None:
        """Do nothing: lines stay."""

    def _amount(self, stage: Started) -> str:
        if stage.unit == "bytes":
            amount = f"{format_size(self._n_done)} of {format_size(stage.total)}"
        else:
            amount = f"{self._n_done:,} of {stage.total:,} {stage.unit}"
        return f"{amount}, {100 * self._n_done // stage.total}%" if stage.total else amount


def _progress_bar(console: Console, *, in_bytes: bool) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    )
    return Progress(
        TextColumn("{task.description}", markup=False),
        # Counts leave less room for the bar: their detail is a speed.
        BarColumn(bar_width=28 if in_bytes else 10),
        *amounts,
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=console,
        transient=True,
        refresh_per_second=8,
        speed_estimate_period=15,
    )


def run_with_progress(
    work: Callable[[Listener, threading.Event], T], stop: threading.Event | None = None
) -> T:
    """Call `work` with a listener that shows its progress, and with `stop` or a new event.

    SIGINT and SIGTERM set the event. `work` then raises InterruptedRunError, which gets the exit status of
    the signal. A second signal ends the process at once, unless it follows within a second.
    """
    view = ProgressView(console(stderr=True, soft_wrap=True))
    stop = stop or threading.Event()
    received: list[int] = []
    try:
        with _stopping_on_signals(stop, received):
            return work(view.listen, stop)
    except InterruptedRunError as error:
        error.exit_code = 128 + (received[0] if received else signal.SIGINT)
        raise
    finally:
        view.close()


@contextmanager
def _stopping_on_signals(stop: threading.Event, received: list[int]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    until = 0.0

    def handle(number: int) -> None:
        nonlocal until
        if not received:
            received.append(number)
            stop.set()
            until = time.monotonic() + _SAME_SECONDS
        elif time.monotonic() > until:
            installed.close()
            signal.raise_signal(number)

    with ExitStack() as installed:
        installed.enter_context(handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM), handle)))
        yield
