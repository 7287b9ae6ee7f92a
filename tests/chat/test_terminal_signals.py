"""Signals where one thread reads lines and answers them."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress

import pytest

from dsmoe_local.chat.terminal.external import Editor
from dsmoe_local.chat.terminal.signals import Interrupts


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_signals_raise_only_while_a_line_is_read() -> None:
    """Guards: a KeyboardInterrupt anywhere between two inputs, which ends the chat."""
    interrupts = Interrupts()
    with interrupts.handled():
        _interrupt()
        with pytest.raises(KeyboardInterrupt), interrupts.reading():
            pytest.fail("a Ctrl-C before the line was forgotten")
        with pytest.raises(KeyboardInterrupt), interrupts.reading():
            _interrupt()
        _interrupt()
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.ended_by == signal.SIGTERM
        with pytest.raises(EOFError), interrupts.reading():
            pytest.fail("a SIGTERM before the line was forgotten")


def test_ignored_signals_stay_ignored() -> None:
    """Guards: `nohup` without effect, a background job that Ctrl-C for another program ends."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().handled():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_job_is_cancelled_in_another_thread() -> None:
    """Guards: a signal handler that waits for a lock which the code it interrupts holds."""
    interrupts = Interrupts()
    held, done = threading.Lock(), threading.Event()
    seen: list[str] = []

    def cancel() -> None:
        with held:
            seen.append("cancel")
            done.set()

    def kill() -> None:
        seen.append("kill")
        done.set()

    with interrupts.handled():
        with interrupts.job(cancel, kill):
            with held:
                _interrupt()
            assert done.wait(60)
            done.clear()
            # Cancelled again: the first time there may have been nothing to cancel yet.
            assert done.wait(60)
            assert set(seen) == {"cancel"}
            _interrupt()
            while "kill" not in seen:
                assert done.wait(60)
        with interrupts.job(cancel, kill), interrupts.editing(Editor()):
            seen.clear()
            _interrupt()
    assert not seen


def test_a_job_that_is_over_is_not_cancelled() -> None:
    """Guards: Ctrl-C at the end of a reply that stops the next one."""
    interrupts = Interrupts()
    begun, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def slow() -> None:
        begun.set()
        go_on.wait(60)

    with interrupts.handled():
        with interrupts.job(slow, lambda: seen.append("kill")):
            _interrupt()
            begun.wait(60)
            # The watcher is in `slow`, so the second Ctrl-C is noticed after the job.
            _interrupt()
            go_on.set()
        with interrupts.job(lambda: seen.append("next"), lambda: seen.append("next")):
            threading.Event().wait(0)
    assert "next" not in seen


def _wait_after(ready: threading.Event) -> None:
    ready.set()
    # Not in pieces: a signal that interrupts this thread must end the wait.
    never = threading.Lock()
    never.acquire()
    assert not never.acquire(timeout=60)
    pytest.fail("the signal was not handled")


def test_a_signal_that_comes_to_another_thread() -> None:
    """Guards: a wait that goes on because another thread got the signal."""
    interrupts = Interrupts()
    with interrupts.handled():
        ready = threading.Event()

        def send() -> None:
            ready.wait(60)
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        sender = threading.Thread(target=send)
        sender.start()
        with pytest.raises(EOFError), interrupts.reading():
            _wait_after(ready)
        sender.join()
    assert interrupts.ended_by == signal.SIGTERM


def _drop_and_wait() -> None:
    with suppress(EOFError):
        signal.raise_signal(signal.SIGTERM)
    _wait_after(threading.Event())


def test_an_exception_that_is_swallowed_comes_again() -> None:
    """Guards: SIGTERM without effect while readline, which drops exceptions, runs a completer."""
    interrupts = Interrupts()
    with interrupts.handled(), pytest.raises(EOFError), interrupts.reading():
        _drop_and_wait()
