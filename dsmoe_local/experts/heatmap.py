"""A heatmap of layers by experts for Rich: in colour with two layers per line, or in shades.

Cells are filled, to be readable on dark and light terminals. A legend explains the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from dsmoe_local.experts.activity import Activity, LayerActivity

# Viridis, whose steps of brightness are even, also for colour-blind people.
COLOURS = (
    "#440154",
    "#482878",
    "#3e4989",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6ece58",
    "#b5de2b",
    "#fde725",
)
_COLOURS = tuple(map(Color.parse, COLOURS))
_SHADES, _ASCII_SHADES = " ░▒▓█", " .+*#"
_DIM = Style(dim=True)
_MAX_CELL = 4
_EVERY_ROW = 10_000


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of a heatmap: the share of the tokens that chose an expert; None without tokens.

    A row is the mean of `layers_per_row` layers, the first of which is in `first_layers`; a column is the
    mean of `experts_per_column` experts. The last row and column may have fewer.
    """

    rows: tuple[tuple[float | None, ...], ...]
    first_layers: tuple[int, ...]
    layers_per_row: int
    experts_per_column: int

    @property
    def n_columns(self) -> int:
        """Number of cells in a row."""
        return max(map(len, self.rows), default=0)

    @property
    def values(self) -> Iterator[float]:
        """All shares."""
        return (value for row in self.rows for value in row if value is not None)


def grid_of(activity: Activity, max_rows: int, max_columns: int) -> Grid:
    """Return the finest grid with at most this many rows and columns."""
    per_row = max(1, math.ceil(len(activity.layers) / max(1, max_rows)))
    per_column = max(1, math.ceil(activity.n_routed_experts / max(1, max_columns)))
    groups = [activity.layers[start : start + per_row] for start in range(0, len(activity.layers), per_row)]
    return Grid(
        tuple(tuple(_cells(group, per_column)) for group in groups),
        tuple(group[0].layer for group in groups),
        per_row,
        per_column,
    )


def _cells(layers: Sequence[LayerActivity], per_column: int) -> Iterator[float | None]:
    tokens = sum(layer.tokens for layer in layers)
    counts = [sum(column) for column in zip(*(layer.counts for layer in layers), strict=True)]
    for start in range(0, len(counts), per_column):
        part = counts[start : start + per_column]
        yield sum(part) / (len(part) * tokens) if tokens else None


@dataclass(frozen=True)
class Scale:
    """A power scale from shares, 0 to `high`, to shades. `even`, the share at an even load, is the middle.

    So half of the shades are below an even load, both for 6 of 64 experts per token and for 12 of 14.
    """

    high: float
    even: float

    @cached_property
    def _power(self) -> float:
        ratio = self.even / self.high if self.high > 0 else 0.5
        return math.log(0.5) / math.log(min(0.99, max(0.001, ratio)))

    def level(self, value: float, n_levels: int) -> int:
        """Return the shade of a share, from 0 to n_levels - 1."""
        position = min(1.0, value / self.high) if self.high > 0 else 0.0
        return min(n_levels - 1, int(n_levels * position**self._power))

    def value(self, position: float) -> float:
        """Return the share at a position among the shades, from 0 to 1."""
        return self.high * float(position ** (1 / self._power))


def scale_of(activities: Sequence[Activity], grids: Sequence[Grid]) -> Scale:
    """Return a common scale for heatmaps.

    It ends at the largest share or at twice the even share, whichever is larger. So with an even load, no
    expert looks busy.
    """
    high = max((value for grid in grids for value in grid.values), default=0.0)
    shares = [each.experts_per_token / each.n_routed_experts for each in activities if each.tokens]
    even = sum(shares) / max(1, len(shares))
    # No share exceeds 1. If all experts are used, the even share is 1.
    return Scale(max(high, min(1.0, 2 * even) if even < 1 else 2 * even), even)


