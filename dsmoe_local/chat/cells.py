"""How many cells text takes, where terminals differ: joined emoji, flags, marks of Indic scripts.

A joined family is one emoji of two cells in some terminals, four emoji in others, four cells wide in tmux.
`most_cells` is for what must not reach beyond an edge. Where the exact number of cells matters, text has to
be `is_certain`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from rich.cells import get_character_cell_size

_EMOJI_STYLE = "\ufe0f"
# Letters of flags, and skin tones: two cells each where they are not joined.
_JOINED = "\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff"
_TWO_CELLS = re.compile(f"[{_JOINED}]")
# These, joiners, selectors of style, and what is newer than the tables of some terminals.
_UNCERTAIN = re.compile(f"[{_JOINED}\u200d\ufe0e\ufe0f\U0001fa70-\U0001faff]")


def most_cells(text: str) -> int:
    """The most cells that a terminal may take for `text`, on one line."""
    return len(text) if text.isascii() else sum(size for _, size in sized(text))


def sized(text: str) -> Iterator[tuple[str, int]]:
    """The characters of `text`, each with the most cells that it may add."""
    last = 0
    for character in text:
        if character == _EMOJI_STYLE:
            size = max(0, 2 - last)
        elif _TWO_CELLS.match(character):
            size = 2
        else:
            size = max(get_character_cell_size(character), unicodedata.category(character) == "Mc")
        last = size
        yield character, size


def is_certain(text: str) -> bool:
    """Whether all terminals take the same cells for `text`."""
    if text.isascii():
        return True
    return not _UNCERTAIN.search(text) and "Mc" not in map(unicodedata.category, text)
