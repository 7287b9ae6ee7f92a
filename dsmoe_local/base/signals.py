"""Installs signal handlers for a block of code."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


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
