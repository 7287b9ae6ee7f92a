"""Ctrl-C and signals for a chat that reads and answers in one thread.

A signal handler interrupts code that may hold anything, so it only notes what came: threads act on it. Only
the wait for a line, which nothing else ends, is ended by an exception.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from dsmoe_local.chat.terminal.editor import Editor

_CANCEL_AGAIN = 0.25  # seconds
_NUDGE = signal.SIGURG  # nobody sends it otherwise, and nothing comes of it
_NUDGES = (0.02, 0.1, 0.5, 2.0)  # seconds before each
_Action = Callable[[], None]


class Signals:
    """What came, and what is to be done about it. Used in the main thread.

    `number` is the signal that ends the chat, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._handling = False
        self._reading = False
        self._due: BaseException | None = None  # what ends the wait for a line
        self._interrupted = False  # Ctrl-C between a job and a line
        self._editor: Editor | None = None
        self._actions: tuple[_Action, _Action] | None = None  # of the job that runs: cancel, kill
        self._n_asked = 0  # times that the job was to end
        self._job = 0
        self._switching = threading.Lock()
        self._wanted: queue.SimpleQueue[tuple[int, _Action] | None] = queue.SimpleQueue()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP are dealt with."""
        handlers = {
            signal.SIGINT: self._on_interrupt,
            signal.SIGTERM: self._on_end,
            signal.SIGHUP: self._on_end,
            _NUDGE: self._on_nudge,
        }
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        for work in (self._act, partial(self._insist, woken)):
            threading.Thread(target=work, name="signals", daemon=True).start()
        woken_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._handling = True
        try:
            yield
        finally:
            self._handling = False
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken_before)
            os.close(wake)
            self._wanted.put(None)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In here Ctrl-C is a KeyboardInterrupt, and what ends the chat an EOFError."""
        self._due, self._reading = None, True
        try:
            if self.number:
                raise EOFError
            if self._interrupted:
                raise KeyboardInterrupt
            yield
            if self._due is not None:
                raise self._due
        finally:
            self._reading = self._interrupted = False

    @contextmanager
    def job(self, cancel: _Action, kill: _Action) -> Iterator[None]:
        """In here Ctrl-C calls `cancel`, a second one `kill`."""
        self._begin((cancel, kill))
        try:
            yield
        finally:
            self._begin(None)

    @contextmanager
    def lent_to(self, editor: Editor) -> Iterator[None]:
        """In here Ctrl-C is the editor's, and what ends the chat ends it, too."""
        self._editor = editor
        try:
            if self.number:
                editor.end()
            yield
        finally:
            self._editor = None

    def hang_up(self) -> None:
        """The terminal is gone: as if SIGHUP had come. Not for a signal handler."""
        if not self.number:
            self._on_end(signal.SIGHUP, None)

    def _begin(self, actions: tuple[_Action, _Action] | None) -> None:
        # With the lock: what was wanted of the job before is done, or will not be.
        with self._switching:
            self._reading = False
            self._job += 1
            self._n_asked = 0
            self._actions = actions

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._reading:
            self._due = KeyboardInterrupt()
            return
        if self._editor is not None:
            return
        if self._actions is None:
            self._interrupted = True
        self._ask_to_end()

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self._reading and frame is not None:
            self._due = EOFError()
            return
        if self._editor is not None:
            self._wanted.put((self._job, self._editor.end))
        self._ask_to_end()

    def _on_nudge(self, number: int, frame: FrameType | None) -> None:
        if self._reading and self._due is not None:
            raise self._due

    def _ask_to_end(self) -> None:
        if self._actions is not None:
            self._wanted.put((self._job, self._actions[min(self._n_asked, 1)]))
            self._n_asked += 1

    def _act(self) -> None:
        again: tuple[int, _Action] | None = None
        while True:
            try:
                wanted = self._wanted.get(timeout=None if again is None else _CANCEL_AGAIN)
            except queue.Empty:
                wanted = again
            if wanted is None:
                return
            job, action = wanted
            again = None
            with self._switching:
                if job == self._job:
                    action()
                    # A job that has only just begun may not have begun what there is to cancel.
                    again = (job, self._actions[0]) if self._actions is not None else None

    def _insist(self, woken: int) -> None:
        """End the wait for a line, from a thread that is awake whichever thread the signal came to.

        Not at once and not only once: input() forgets what is raised before it waits.
        """
        main = threading.main_thread().ident
        with open(woken, "rb", buffering=0) as came:
            while numbers := came.read(64):
                for seconds in _NUDGES if set(numbers) - {_NUDGE} else ():
                    time.sleep(seconds)
                    if self._handling and main is not None:
                        signal.pthread_kill(main, _NUDGE)
