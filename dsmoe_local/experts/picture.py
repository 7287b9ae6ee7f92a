"""Writes the activity of experts to a file: an SVG picture, or JSON with all numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.base.text_files import write_text_file
from dsmoe_local.experts.activity import Activity, LayerActivity
from dsmoe_local.model.hyperparameters import Gating

_WIDTH = 150  # columns of the picture
_N_BUSIEST = 8
# Unlike Rich's own template, it loads no fonts from the network.
SVG_FORMAT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
text {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
text {{ font-size: {char_height}px; }}
.{unique_id}-title {{ font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def write_picture(path: Path, title: str, parts: Mapping[str, Activity]) -> None:
    """Write named activities to `path`, as .svg or .json, replacing an existing file.

    Only the owner can read the file. Raises UsageError for another file extension or without tokens,
    FileError if the file cannot be written.
    """
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise UsageError(
            f"{safe_line(path.name, 80)}: unknown format for experts",
            remedy=f"use a name that ends with {' or '.join(WRITERS)}",
        )
    if not any(activity.tokens for activity in parts.values()):
        raise UsageError("no tokens were observed yet", remedy="/experts on, then send a message")
    write_text_file(path, write(title, parts), "the picture")


def as_svg(title: str, parts: Mapping[str, Activity]) -> str:
    """Return an SVG of panels of all activities, and a table of the layers of the first with tokens."""
    from rich.console import Console
    from rich.text import Text

    from dsmoe_local.experts.panel import panels
    from dsmoe_local.experts.tables import layer_table

    # Independent of the terminal and of NO_COLOR.
    console = Console(
        width=_WIDTH,
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        _environ={},
    )
    console.print(panels({safe_line(name, 80): part for name, part in parts.items()}, _WIDTH, tall=True))
    name, first = next((name, part) for name, part in parts.items() if part.tokens)
    console.print(Text(f"\n{safe_line(name, 80)}, layer by layer", style="bold"))
    console.print(layer_table(first, _WIDTH))
    return console.export_svg(title=safe_line(title), code_format=SVG_FORMAT, unique_id="experts")


def as_json(title: str, parts: Mapping[str, Activity]) -> str:
    """Return all numbers as JSON. docs/experts.md explains them."""
    found = {"model": title, "parts": {name: activity_json(activity) for name, activity in parts.items()}}
    return json.dumps(found, indent=1) + "\n"


WRITERS: Mapping[str, Callable[[str, Mapping[str, Activity]], str]] = {".svg": as_svg, ".json": as_json}


def activity_json(activity: Activity) -> dict[str, Any]:
    """Return an activity as a JSON object."""
    return {
        "tokens": activity.tokens,
        "n_routed_experts": activity.n_routed_experts,
        "gating": (Gating.SIGMOID if activity.is_sigmoid else Gating.SOFTMAX).value,
        "n_groups": activity.n_groups,
        "experts_per_token": activity.experts_per_token,
        "captured_mass": activity.captured_mass,
        "load_entropy": activity.load_entropy,
        "shared_share": activity.shared_share,
        "shared_gate": activity.shared_gate,
        "layers": [_layer_json(layer) for layer in activity.layers],
    }


def _layer_json(layer: LayerActivity) -> dict[str, Any]:
    if not layer.tokens:
        return {"layer": layer.layer, "tokens": 0}
    return {
        "layer": layer.layer,
        "tokens": layer.tokens,
        "experts_per_token": layer.experts_per_token,
        "busiest": [{"expert": expert, "share": share} for expert, share in layer.busiest(_N_BUSIEST)],
        "counts": list(layer.counts),
        "expert_mass": list(layer.mass),
        "captured_mass": layer.captured_mass,
        "captured_mass_deviation": layer.captured_deviation,
        "load_entropy": layer.load_entropy,
        "load_peak": layer.load_peak,
        "unused": layer.unused,
        "sampled": layer.sampled,
        "router_entropy": layer.router_entropy,
        "shared_share": layer.shared_share,
        "shared_gate": layer.shared_gate,
        "group_shares": list(layer.group_shares),
    }
