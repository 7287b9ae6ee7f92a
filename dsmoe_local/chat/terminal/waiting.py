"""Keys that are typed before there is an input to type into: they wait for it."""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

_INPUT, _LOCAL = 0, 3  # places in what termios.tcgetattr returns


@contextmanager
def keys_withheld() -> Iterator[None]:
    """Typed keys stay off the screen and are read afterwards; Ctrl-C still interrupts."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    withheld = termios.tcgetattr(descriptor)
    # Without ICRNL a typed Enter is read as Enter afterwards, not as Ctrl-J.
    withheld[_INPUT] &= ~termios.ICRNL
    withheld[_LOCAL] &= ~(termios.ECHO | termios.ICANON)
    # Ctrl-C would throw away what was typed before it.
    withheld[_LOCAL] |= termios.NOFLSH
    termios.tcsetattr(descriptor, termios.TCSADRAIN, withheld)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
