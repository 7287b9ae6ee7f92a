"""Styled text broken into lines. Widths are in cells: Chinese characters and emoji take two."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from dsmoe_local.chat.cells import most_cells
from dsmoe_local.chat.markdown.blocks import Span

Line: TypeAlias = list[Span]

_TAB = " " * 4

# Chinese and Japanese are written without spaces: a line may end behind each character. Korean is not.
_IDEOGRAPH = "\u2e80-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6\U00020000-\U0003fffd"
_EMOJI = "\u231a-\u23ff\u2600-\u27bf\U0001f300-\U0001faff"
_JOINED = "[\u0300-\u036f\u20d0-\u20ff\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]*"
_CLUSTER = f"[{_EMOJI}]{_JOINED}(?:\u200d[^ ]{_JOINED})*|[\U0001f1e6-\U0001f1ff]{{2}}|[^ ]{_JOINED}"

_BREAKABLE = f"{_IDEOGRAPH}{_EMOJI}\U0001f1e6-\U0001f1ff"
_PIECES = re.compile(f"(?P<space> +)|(?P<wide>(?=[{_BREAKABLE}])(?:{_CLUSTER}))|[^ {_BREAKABLE}]+")
_CHARACTERS = re.compile(f"{_CLUSTER}| ")
_NOT_FIRST = frozenset(
    "，。、；：？！）】》」』〉〕〗”’…—～·％,.;:?!)]}%々ーぁぃぅぇぉっゃゅょァィゥェォッャュョ"
)
_NOT_LAST = frozenset("（【《「『〈〔〖“‘([{")


@dataclass(slots=True)
class _Word:
    """What no line is broken in, and the spaces before it."""

    space: Line = field(default_factory=list)
    n_space: int = 0
    spans: Line = field(default_factory=list)
    width: int = 0


def wrap(spans: Iterable[Span], width: int, *, fold: bool) -> list[Line]:
    """Lines of at most `width` cells, broken at spaces and between wide characters. A longer word stands
    alone on its line and sticks out, so that addresses can be copied; with `fold` it is broken as well.
    """
    lines: list[Line] = []
    for paragraph in _split_lines(spans):
        line: Line = []
        lines.append(line)
        used = 0
        for word in _words(paragraph):
            if used and used + word.n_space + word.width > width:
                line = []
                lines.append(line)
                used = 0
            if used:
                line += word.space
                used += word.n_space
            parts = _folded(word.spans, width) if fold and word.width > width else [word.spans]
            line += parts[0]
            lines += parts[1:]
            line = lines[-1]
            used += word.width if len(parts) == 1 else _width(line)
    return lines


def fold(spans: Iterable[Span], width: int) -> list[Line]:
    """Lines of at most `width` cells, broken anywhere, as a terminal does it."""
    return [part for line in _split_lines(spans) for part in _folded(line, width)]


def width_of(spans: Iterable[Span]) -> int:
    """Cells that the longest line takes."""
    return max((_width(line) for line in _split_lines(spans)), default=0)


def longest_word(spans: Iterable[Span]) -> int:
    """Cells of the longest piece that is not broken at a space."""
    return max((word.width for line in _split_lines(spans) for word in _words(line)), default=0)


def _split_lines(spans: Iterable[Span]) -> list[Line]:
    lines: list[Line] = [[]]
    for style, text in spans:
        first, *others = text.replace("\t", _TAB).split("\n")
        lines[-1].append((style, first))
        lines += [[(style, other)] for other in others]
    return lines


def _width(spans: Iterable[Span]) -> int:
    return sum(most_cells(text) for _, text in spans)


def _words(line: Line) -> Iterator[_Word]:
    word = _Word()
    last, last_wide = "", False
    for style, text in line:
        for match in _PIECES.finditer(text):
            piece, kind = match[0], match.lastgroup
            may_break = (last_wide or kind == "wide") and piece[0] not in _NOT_FIRST and last not in _NOT_LAST
            if word.spans and (kind == "space" or may_break):
                yield word
                word = _Word()
            if kind == "space":
                word.space.append((style, piece))
                word.n_space += len(piece)
            else:
                word.spans.append((style, piece))
                word.width += most_cells(piece)
            last, last_wide = piece[-1], kind == "wide"
    if word.spans:
        yield word


def _folded(line: Line, width: int) -> list[Line]:
    lines: list[Line] = [[]]
    used = 0
    for style, text in line:
        if used + most_cells(text) <= width:
            lines[-1].append((style, text))
            used += most_cells(text)
            continue
        for cluster in _CHARACTERS.findall(text):
            taken = most_cells(cluster)
            if used and used + taken > width:
                lines.append([])
                used = 0
            lines[-1].append((style, cluster))
            used += taken
    return lines
