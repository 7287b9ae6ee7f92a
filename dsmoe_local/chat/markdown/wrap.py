"""Styled text broken into lines. Widths are those of cells: Chinese characters and emoji take two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from rich.cells import cell_len

from dsmoe_local.chat.markdown.blocks import Span

Line: TypeAlias = list[Span]

_NOT_FIRST = frozenset(
    "，。、；：？！）】》」』〉〕〗”’…—～·％,.;:?!)]}%々ーぁぃぅぇぉっゃゅょァィゥェォッャュョ"
)
_NOT_LAST = frozenset("（【《「『〈〔〖“‘([{")
_JOINER = "\u200d"
_SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")
_HANGUL = ("\uac00", "\ud7a3")


def wrap(spans: Iterable[Span], width: int, *, fold: bool) -> list[Line]:
    """Lines of at most `width` cells, broken at spaces and between wide characters. A longer word stands
    alone on its line and sticks out, so that addresses can be copied; with `fold` it is broken as well.
    """
    lines: list[Line] = []
    for paragraph in _split_lines(spans):
        lines.append([])
        used = 0
        for space, word in _words(paragraph):
            n_space, n_word = _width(space), _width(word)
            if used and used + n_space + n_word > width:
                lines.append([])
                used, n_space, space = 0, 0, []
            for part in _folded(word, width) if fold and n_word > width else [word]:
                if used + n_space + _width(part) > width and used:
                    lines.append([])
                    used, n_space, space = 0, 0, []
                lines[-1] += [*space, *part]
                used += n_space + _width(part)
                n_space, space = 0, []
    return lines


def fold(spans: Iterable[Span], width: int) -> list[Line]:
    """Lines of exactly `width` cells but the last, broken anywhere, as a terminal does it."""
    lines = [part for line in _split_lines(spans) for part in (_folded(line, width) or [[]])]
    return lines or [[]]


def width_of(spans: Iterable[Span]) -> int:
    """Cells that the longest line takes."""
    return max((_width(line) for line in _split_lines(spans)), default=0)


def longest_word(spans: Iterable[Span]) -> int:
    """Cells of the longest piece that is not broken at a space."""
    return max((_width(word) for line in _split_lines(spans) for _, word in _words(line)), default=0)


def _split_lines(spans: Iterable[Span]) -> list[Line]:
    lines: list[Line] = [[]]
    for style, text in spans:
        first, *others = text.replace("\t", "    ").split("\n")
        lines[-1].append((style, first))
        lines += [[(style, other)] for other in others]
    return lines


def _width(spans: Iterable[Span]) -> int:
    return sum(cell_len(text) for _, text in spans)


def _words(line: Line) -> Iterator[tuple[Line, Line]]:
    """The words of a line, each with the spaces before it."""
    space: Line = []
    word: Line = []
    before = ""
    for style, cluster in _clusters(line):
        if cluster == " ":
            if word:
                yield space, word
                space, word = [], []
            space.append((style, cluster))
        else:
            if word and _may_break(before, cluster):
                yield space, word
                space, word = [], []
            word.append((style, cluster))
        before = cluster
    if word:
        yield space, word


def _may_break(before: str, after: str) -> bool:
    if before.isascii() and after.isascii():
        return False
    if _HANGUL[0] <= before[-1] <= _HANGUL[1] and _HANGUL[0] <= after[0] <= _HANGUL[1]:
        return False  # Korean has spaces between its words
    return (
        (cell_len(before) > 1 or cell_len(after) > 1)
        and after[0] not in _NOT_FIRST
        and before[0] not in _NOT_LAST
    )


def _clusters(line: Line) -> Iterator[Span]:
    """The characters of a line; those that belong together stay together. Words of ASCII count as one."""
    for style, text in line:
        start = 0
        for place in range(1, len(text) + 1):
            if place < len(text) and _belongs(text[place - 1], text[place]):
                continue
            yield style, text[start:place]
            start = place


def _belongs(before: str, after: str) -> bool:
    if after.isascii():
        return before.isascii() and before != " " and after != " "
    return (
        before == _JOINER
        or after == _JOINER
        or cell_len(after) == 0
        or _SKIN_TONES[0] <= after <= _SKIN_TONES[1]
    )


def _folded(line: Line, width: int) -> list[Line]:
    lines: list[Line] = []
    used = width + 1
    for style, text in line:
        start = 0
        for place in range(1, len(text) + 1):
            if place < len(text) and not text[place].isascii() and _belongs(text[place - 1], text[place]):
                continue
            cluster, start = text[start:place], place
            taken = cell_len(cluster)
            if used + taken > width:
                lines.append([])
                used = 0
            lines[-1].append((style, cluster))
            used += taken
    return lines
