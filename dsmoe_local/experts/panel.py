"""Panels of the routed experts, made of heatmaps and a line of numbers; as wide and high as they are told."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsmoe_local.experts.activity import Activity
from dsmoe_local.experts.grid import grid_of, scale_of
from dsmoe_local.experts.heatmap import Heatmap

_GAP = 3
_FRAME = 2  # around cells that are drawn in shades
_LIVE_LINES = 14
_ROUND_IT = 6  # lines of a live panel that are no cells, and the least that are worth drawing


def summary(activity: Activity, width: int = 400) -> str:
    """One line on all layers, of whole parts."""
    parts = [
        f"{activity.tokens:,} tokens",
        f"{activity.experts_per_token:.3g} of {activity.n_routed_experts} experts",
        f"mass {activity.captured_mass:.0%}",
        f"even {activity.load_entropy:.2f}",
    ]
    if activity.shared_share is not None:
        parts.append(f"shared {activity.shared_share:.0%}")
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts.pop()
    return " · ".join(parts)


def live_panel(activity: Activity, width: int, height: int) -> RenderableType:
    """What is drawn beside a running reply: at most a third of `height`."""
    line = _headed(activity, width)
    rows = min(_LIVE_LINES, height // 3)
    if rows < _ROUND_IT or not activity.tokens:
        return line
    return Group(line, Heatmap(activity, height=rows - 2, legend=False))


def reply_panel(activity: Activity, width: int, height: int) -> RenderableType:
    """What is printed behind a reply, below an empty line: the numbers, and the picture with its scale; no
    higher than leaves some of the reply on a screen of so many lines.
    """
    return Group(Text(""), _headed(activity, width), Heatmap(activity, height=max(8, 2 * height // 3)))


def _headed(activity: Activity, width: int) -> Text:
    title = "experts"
    numbers = summary(activity, width - len(title) - 2)
    return Text.assemble((title, "bold"), (f"  {numbers}", "dim"), no_wrap=True, overflow="ellipsis")


def panels(parts: Mapping[str, Activity], width: int, *, tall: bool = False) -> RenderableType:
    """Several activities by their titles, with one scale; beside each other where `width` allows it."""
    seen = {title: activity for title, activity in parts.items() if activity.tokens}
    if not seen:
        return Text("no tokens were seen yet", style="dim")
    scale = scale_of(list(seen.values()), [grid_of(each, 10_000, 10_000) for each in seen.values()])
    part_width = (width - _GAP * (len(seen) - 1)) // len(seen)
    beside = len(seen) > 1 and all(_least_width(each) <= part_width for each in seen.values())
    last = next(iter(seen)) if beside else list(seen)[-1]
    drawn = [
        Group(
            Text(title, style="bold", no_wrap=True, overflow="ellipsis"),
            Text(summary(activity, part_width if beside else width), style="dim"),
            Heatmap(activity, scale=scale, tall=tall, legend=title == last),
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
    """Columns of a picture in which every expert has its own."""
    return len(str(activity.layers[-1].layer)) + 1 + _FRAME + activity.n_routed_experts
