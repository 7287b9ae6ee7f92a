"""The width of text in terminal cells, for characters whose width depends on the terminal.

Terminals differ in joined emoji, flags and the vowel signs of Indic scripts: an emoji of a family takes two
cells in some, eight in others. `most_cells` is for text that must fit into a given width. Where the
exact width matters, `is_certain` tells whether all terminals agree.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from rich.cells import get_character_cell_size

_EMOJI_STYLE = "\ufe0f"
# Regional indicators and skin tones: two cells each, unless the terminal joins them.
_JOINED = "\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff"
_TWO_CELLS = re.compile(f"[{_JOINED}]")
# The characters of _JOINED, joiners, variation selectors, and emoji that some terminals do not know.
_UNCERTAIN = re.compile(f"[{_JOINED}\u200d\ufe0e\ufe0f\U0001fa70-\U0001faff]")


def most_cells(text: str) -> int:
    """Return the most cells that a line may take in any terminal."""
    return len(text) if text.isascii() else sum(size for _, size in sized(text))


def sized(text: str) -> Iterator[tuple[str, int]]:
    """Yield the characters of `text`, each with the most cells that it may take."""
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
    """Return whether `text` has the same width in all terminals."""
    if text.isascii():
        return True
    return not _UNCERTAIN.search(text) and "Mc" not in map(unicodedata.category, text)
