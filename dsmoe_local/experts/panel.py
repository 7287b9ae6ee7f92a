"""Panels of routed experts: heatmaps with a line of numbers."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsmoe_local.experts.activity import Activity
from dsmoe_local.experts.heatmap import Heatmap, grid_of, scale_of

_GAP = 3
_FRAME = 2  # around cells drawn in shades
_LIVE_LINES = 14
_MIN_LIVE_LINES = 6  # a lower live panel has no heatmap


def summary(activity: Activity, width: int = 400) -> str:
    """Return a line of numbers about all layers. Numbers that do not fit are left out."""
    parts = [
        f"{activity.tokens:,} tokens",
        f"{activity.experts_per_token:.3g} of {activity.n_routed_experts} experts",
        f"mass {activity.captured_mass:{'.2f' if activity.is_sigmoid else '.0%'}}",
        f"even {activity.load_entropy:.2f}",
    ]
    if activity.shared_share is not None:
        parts.append(f"shared {activity.shared_share:.0%}")
    if activity.shared_gate is not None:
        parts.append(f"gate {activity.shared_gate:.0%}")
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts.pop()
    return " · ".join(parts)


def live_panel(activity: Activity, width: int, height: int) -> RenderableType:
    """Return the panel beside a running reply. It takes at most a third of `height`."""
    line = _headed(activity, width)
    rows = min(_LIVE_LINES, height // 3)
    if rows < _MIN_LIVE_LINES or not activity.tokens:
        return line
    return Group(line, Heatmap(activity, height=rows - 2, legend=False))


def reply_panel(activity: Activity, width: int, height: int) -> RenderableType:
    """Return the panel after a reply: a blank line, the numbers, and a heatmap.

    It leaves a part of the reply visible on a screen of `height` lines.
    """
    return Group(Text(""), _headed(activity, width), Heatmap(activity, height=max(8, 2 * height // 3)))


def _headed(activity: Activity, width: int) -> Text:
    title = "experts"
    numbers = summary(activity, width - len(title) - 2)
    return Text.assemble((title, "bold"), (f"  {numbers}", "dim"), no_wrap=True, overflow="ellipsis")


def panels(parts: Mapping[str, Activity], width: int, *, tall: bool = False) -> RenderableType:
    """Return several activities with a common scale, side by side if `width` allows it."""
    seen = {title: activity for title, activity in parts.items() if activity.tokens}
    if not seen:
        return Text("no tokens yet", style="dim")
    scale = scale_of(list(seen.values()), [grid_of(each, 10_000, 10_000) for each in seen.values()])
    part_width = (width - _GAP * (len(seen) - 1)) // len(seen)
    beside = len(seen) > 1 and all(_least_width(each) <= part_width for each in seen.values())
    with_legend = next(iter(seen)) if beside else list(seen)[-1]
    drawn = [
        Group(
            Text(title, style="bold", no_wrap=True, overflow="ellipsis"),
            Text(summary(activity, part_width if beside else width), style="dim"),
            Heatmap(activity, scale=scale, tall=tall, legend=title == with_legend),
        )
        for title, activity in seen.items()
    ]
    if not beside:
        return Group(*(part for each in drawn for part in (each, Text(""))))
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    for _ in drawn:
        grid.add_column(width=part_width)
    grid.add_row(*drawn)
    return grid


def _least_width(activity: Activity) -> int:
    """Return the width in which every expert has a column."""
    return len(str(activity.layers[-1].layer)) + 1 + _FRAME + activity.n_routed_experts
