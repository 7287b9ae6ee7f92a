"""Keys that are typed before there is an input to type into: they wait for it, and mean the same there."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.input.vt100 import Vt100Input
    from prompt_toolkit.key_binding import KeyPress

_PASTE_END = "\x1b[201~"
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
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def keys_waiting(descriptor: int) -> list[KeyPress]:
    """The keys that were typed so far; the terminal is in raw mode.

    One Enter is an Enter. Several may just as well be the lines of a paste, and must not become several
    messages: they are new lines then, and nothing is sent.
    """
    from prompt_toolkit.input.vt100_parser import Vt100Parser

    # Before this the terminal may have made line feeds of them, and a mark of Ctrl-D.
    text = re.sub("\r\n?", "\n", _read_waiting(descriptor).replace("\0", ""))
    ends = text.count("\n")
    text = text.replace("\n", "\r") if ends == 1 else text.strip("\n").replace("\t", " ")
    keys: list[KeyPress] = []
    parser = Vt100Parser(keys.append)
    parser.feed(text)
    parser.flush()
    return keys


def keys_of_open_paste(source: Vt100Input) -> list[KeyPress]:
    """The keys of a paste whose end was taken by the program that had the terminal; none if no paste is open.

    Without its end all keys that follow, Ctrl-C as well, would be a part of it.
    """
    parser = source.vt100_parser
    if not parser._in_bracketed_paste:
        return []
    parser.feed(_read_waiting(source.fileno()))
    if parser._in_bracketed_paste:
        parser.feed(_PASTE_END)
    return source.flush_keys()


def _read_waiting(descriptor: int) -> str:
    read = b""
    while select.select([descriptor], [], [], 0)[0]:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:
            break
        if not piece:
            break
        read += piece
    return read.decode(errors="replace")
