"""Signals in a chat whose main thread both reads lines and answers them."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dsmoe_local.base.signals import handling
from dsmoe_local.chat.terminal.external import Editor

_SECONDS_BETWEEN_CHECKS = 0.25
_SECONDS_UNTIL_RAISED_AGAIN = 0.5  # doubled each time
_WAKE_UP = signal.SIGURG  # ignored by default, and nothing else here uses it
_HANDLED = 0  # written to the wakeup descriptor by a handler; Python itself writes the signal's number


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
        self._raises_again = False  # the next wake-up raises EOFError again
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
            _WAKE_UP: self._on_wake_up,
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

    def _on_wake_up(self, number: int) -> None:
        raises, self._raises_again = self._raises_again, False
        if raises and self._reading:
            raise EOFError

    def _wake_watcher(self) -> None:
        if self._wake_fd >= 0:
            os.write(self._wake_fd, bytes([_HANDLED]))

    def _watch(self, arrivals: int, main: int) -> None:
        """Stop the job on request, and make sure that a signal reaches the main thread.

        Without help, its handler does not run if another thread got the signal, or if the signal arrived just
        before a system call. The handler's EOFError is lost if it is raised in a completer of readline.
        """
        unhandled = False
        pause = _SECONDS_UNTIL_RAISED_AGAIN
        with open(arrivals, "rb", buffering=0) as pipe:
            while True:
                check_again = self._stop() or unhandled
                # Not at once: input() cannot handle a signal while it raises.
                still_reading = bool(self.ended_by) and self._reading and not unhandled
                seconds = pause if still_reading else _SECONDS_BETWEEN_CHECKS if check_again else None
                if not select.select([pipe], [], [], seconds)[0]:
                    if still_reading:
                        self._raises_again = True
                        pause *= 2
                    if still_reading or unhandled:
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
