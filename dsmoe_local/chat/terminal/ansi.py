"""Rich renderables as lines with ANSI styles, and the looks of our own messages. Prints nothing."""

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

_NOTICE_LIMIT = 400
_NARROWEST_NAME = 14


def render_lines(renderable: RenderableType, width: int, *, colour: bool, styles: bool = True) -> list[str]:
    """The lines of a renderable, without spaces at their ends. Without `styles` they are bare text."""
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
        for text, style in _without_ending_spaces([part for part in segments if not part.control]):
            if style is None or not styles:
                parts.append(text)
            else:
                look = style if colour else style.without_color
                # Never a link of the terminal's own: what is behind it could not be seen.
                parts.append(look.update_link(None).render(text, color_system=system))
        lines.append("".join(parts))
    return lines


def notice(text: str) -> RenderableType:
    """A quiet line of our own."""
    return Text(safe_line(text, _NOTICE_LIMIT), style="dim")


def error_message(error: DsmoeError) -> RenderableType:
    """An error: what, then where and what to do, indented."""
    first, *rest = safe_text(str(error)).splitlines() or [""]
    text = Text(f"error: {first}", style="red")
    for line in rest:
        text.append(f"\n  {line}", style="not red dim")
    return text


def table(rows: Iterable[Sequence[str]], width: int) -> RenderableType:
    """Rows of a name, a value or explanation, and so on; names leave the rest more than half of the width."""
    rows = [list(map(safe_line, row)) for row in rows]
    longest = max((cell_len(row[0]) for row in rows if len(row) > 1), default=width)
    grid = Table.grid(padding=(0, 2))
    for number, row in enumerate(rows):
        if number == 0:
            for column in range(len(row)):
                grid.add_column(
                    style="bold" if column == 0 else None,
                    width=min(longest, max(_NARROWEST_NAME, width * 2 // 5)) if column == 0 else None,
                )
        grid.add_row(*map(Text, row))
    return grid


def _without_ending_spaces(segments: list[Segment]) -> list[tuple[str, Style | None]]:
    """Spaces that show nothing are left out; those with a background stay."""
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
