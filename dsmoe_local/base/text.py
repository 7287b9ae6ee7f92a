"""Foreign text made safe to print: every name, message and model output passes here before a terminal."""

from __future__ import annotations

_KEEP = frozenset("\n\t")
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_TABLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEEP},
    0x7F: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys(range(0x80, 0xA0), _REPLACEMENT),
    **dict.fromkeys(_BIDI, _REPLACEMENT),
    **dict.fromkeys(range(0xD800, 0xE000), _REPLACEMENT),
    0x2028: "\n",
    0x2029: "\n",
}
_ONE_LINE = {**_TABLE, 0x0A: " ", 0x09: " ", 0x2028: " ", 0x2029: " "}


def safe_text(text: str) -> str:
    """`text` with nothing a terminal would obey: C0 becomes its visible picture, C1, bidi controls and lone
    surrogates become U+FFFD. Newlines and tabs stay. Works character by character, so it may be applied to
    the pieces of a stream. The result is plain text: never hand it to Rich as markup.
    """
    return text.translate(_TABLE)


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
