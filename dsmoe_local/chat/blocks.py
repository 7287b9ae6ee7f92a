"""Messages between two marks of three quotes: what opens one, what closes it, what is in it.

A block opens with a first line that is the mark alone, and closes with one at the end of a later line. What
is between is a message, whatever it looks like: a command, or lines that are marks themselves.
"""

from __future__ import annotations

MARK = '"""'


def is_open(text: str) -> bool:
    """Whether `text` begins a block that it does not close."""
    first, newline, rest = text.partition("\n")
    if first != MARK:
        return False
    last = rest.rstrip().rpartition("\n")[2]
    # One that opens and closes in the same line is part of what is written.
    return not newline or not last.endswith(MARK) or last.count(MARK) % 2 == 0


def content(text: str) -> str | None:
    """The message in a block, also in one that is open; None where `text` is no block."""
    first, _, rest = text.partition("\n")
    if text.rstrip() == 2 * MARK:
        return ""
    if first != MARK:
        return None
    return (rest if is_open(text) else rest.rstrip().removesuffix(MARK)).strip("\n")


def quoted(text: str) -> str:
    """A block whose content is `text`."""
    return f"{MARK}\n{text}\n{MARK}"