@dataclass(frozen=True, slots=True)
class Heatmap:
    """A heatmap: the numbers of experts, lines for one or two layers each, and a legend.

    It fits into any width, by averaging experts. `height` limits the number of lines, by averaging layers. If
    `tall`, each line has one layer. `scale` None: a scale for this heatmap alone.
    """

    activity: Activity
    height: int | None = None
    scale: Scale | None = None
    tall: bool = False
    legend: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.activity.tokens:
            yield Text("no tokens yet", style="dim")
            return
        in_colour = not console.no_color and console.color_system not in (None, "standard")
        label = len(str(self.activity.layers[-1].layer))
        frame = 0 if in_colour else 2
        room = max(1, options.max_width - label - 1 - frame)
        lines_per_row = 2 if in_colour and not self.tall else 1
        grid = grid_of(self.activity, (self.height or _EVERY_ROW) * lines_per_row, room)
        scale = self.scale or scale_of([self.activity], [grid])
        cell = max(1, min(_MAX_CELL, room // grid.n_columns))
        indent = " " * (label + 1 + frame // 2)
        group_size = self.activity.n_routed_experts // self.activity.n_groups
        yield Text(indent + _expert_numbers(grid, cell, group_size), style="dim", no_wrap=True)
        if in_colour:
            draw = _full_line if lines_per_row == 1 else _half_line
            lines = (draw(grid, row, scale, cell) for row in range(0, len(grid.rows), lines_per_row))
        else:
            shades = _ASCII_SHADES if options.ascii_only else _SHADES
            lines = (_shaded_line(row, scale, cell, shades) for row in grid.rows)
        for first, line in zip(grid.first_layers[::lines_per_row], lines, strict=True):
            yield Segment(f"{first:>{label}} ", _DIM)
            yield from line
            yield Segment.line()
        if self.legend:
            yield from self._legend(grid, scale, options, in_colour=in_colour)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        label = len(str(max((layer.layer for layer in self.activity.layers), default=0))) + 3
        widest = label + _MAX_CELL * max(1, self.activity.n_routed_experts)
        return Measurement(min(20, options.max_width), min(max(widest, 30), options.max_width))

    def _legend(
        self, grid: Grid, scale: Scale, options: ConsoleOptions, *, in_colour: bool
    ) -> Iterator[Text]:
        shades = _ASCII_SHADES if options.ascii_only else _SHADES
        last = len(shades) - 1
        parts = []
        for step, shade in enumerate(shades):
            colour = _COLOURS[round(step * (len(_COLOURS) - 1) / last)]
            swatch = ("  ", Style(bgcolor=colour)) if in_colour else f"|{shade}|"
            word = " even" if 2 * step == last else ""
            parts.append(Text.assemble(swatch, (f" {scale.value(step / last):.0%}{word}", "dim")))
        parts.append(Text("of the tokens", style="dim"))
        together = (
            (grid.layers_per_row, "layers to a row"),
            (grid.experts_per_column, "experts to a column"),
        )
        parts += [Text(f"mean of {n} {what}", style="dim") for n, what in together if n > 1]
        n_groups = self.activity.n_groups
        if n_groups > 1:
            size = self.activity.n_routed_experts // n_groups
            parts.append(Text(f"{n_groups} groups of {size} experts", style="dim"))
        yield from _packed(parts, options.max_width)


def _packed(parts: Sequence[Text], width: int) -> Iterator[Text]:
    """Yield the parts on as few lines as possible, without breaking them."""
    line = Text(no_wrap=True)
    for part in parts:
        if line and line.cell_len + 2 + part.cell_len > width:
            yield line
            line = Text(no_wrap=True)
        line = Text.assemble(line, "  " if line else "", part, no_wrap=True)
    yield line


def _expert_numbers(grid: Grid, cell: int, group_size: int) -> str:
    """Return the line with as many numbers of experts above their columns as fit.

    If the model has groups of experts, these are the first experts of groups.
    """
    last = (grid.n_columns - 1) * grid.experts_per_column
    has_groups = group_size <= last and group_size % grid.experts_per_column == 0
    step = group_size // grid.experts_per_column if has_groups else 1
    while step * cell <= len(str(last)):
        step *= 2
    line = ""
    for column in range(0, grid.n_columns, step):
        line = f"{line:<{column * cell}}{column * grid.experts_per_column}"
    return line[: grid.n_columns * cell]


def _levels(row: Sequence[float | None], scale: Scale) -> list[int | None]:
    return [None if value is None else scale.level(value, len(COLOURS)) for value in row]


@cache
def _style(text: int | None, background: int | None) -> Style:
    """Return a style. It is cached, since a live panel needs thousands of styles per second."""
    return Style(
        color=None if text is None else _COLOURS[text],
        bgcolor=None if background is None else _COLOURS[background],
    )


def _full_line(grid: Grid, number: int, scale: Scale, cell: int) -> Iterator[Segment]:
    for level, run in groupby(_levels(grid.rows[number], scale)):
        yield Segment(" " * (cell * len(list(run))), _style(None, level))


def _half_line(grid: Grid, number: int, scale: Scale, cell: int) -> Iterator[Segment]:
    """Draw two rows on a line: the upper in the text colour, the lower in the background colour."""
    upper = _levels(grid.rows[number], scale)
    lower: list[int | None] = [None] * len(upper)
    if number + 1 < len(grid.rows):
        lower = _levels(grid.rows[number + 1], scale)
    for (above, below), run in groupby(zip(upper, lower, strict=True)):
        width = cell * len(list(run))
        if above is None:
            yield Segment(("▄" if below is not None else " ") * width, _style(below, None))
        else:
            yield Segment("▀" * width, _style(above, below))


def _shaded_line(row: Sequence[float | None], scale: Scale, cell: int, shades: str) -> Iterator[Segment]:
    cells = ("?" if value is None else shades[scale.level(value, len(shades))] for value in row)
    yield Segment(f"|{''.join(each * cell for each in cells)}|")
