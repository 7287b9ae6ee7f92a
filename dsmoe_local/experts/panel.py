"""Panels of the routed experts for a terminal: beside a running reply, and behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from dsmoe_local.experts.activity import Activity

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dsmoe_local.chat.terminal.screen import Screen


def summary(activity: Activity) -> str:
    """One line on all layers."""
    parts = [
        f"{activity.tokens:,} tokens",
        f"{activity.experts_per_token:.3g} of {activity.n_routed_experts} experts",
        f"router mass {activity.captured_mass:.0%}",
        f"evenness {activity.load_entropy:.2f}",
    ]
    if activity.shared_share is not None:
        parts.append(f"shared {activity.shared_share:.0%}")
    return " · ".join(parts)


def live_panel(activity: Activity, width: int, height: int) -> RenderableType:
    """What is drawn beside a running reply: a few lines."""
    return Text(f"experts: {summary(activity)}", style="dim", no_wrap=True, overflow="ellipsis")


def show_reply(screen: Screen, activity: Activity) -> None:
    """What is printed behind a reply."""
    screen.notice(f"experts: {summary(activity)}")
