"""Progress of long work on the screen, and its interruption. Commands print their results themselves."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Event, Finished, Listener, Note, Started
from dsmoe_local.base.text import safe_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")


def error_console() -> Console:
    """A console on stderr: stdout belongs to results."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class ProgressView:
    """Renders progress events as a bar on a terminal; elsewhere only the notes are printed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._lock = threading.Lock()

    def listen(self, event: Event) -> None:
        """Take one event; may be called from any thread."""
        with self._lock:
            if isinstance(event, Note):
                self.console.print(f"note: {safe_line(event.text, 400)}")
            elif self.console.is_terminal:
                self._draw(event)

    def _draw(self, event: Started | Advanced | Finished) -> None:
        if isinstance(event, Started):
            self.close()
            self._progress = _progress_bar(self.console, in_bytes=event.unit == "bytes")
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
        """Take the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


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
        # Counts come with a longer detail: speeds.
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
    """Do `work` with its progress on the screen.

    SIGINT and SIGTERM set the event that `work` is given, `stop` or a new one; it then raises
    InterruptedRunError, which gets the exit status of the signal. A second signal is not waited for.
    """
    view = ProgressView(error_console())
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

    def handle(number: int, frame: object) -> None:
        received.append(number)
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_result(text: str) -> None:
    """One line about what was done, on stderr."""
    sys.stderr.write(f"{safe_line(text, 400)}\n")
