"""The terminals of the chat: a full one that draws, and a plain one that only reads and writes lines."""

from __future__ import annotations

import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsmoe_local.chat.terminal.screen import Completer, Status, Terminal, is_dumb, no_completions

_IFLAG, _LFLAG = 0, 3  # indices into the list that termios.tcgetattr returns


def open_terminal(
    *,
    plain: bool,
    status: Callable[[], Status],
    complete: Completer = no_completions,
    history_path: Path | None = None,
) -> Terminal:
    """Return the full terminal, or the plain one if `plain` is set or stdin or stdout cannot be drawn on.

    `status` returns the content of the status bar and `complete` the completions. The thread that reads keys
    calls both. Without `history_path`, inputs are not stored.
    """
    if plain or is_dumb() or not (sys.stdin.isatty() and sys.stdout.isatty()):
        from dsmoe_local.chat.terminal.plain import PlainTerminal

        return PlainTerminal(complete, history_path)
    from dsmoe_local.chat.terminal.full import FullTerminal

    return FullTerminal(status, complete, history_path)


@contextmanager
def keys_withheld() -> Iterator[None]:
    """While the block runs, neither show nor read typed keys, so that the next terminal gets them.

    Ctrl-C still interrupts.
    """
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    mode = termios.tcgetattr(descriptor)
    # With ICRNL an Enter would later be read as Ctrl-J.
    mode[_IFLAG] &= ~termios.ICRNL
    mode[_LFLAG] &= ~(termios.ECHO | termios.ICANON)
    # Without NOFLSH Ctrl-C would discard the keys typed before it.
    mode[_LFLAG] |= termios.NOFLSH
    termios.tcsetattr(descriptor, termios.TCSADRAIN, mode)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal has been closed
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
