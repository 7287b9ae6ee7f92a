"""Make foreign text safe to print. All names, messages and model output pass through here.

This module alone defines which characters are unsafe on a terminal, and in files that other programs show.
"""

from __future__ import annotations

import re

_KEEP = frozenset("\n\t")
# Arabic letter mark, left-to-right mark, right-to-left mark: they affect only neighbouring text.
_MARKS = (0x061C, 0x200E, 0x200F)
_EMBEDDINGS = tuple(range(0x202A, 0x202F))  # embeddings, overrides, and the character that closes them
_ISOLATES = tuple(range(0x2066, 0x206A))
BIDI_CONTROLS = (*_MARKS, *_EMBEDDINGS, *_ISOLATES)
"""Code points that control the direction of text. None takes a cell on a terminal."""
_POP_ISOLATE = "\u2069"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_TABLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEEP},
    0x7F: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys(range(0x80, 0xA0), _REPLACEMENT),
    **dict.fromkeys(BIDI_CONTROLS, _REPLACEMENT),
    **dict.fromkeys(range(0xD800, 0xE000), _REPLACEMENT),
    0x2028: "\n",
    0x2029: "\n",
}
_SPACES = {0x0A: " ", 0x09: " ", 0x2028: " ", 0x2029: " "}
_ONE_LINE = {**_TABLE, **_SPACES}
_FILE_TABLE = {code: shown for code, shown in _TABLE.items() if code not in (*_MARKS, *_ISOLATES)}
_ISOLATE = re.compile(f"[{''.join(map(chr, _ISOLATES))}]")


def safe_text(text: str) -> str:
    """Return `text` without characters that control a terminal.

    C0 controls become their visible symbols; C1 and bidi controls and lone surrogates become U+FFFD. Newlines
    and tabs stay. It handles each character on its own, so it can be applied to the pieces of a stream.
    The result is plain text: never pass it to Rich as markup.
    """
    return text.translate(_TABLE)


def safe_file_text(text: str) -> str:
    """Like `safe_text`, for files that other programs show: keeps what Hebrew and Arabic text needs.

    Directional marks stay, and isolates that are closed within their line. Overrides, embeddings and other
    isolates could reorder the text around them and become U+FFFD.
    """
    safe = text.translate(_FILE_TABLE)
    return safe if _ISOLATE.search(safe) is None else "\n".join(map(_with_closed_isolates, safe.split("\n")))


def safe_file_line(text: str, limit: int = 200) -> str:
    """Like `safe_file_text`, on one line of at most `limit` characters."""
    line = text.translate(_SPACES)
    return safe_file_text(line if len(line) <= limit else f"{line[: limit - 1]}…")


def _with_closed_isolates(line: str) -> str:
    """Return the line with each isolate that is not closed, and each unmatched closing one, replaced."""
    unclosed: list[int] = []
    unopened: list[int] = []
    for match in _ISOLATE.finditer(line):
        if match[0] != _POP_ISOLATE:
            unclosed.append(match.start())
        elif unclosed:
            unclosed.pop()
        else:
            unopened.append(match.start())
    characters = list(line)
    for offset in (*unclosed, *unopened):
        characters[offset] = _REPLACEMENT
    return "".join(characters)


def whole_characters(text: str) -> str:
    """Replace each lone surrogate (a pasted half of a pair) by U+FFFD, so that the text can be encoded."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_encodable(text: str) -> bool:
    """True if the text has no lone surrogates, which JSON can contain but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def safe_line(text: str, limit: int = 200) -> str:
    """Like `safe_text`, on one line of at most `limit` characters: for names and messages in a sentence."""
    line = text.translate(_ONE_LINE)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def count(n: int, noun: str) -> str:
    """Format a number with its noun: 1 token, 2,048 tokens."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
