"""Foreign text made safe: for a terminal, where every name, message and model output passes here before it is
printed, and for files that other programs show. The only definition of which characters are unsafe.
"""

from __future__ import annotations

import re

_KEEP = frozenset("\n\t")
# Arabic letter mark, left-to-right mark, right-to-left mark: no text but their neighbours' is reordered.
_MARKS = (0x061C, 0x200E, 0x200F)
_EMBEDDINGS = tuple(range(0x202A, 0x202F))  # and overrides, and what closes either
_ISOLATES = tuple(range(0x2066, 0x206A))
_CLOSES_ISOLATE = "\u2069"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_TABLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEEP},
    0x7F: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys(range(0x80, 0xA0), _REPLACEMENT),
    **dict.fromkeys((*_MARKS, *_EMBEDDINGS, *_ISOLATES), _REPLACEMENT),
    **dict.fromkeys(range(0xD800, 0xE000), _REPLACEMENT),
    0x2028: "\n",
    0x2029: "\n",
}
_SPACES = {0x0A: " ", 0x09: " ", 0x2028: " ", 0x2029: " "}
_ONE_LINE = {**_TABLE, **_SPACES}
_FILE_TABLE = {code: shown for code, shown in _TABLE.items() if code not in (*_MARKS, *_ISOLATES)}
_ISOLATE = re.compile(f"[{''.join(map(chr, _ISOLATES))}]")


def safe_text(text: str) -> str:
    """`text` with nothing a terminal would obey: C0 becomes its visible picture, C1, bidi controls and lone
    surrogates become U+FFFD. Newlines and tabs stay. Works character by character, so it may be applied to
    the pieces of a stream. The result is plain text: never hand it to Rich as markup.
    """
    return text.translate(_TABLE)


def safe_file_text(text: str) -> str:
    """`text` for a file that other programs show: as `safe_text`, but with the characters that Hebrew and
    Arabic need. Directional marks stay, and isolates that are closed within their line; what could reorder
    the text around it, as overrides, embeddings and other isolates do, becomes U+FFFD.
    """
    safe = text.translate(_FILE_TABLE)
    return safe if _ISOLATE.search(safe) is None else "\n".join(map(_with_closed_isolates, safe.split("\n")))


def safe_file_line(text: str, limit: int = 200) -> str:
    """`safe_file_text` on one line of at most `limit` characters."""
    line = text.translate(_SPACES)
    return safe_file_text(line if len(line) <= limit else f"{line[: limit - 1]}…")


def _with_closed_isolates(line: str) -> str:
    open_places: list[int] = []
    unpaired: list[int] = []
    for match in _ISOLATE.finditer(line):
        if match[0] != _CLOSES_ISOLATE:
            open_places.append(match.start())
        elif open_places:
            open_places.pop()
        else:
            unpaired.append(match.start())
    characters = list(line)
    for place in (*open_places, *unpaired):
        characters[place] = _REPLACEMENT
    return "".join(characters)


def whole_characters(text: str) -> str:
    """`text` with each lone surrogate (a pasted half of a pair) as U+FFFD, so that it can be encoded."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def safe_line(text: str, limit: int = 200) -> str:
    """`safe_text` on one line of at most `limit` characters, for names and messages inside a sentence."""
    line = text.translate(_ONE_LINE)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def count(n: int, noun: str) -> str:
    """`n` things: 1 token, 2,048 tokens."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
