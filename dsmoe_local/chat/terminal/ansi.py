"""Rich renderables as lines with ANSI styles, and the styles of notices, errors and tables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import COLOR_SYSTEMS, Console, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line, safe_text

NOTICE_LIMIT = 400  # characters
_MIN_NAME_WIDTH = 14


def render_lines(renderable: RenderableType, width: int, *, colour: bool, styles: bool = True) -> list[str]:
    """Return the lines of a renderable, without trailing spaces; without `styles` as bare text."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=True,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    system = COLOR_SYSTEMS.get(console.color_system or "standard")
    lines = []
    for segments in Segment.split_lines(console.render(renderable)):
        parts = []
        for text, style in _without_trailing_spaces([part for part in segments if not part.control]):
            if style is None or not styles:
                parts.append(text)
            else:
                visible = style if colour else style.without_color
                parts.append(visible.render(text, color_system=system))
        lines.append("".join(parts))
    return lines


def notice(text: str) -> RenderableType:
    """Return a dim line."""
    return Text(safe_line(text, NOTICE_LIMIT), style="dim")


def error_message(error: DsmoeError) -> RenderableType:
    """Return what went wrong, and below it, indented, where and what to do."""
    first, *rest = safe_text(str(error)).splitlines() or [""]
    text = Text(f"error: {first}", style="red")
    for line in rest:
        text.append(f"\n  {line}", style="not red dim")
    return text


def table(rows: Iterable[Sequence[str]], width: int) -> RenderableType:
    """Return rows of a name and further cells; names take at most two fifths of the width."""
    rows = [list(map(safe_line, row)) for row in rows]
    longest = max((cell_len(row[0]) for row in rows if len(row) > 1), default=width)
    name_width = min(longest, max(_MIN_NAME_WIDTH, width * 2 // 5))
    grid = Table.grid(padding=(0, 2))
    if rows:
        grid.add_column(style="bold", width=name_width)
        for _ in rows[0][1:]:
            grid.add_column()
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _without_trailing_spaces(segments: list[Segment]) -> list[tuple[str, Style | None]]:
    """Return text and style of each segment, without trailing spaces that have no background."""
    parts = [(segment.text, segment.style) for segment in segments]
    while parts:
        text, style = parts[-1]
        if style is not None and (style.bgcolor or style.reverse or style.underline):
            break
        if text.rstrip(" "):
            parts[-1] = (text.rstrip(" "), style)
            break
        parts.pop()
    return parts
