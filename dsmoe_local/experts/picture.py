"""The picture of the experts as a file: SVG to look at, JSON to calculate with."""

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

_WIDTH = 150  # columns of the picture
_N_BUSIEST = 8
# No fonts from the network: a page that holds the picture asks for nothing.
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
    """Write the activities, by their names, to `path`, whose ending says how; what was there is replaced.

    Its owner alone can read it. UsageError for another ending or where no tokens were seen, FileError as the
    disk says.
    """
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise UsageError(
            f"{safe_line(path.name, 80)}: the picture of the experts is a file of another kind",
            remedy=f"name it with the ending {' or '.join(WRITERS)}",
        )
    if not any(activity.tokens for activity in parts.values()):
        raise UsageError("no tokens were seen yet", remedy="switch the experts on, and send a message")
    write_text_file(path, write(title, parts), "the picture")


def as_svg(title: str, parts: Mapping[str, Activity]) -> str:
    """The panels, and the layers of the first that has any."""
    from rich.console import Console
    from rich.text import Text

    from dsmoe_local.experts.panel import panels
    from dsmoe_local.experts.tables import layer_table

    # Whatever the terminal can, and NO_COLOR says: a picture is no terminal.
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
    """All numbers; docs/experts.md names them."""
    found = {"model": title, "parts": {name: activity_json(activity) for name, activity in parts.items()}}
    return json.dumps(found, indent=1) + "\n"


WRITERS: Mapping[str, Callable[[str, Mapping[str, Activity]], str]] = {".svg": as_svg, ".json": as_json}


def activity_json(activity: Activity) -> dict[str, Any]:
    """An activity as a JSON object."""
    return {
        "tokens": activity.tokens,
        "n_routed_experts": activity.n_routed_experts,
        "experts_per_token": activity.experts_per_token,
        "captured_mass": activity.captured_mass,
        "load_entropy": activity.load_entropy,
        "shared_share": activity.shared_share,
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
    }
