"""The chart of benchmarks/quality.py as SVG: bits per weight against divergence, on the trained reference.
What recipes are held against, with their embedding and output, is in it.

Drawn by hand: nothing is needed to make it, and the file is small enough to be read. It has a ground of its
own, and colours for a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

from benchmarks.support.label_places import Box, Label, place
from benchmarks.support.quality_rows import FidelityRow, Part
from benchmarks.support.quality_types import OURS

WIDTH, HEIGHT = 860, 580
_FRAME = Box(76, 108, WIDTH - 24, HEIGHT - 84)
_MOST_BITS = 6.2
"""Types with more are told of below the chart: they would push all others into a corner."""
_LIKE = " like "
"""Between a type and the recipe whose embedding and output it has."""
_MARK = 5.5
_FAR = _MARK + 8  # from a mark to its label: further away a line leads there
_FONT, _ADVANCE = 12.5, 0.585  # of the labels, and the mean width of a character
_ATTRIBUTES = f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title about"'
_FONTS = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"

_STYLE = """
.ground { fill: #ffffff; }
.grid { stroke: #e4e7eb; stroke-width: 1; }
.axis { stroke: #8a929c; stroke-width: 1; }
text { font-family: FONTS; fill: #57606a; font-size: 12px; }
.title { fill: #1f2328; font-size: 18px; font-weight: 600; }
.stock { fill: #2f6fb7; stroke: #2f6fb7; }
.ours { fill: #c2410c; stroke: #c2410c; }
.alike { fill: #7c4dbd; stroke: #7c4dbd; }
.hollow { fill: #ffffff; stroke-width: 1.6; }
.pair { stroke-width: 1.4; stroke-opacity: 0.55; }
.leader { stroke-width: 0.8; stroke-opacity: 0.8; }
.line { fill: none; stroke: #6b8e3d; stroke-width: 1.8; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 4; }
text.stock, text.ours, text.alike { stroke: none; font-size: SIZEpx; }
text.ours { font-weight: 700; }
@media (prefers-color-scheme: dark) {
.ground { fill: #0d1117; }
.grid { stroke: #21262d; }
.axis { stroke: #6e7681; }
text { fill: #9198a1; }
.title { fill: #f0f6fc; }
.stock { fill: #6cb6ff; stroke: #6cb6ff; }
.ours { fill: #ff9d5c; stroke: #ff9d5c; }
.alike { fill: #b794f6; stroke: #b794f6; }
.hollow { fill: #0d1117; }
.line { stroke: #9bc264; }
}
""".replace("FONTS", _FONTS).replace("SIZE", f"{_FONT}")


@dataclass(frozen=True, slots=True)
class Scales:
    """From bits and nats to pixels."""

    least_bits: float
    most_bits: float
    least_kl: float
    most_kl: float

    def x(self, bits: float) -> float:
        """Linear."""
        share = (bits - self.least_bits) / (self.most_bits - self.least_bits)
        return _FRAME.left + share * (_FRAME.right - _FRAME.left)

    def y(self, kl: float) -> float:
        """Logarithmic, upwards."""
        share = math.log(kl / self.least_kl) / math.log(self.most_kl / self.least_kl)
        return _FRAME.bottom - share * (_FRAME.bottom - _FRAME.top)


def chart(part: Part) -> str:
    """The whole file."""
    shown = [row for row in (*part.rows, *_alike(part)) if row.bits_per_weight <= _MOST_BITS]
    frontier = [row for row in part.frontier if row.bits_per_weight <= _MOST_BITS]
    scales = scales_for([*shown, *frontier])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {_ATTRIBUTES}>',
        '<title id="title">Size against divergence of quantized files</title>',
        f'<desc id="about">{escape(_description(shown))}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        *_heading(bool(frontier)),
        *_axes(scales),
        *_frontier(frontier, scales),
        *_points(shown, frontier, scales),
        *_note([row for row in part.rows if row.bits_per_weight > _MOST_BITS]),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _alike(part: Part) -> list[FidelityRow]:
    """What recipes are held against, named after all that it has the embedding and the output of."""
    recipes: dict[tuple[str, str, bool], list[str]] = {}
    rows = {(row.base, row.digest, row.imatrix): row for row in part.alike}
    for row in part.alike:
        recipes.setdefault((row.base, row.digest, row.imatrix), []).append(row.type)
    return [replace(row, type=f"{row.base}{_LIKE}{', '.join(recipes[key])}") for key, row in rows.items()]


def scales_for(rows: Sequence[FidelityRow]) -> Scales:
    """Both axes, with a little room around the rows."""
    bits, divergences = [row.bits_per_weight for row in rows], [row.kl for row in rows]
    room = (max(divergences) / min(divergences)) ** 0.06
    return Scales(
        math.floor(10 * min(bits)) / 10 - 0.1,
        math.ceil(10 * max(bits)) / 10 + 0.15,
        min(divergences) / room,
        max(divergences) * room,
    )


def _description(rows: Sequence[FidelityRow]) -> str:
    words = {False: "without", True: "with"}
    told = (
        f"{row.type} {words[row.imatrix]} imatrix: {row.bits_per_weight:.2f} bits, {row.kl:.2g}"
        for row in rows
    )
    return f"Bits per weight, and mean KL divergence in nats. {'; '.join(told)}."


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    classes = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{classes}>{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _heading(has_frontier: bool) -> Iterator[str]:
    yield _text(24, 34, "What each type keeps for its size", "title")
    hollow = "Hollow, dashed" if has_frontier else "Hollow"
    yield _text(
        24,
        56,
        "Divergence from the unquantized model, a small DeepSeekMoE. Further down is better."
        f" {hollow}: without imatrix.",
    )
    x, y = 30.0, 86.0
    for mark, kind, words in (
        (_circle, "stock", "llama.cpp’s types"),
        (_diamond, "ours", "recipes of dsmoe-quantize"),
        (_square, "alike", "like: same embedding, output"),
    ):
        yield mark(x, y - 4, kind)
        yield _text(x + 12, y, words)
        x += 26 + _width(words)
    if has_frontier:
        yield _line(x - 6, y - 4, x + 18, y - 4, "line")
        yield _text(x + 25, y, "--target-bpw, for any size")


def _width(words: str) -> float:
    """About, in pixels: who reads it may have another font."""
    return len(words) * _FONT * _ADVANCE


def _axes(scales: Scales) -> Iterator[str]:
    for kl in _ticks(scales.least_kl, scales.most_kl):
        y = scales.y(kl)
        yield _line(_FRAME.left, y, _FRAME.right, y, "grid")
        yield _text(_FRAME.left - 9, y + 4, f"{kl:g}", anchor="end")
    step = 0.25 if scales.most_bits - scales.least_bits < 2 else 0.5
    for number in range(math.ceil(scales.least_bits / step), int(scales.most_bits / step) + 1):
        x = scales.x(number * step)
        yield _line(x, _FRAME.top, x, _FRAME.bottom, "grid")
        yield _text(x, _FRAME.bottom + 19, f"{number * step:g}", anchor="middle")
    yield _line(_FRAME.left, _FRAME.bottom, _FRAME.right, _FRAME.bottom, "axis")
    yield _text((_FRAME.left + _FRAME.right) / 2, _FRAME.bottom + 40, "bits per weight", anchor="middle")
    middle = (_FRAME.top + _FRAME.bottom) / 2
    yield (
        f'<text transform="translate(20 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        "mean KL divergence, nats (logarithmic scale)</text>"
    )


def _ticks(least: float, most: float) -> list[float]:
    """Round ones: 1, 2, 5, 10 …, and some between where there would be few."""
    digits = (1, 2, 5) if most > 20 * least else (1, 2, 3, 4, 5, 7)
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    found = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    return [value for value in found if least <= value <= most]


def _frontier(rows: Sequence[FidelityRow], scales: Scales) -> Iterator[str]:
    for imatrix in (False, True):
        points = _line_of(rows, imatrix, scales)
        if points:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            yield f'<polyline class="line{"" if imatrix else " dashed"}" points="{path}"/>'


def _line_of(rows: Iterable[FidelityRow], imatrix: bool, scales: Scales) -> list[tuple[float, float]]:
    chosen = sorted((row.bits_per_weight, row.kl) for row in rows if row.imatrix is imatrix)
    return [(scales.x(bits), scales.y(kl)) for bits, kl in chosen]


def _points(rows: Sequence[FidelityRow], frontier: Sequence[FidelityRow], scales: Scales) -> Iterator[str]:
    words = list(dict.fromkeys(row.type for row in rows))
    marks = {
        word: [(scales.x(row.bits_per_weight), scales.y(row.kl), row.imatrix) for row in _both(rows, word)]
        for word in words
    }
    for word in words:
        (x1, y1, _), (x2, y2, _) = marks[word][0], marks[word][-1]
        yield _line(x1, y1, x2, y2, f"{_kind(word)} pair")
    # Recipes last: nothing covers them.
    for word in words:
        draw = _DRAWS[_kind(word)]
        for x, y, imatrix in marks[word]:
            yield draw(x, y, _kind(word) + ("" if imatrix else " hollow"))
    obstacles = [_around(x, y) for each in marks.values() for x, y, _ in each]
    obstacles += [box for each in marks.values() for box in _along([(x, y) for x, y, _ in each])]
    for imatrix in (False, True):
        obstacles += _along(_line_of(frontier, imatrix, scales))
    labels = [
        Label(_width(word), _FONT, [_around(x, y) for x, y, _ in reversed(marks[word])]) for word in words
    ]
    for word, box in zip(words, place(labels, obstacles, _FRAME), strict=True):
        yield from _leader(box, [(x, y) for x, y, _ in marks[word]], _kind(word))
        yield _text((box.left + box.right) / 2, box.bottom - 2.5, word, _kind(word), "middle")


def _leader(box: Box, marks: Sequence[tuple[float, float]], kind: str) -> Iterator[str]:
    """A line from a label to its nearest mark, where they are not beside each other."""

    def edge(x: float, y: float) -> tuple[float, float]:
        return min(max(x, box.left), box.right), min(max(y, box.top + 2), box.bottom - 2)

    x, y = min(marks, key=lambda mark: math.dist(mark, edge(*mark)))
    end = edge(x, y)
    distance = math.dist((x, y), end)
    if distance > _FAR:
        share = _MARK / distance
        yield _line(x + share * (end[0] - x), y + share * (end[1] - y), *end, f"{kind} leader")


def _both(rows: Iterable[FidelityRow], word: str) -> list[FidelityRow]:
    """A type without and with an importance matrix."""
    return sorted((row for row in rows if row.type == word), key=lambda row: row.imatrix)


def _kind(word: str) -> str:
    if _LIKE in word:
        return "alike"
    return "ours" if word in OURS else "stock"


def _around(x: float, y: float) -> Box:
    return Box(x - _MARK, y - _MARK, x + _MARK, y + _MARK)


def _along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes on a line."""
    boxes = []
    for (x1, y1), (x2, y2) in pairwise(points):
        count = max(1, int(math.hypot(x2 - x1, y2 - y1) / 4))
        for number in range(count + 1):
            x, y = x1 + (x2 - x1) * number / count, y1 + (y2 - y1) * number / count
            boxes.append(Box(x - 2, y - 2, x + 2, y + 2))
    return boxes


def _circle(x: float, y: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{_MARK - 0.7:.1f}"/>'


def _diamond(x: float, y: float, kind: str) -> str:
    r = _MARK + 0.6
    return f'<path class="{kind}" d="M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}-{r:.1f} {r:.1f}-{r:.1f}-{r:.1f}z"/>'


def _square(x: float, y: float, kind: str) -> str:
    r = _MARK - 1.2
    return f'<rect class="{kind}" x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"/>'


_DRAWS = {"stock": _circle, "ours": _diamond, "alike": _square}


def _note(rows: Sequence[FidelityRow]) -> Iterator[str]:
    """What is further to the right, without an importance matrix."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if not row.imatrix:
            told.setdefault(f"{row.bits_per_weight:.2f} bits, {row.kl:.2g}", []).append(row.type)
    if told:
        words = "; ".join(f"{' and '.join(types)}, {figures}" for figures, types in told.items())
        yield _text(_FRAME.right, HEIGHT - 16, f"Further right, without imatrix: {words}", anchor="end")
