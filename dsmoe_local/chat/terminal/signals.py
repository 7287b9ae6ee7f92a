"""Signals in the chat: `handling` for all of it, `Interrupts` where one thread reads and answers."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from dsmoe_local.chat.terminal.external import Editor

_SECONDS_BETWEEN_CHECKS = 0.25
_CHECKS = 8  # after each signal
_WAKE_UP = signal.SIGURG  # ignored by default, and nothing else here uses it


@contextmanager
def handling(handlers: Mapping[signal.Signals, Callable[[signal.Signals], None]]) -> Iterator[None]:
    """Install signal handlers, and put the ones from before back afterwards. Main thread only.

    A signal that is ignored stays ignored: shells do that for background jobs, nohup for SIGHUP.
    """
    before = {number: signal.getsignal(number) for number in handlers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(
                number, lambda number, frame: handlers[signal.Signals(number)](signal.Signals(number))
            )
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class _Job:
    cancel: Callable[[], None]
    kill: Callable[[], None]
    n_requests: int = 0  # to stop
    killed: bool = False


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP for a main thread that both reads lines and answers them.

    A signal handler interrupts the main thread at any place, also where it holds a lock that `cancel` takes.
    So handlers only record what happened, and a watcher thread calls `cancel` and `kill`. While a line is
    read, handlers raise an exception: nothing else ends that wait.
    """

    def __init__(self) -> None:
        self.ended_by: signal.Signals | None = None  # the signal that ends the chat
        self._reading = False
        self._due: BaseException | None = None  # raised while a line is read
        self._interrupted = False  # Ctrl-C came between a job and the next line
        self._job: _Job | None = None
        self._editor: Editor | None = None
        self._stopping = threading.Lock()  # held while the watcher stops a job
        self._wake_fd = -1

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals."""
        arrivals, self._wake_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        main = threading.get_ident()
        threading.Thread(target=self._watch, args=(arrivals, main), name="signals", daemon=True).start()
        before = signal.set_wakeup_fd(self._wake_fd, warn_on_full_buffer=False)
        handlers = {
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

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a line is read: Ctrl-C raises KeyboardInterrupt, a signal that ends the chat EOFError."""
        self._due = None
        try:
            self._reading = True
            if self.ended_by:
                raise EOFError
            if self._interrupted:
                raise KeyboardInterrupt
            yield
            if self._due is not None:
                raise self._due
        finally:
            self._reading = self._interrupted = False

    @contextmanager
    def job(self, cancel: Callable[[], None], kill: Callable[[], None]) -> Iterator[None]:
        """While a line is answered: Ctrl-C calls `cancel`, again and again until the job ends; a second one
        calls `kill`.
        """
        self._job = _Job(cancel, kill)
        try:
            yield
        finally:
            # With the lock, so that a late `cancel` cannot reach the next job.
            with self._stopping:
                self._job = None

    @contextmanager
    def editing(self, editor: Editor) -> Iterator[None]:
        """While an editor runs: Ctrl-C is for the editor; a signal that ends the chat ends the editor too."""
        self._editor = editor
        try:
            yield
        finally:
            self._editor = None

    def hang_up(self) -> None:
        """Behave as after SIGHUP: the terminal is gone."""
        if self.ended_by is None:
            self._on_end(signal.SIGHUP)

    def _on_interrupt(self, number: signal.Signals) -> None:
        if self._reading:
            self._raise(KeyboardInterrupt())
        elif self._job is None:
            self._interrupted = True
        elif self._editor is None:
            self._ask_to_stop(self._job)

    def _on_end(self, number: signal.Signals) -> None:
        self.ended_by = number
        if self._reading:
            self._raise(EOFError())
        elif self._job is not None:
            self._ask_to_stop(self._job)

    def _on_wake_up(self, number: signal.Signals) -> None:
        if self._reading and self._due is not None:
            raise self._due

    def _raise(self, error: BaseException) -> None:
        self._due = error
        raise error

    def _ask_to_stop(self, job: _Job) -> None:
        job.n_requests += 1
        os.write(self._wake_fd, b"\0")

    def _watch(self, arrivals: int, main: int) -> None:
        """Act on signals, several times for each: at first the main thread may not have run the handler yet,
        or may not have begun what is to be cancelled.
        """
        n_checks = 0
        with open(arrivals, "rb", buffering=0) as pipe:
            while True:
                if select.select([pipe], [], [], _SECONDS_BETWEEN_CHECKS if n_checks else None)[0]:
                    numbers = pipe.read(64)
                    if not numbers:  # closed
                        return
                    if set(numbers) == {_WAKE_UP}:
                        continue
                    n_checks = _CHECKS
                else:
                    # Another thread may have got the signal, or input() has dropped the exception, as it does
                    # before it waits. Not at once, because the exception may still be on its way up.
                    signal.pthread_kill(main, _WAKE_UP)
                    n_checks -= 1
                if self._stop():
                    n_checks = max(n_checks, 1)

    def _stop(self) -> bool:
        """Stop the job if that is wanted. True if it was."""
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
