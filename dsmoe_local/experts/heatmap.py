"""The heatmap, layers by experts, as something Rich draws: with colours two layers to a line, else in shades.

A picture fills its cells, so that it reads on dark and light terminals alike, and says what its shades mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from dsmoe_local.experts.activity import Activity
from dsmoe_local.experts.grid import Grid, Scale, grid_of, scale_of

# Viridis: even steps of brightness, also for the colour-blind.
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
class Heatmap:
    """`title` above, the expert's numbers, a line for each one or two layers, the scale below.

    It takes the width it is given. `height` limits the lines of cells: layers are taken together where they
    are more. `tall` gives every layer a line of its own. `scale` is that of the picture unless given.
    """

    activity: Activity
    title: str = ""
    height: int | None = None
    scale: Scale | None = None
    tall: bool = False
    legend: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.activity.tokens:
            yield Text(f"{self.title}: no tokens yet" if self.title else "no tokens yet", style="dim")
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
        if self.title:
            yield Text(self.title, style="bold", no_wrap=True, overflow="ellipsis")
        yield Text(indent + _expert_numbers(grid, cell), style="dim", no_wrap=True)
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
        yield from _packed(parts, options.max_width)


def _packed(parts: Sequence[Text], width: int) -> Iterator[Text]:
    """The parts on as few lines as they need, none of them broken."""
    line = Text(no_wrap=True)
    for part in parts:
        if line and line.cell_len + 2 + part.cell_len > width:
            yield line
            line = Text(no_wrap=True)
        line = Text.assemble(line, "  " if line else "", part, no_wrap=True)
    yield line


def _expert_numbers(grid: Grid, cell: int) -> str:
    """The numbers of experts over their columns, as many as have room."""
    last = (grid.n_columns - 1) * grid.experts_per_column
    step = 1
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
    """Made once each: a live panel needs thousands a second."""
    return Style(
        color=None if text is None else _COLOURS[text],
        bgcolor=None if background is None else _COLOURS[background],
    )


def _full_line(grid: Grid, number: int, scale: Scale, cell: int) -> Iterator[Segment]:
    for level, run in groupby(_levels(grid.rows[number], scale)):
        yield Segment(" " * (cell * len(list(run))), _style(None, level))


def _half_line(grid: Grid, number: int, scale: Scale, cell: int) -> Iterator[Segment]:
    """Two rows on a line: the upper one is the text's colour, the lower one the background's."""
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
