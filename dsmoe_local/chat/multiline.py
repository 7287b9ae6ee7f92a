"""Messages of several lines between two marks, each of three quotes.

The first line of such a block is the mark alone, and a later line ends with the mark. The text in between is
a message, even if it looks like a command.
"""

from __future__ import annotations

MARK = '"""'


def is_open(text: str) -> bool:
    """Return whether `text` begins a block that it does not close."""
    first, newline, rest = text.partition("\n")
    if first != MARK:
        return False
    last = rest.rstrip().rpartition("\n")[2]
    # If the line has an even number of marks, they enclose text within the message.
    return not newline or not last.endswith(MARK) or last.count(MARK) % 2 == 0


def content(text: str) -> str | None:
    """Return the message in a block, which may still be open; None if `text` is not a block."""
    first, _, rest = text.partition("\n")
    if text.rstrip() == 2 * MARK:
        return ""
    if first != MARK:
        return None
    return (rest if is_open(text) else rest.rstrip().removesuffix(MARK)).strip("\n")


def quoted(text: str) -> str:
    """Return `text` as a block."""
    return f"{MARK}\n{text}\n{MARK}"
