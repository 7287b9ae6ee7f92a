"""Signals in the chat: `handling` installs handlers; `Interrupts` is for a thread that reads and answers."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from dsmoe_local.chat.terminal.external import Editor

_SECONDS_BETWEEN_CHECKS = 0.25
_WAKE_UP = signal.SIGURG  # ignored by default, and nothing else here uses it
_HANDLED = 0  # written to the wakeup descriptor by a handler; Python itself writes the signal's number


@contextmanager
def handling(handlers: Mapping[int, Callable[[int], None]]) -> Iterator[None]:
    """Install signal handlers, and restore the old ones afterwards. Main thread only.

    A signal that is ignored stays ignored: shells do that for background jobs, nohup for SIGHUP.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        handlers[number](number)

    before = {number: signal.getsignal(number) for number in handlers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class _Job:
    cancel: Callable[[], None]
    kill: Callable[[], None]
    n_requests: int = 0  # how often the user or a signal asked to stop it
    killed: bool = False


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP for a main thread that both reads lines and answers them.

    A signal handler interrupts the main thread anywhere, even while it holds a lock that `cancel` needs. So
    handlers only record the request, and a watcher thread calls `cancel` and `kill`. While a line is read,
    handlers raise an exception, since nothing else ends the wait.
    """

    def __init__(self) -> None:
        self.ended_by = 0  # the signal that ends the chat
        self._reading = False
        self._interrupted = False  # Ctrl-C was pressed between a job and the next line
        self._job: _Job | None = None
        self._editor: Editor | None = None
        self._stopping = threading.Lock()  # held while the watcher stops a job
        self._wake_fd = -1

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals while the block runs."""
        arrivals, self._wake_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        main = threading.get_ident()
        threading.Thread(target=self._watch, args=(arrivals, main), name="signals", daemon=True).start()
        before = signal.set_wakeup_fd(self._wake_fd, warn_on_full_buffer=False)
        handlers: dict[int, Callable[[int], None]] = {
            signal.SIGINT: self._on_interrupt,
            signal.SIGTERM: self._on_end,
            signal.SIGHUP: self._on_end,
            _WAKE_UP: lambda number: None,
        }
        try:
            with handling(handlers):
                yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(self._wake_fd)
            self._wake_fd = -1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Mark that a line is read: Ctrl-C raises KeyboardInterrupt, a signal that ends the chat EOFError."""
        try:
            self._reading = True
            if self.ended_by:
                raise EOFError
            if self._interrupted:
                raise KeyboardInterrupt
            yield
        finally:
            self._reading = self._interrupted = False

    @contextmanager
    def job(self, cancel: Callable[[], None], kill: Callable[[], None]) -> Iterator[None]:
        """Mark that a line is answered: Ctrl-C calls `cancel` repeatedly until the job ends; a second Ctrl-C
        calls `kill`.
        """
        self._job = _Job(cancel, kill)
        try:
            yield
        finally:
            # The lock keeps a late `cancel` from reaching the next job.
            with self._stopping:
                self._job = None

    @contextmanager
    def editing(self, editor: Editor) -> Iterator[None]:
        """Mark that an editor runs: it handles Ctrl-C; a signal that ends the chat also ends the editor."""
        self._editor = editor
        try:
            yield
        finally:
            self._editor = None

    def hang_up(self) -> None:
        """Behave as after SIGHUP, because the terminal is closed."""
        if not self.ended_by:
            self._on_end(signal.SIGHUP)

    def _on_interrupt(self, number: int) -> None:
        if self._reading:
            self._wake_watcher()
            raise KeyboardInterrupt
        if self._job is None:
            self._interrupted = True
        elif self._editor is None:
            self._job.n_requests += 1
        self._wake_watcher()

    def _on_end(self, number: int) -> None:
        self.ended_by = number
        if self._reading:
            self._wake_watcher()
            raise EOFError
        if self._job is not None:
            self._job.n_requests += 1
        self._wake_watcher()

    def _wake_watcher(self) -> None:
        if self._wake_fd >= 0:
            os.write(self._wake_fd, bytes([_HANDLED]))

    def _watch(self, arrivals: int, main: int) -> None:
        """Stop the job on request, and make sure that the main thread runs the handler of a signal.

        Without help, it does not run if another thread got the signal, or if the signal arrived just before a
        system call.
        """
        unhandled = False
        with open(arrivals, "rb", buffering=0) as pipe:
            while True:
                check_again = self._stop() or unhandled
                if not select.select([pipe], [], [], _SECONDS_BETWEEN_CHECKS if check_again else None)[0]:
                    if unhandled:
                        # Not after the handler has run: input() cannot handle a signal while it raises.
                        signal.pthread_kill(main, _WAKE_UP)
                    continue
                numbers = pipe.read(64)
                if not numbers:  # closed
                    return
                for number in numbers:
                    if number != _WAKE_UP:
                        unhandled = number != _HANDLED

    def _stop(self) -> bool:
        """Stop the job if requested. Return whether it was: the call may have to be repeated later."""
        with self._stopping:
            job = self._job
            if job is None or not job.n_requests:
                return False
            if self._editor is not None and self.ended_by:
                self._editor.end()
            if job.n_requests > 1 and not job.killed:
                job.killed = True
                job.kill()
            else:
                job.cancel()
        return True
