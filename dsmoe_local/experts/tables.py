"""Tables of activity by layer: the most used experts, the load entropy and the router entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsmoe_local.experts.activity import Activity, Difference, LayerActivity

N_BUSIEST = 4
"""Number of experts that a table lists for a layer."""
_N_SHOWN = 16
"""Number of experts in a table of experts."""
_MARGINS = 9  # columns for the number of the layer and the margins
_WIDE = 60
"""Tables of experts of at least this width have more columns than shares."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. `write` returns the text of a layer's cell. Some columns apply to some models."""

    heading: str
    meaning: str
    write: Callable[[LayerActivity], str]
    applies: Callable[[Activity], bool] = lambda _: True


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


COLUMNS: Sequence[Column] = (
    Column(
        "mass",
        "the router's probability for the chosen experts",
        lambda x: f"{x.captured_mass:.0%}",
        lambda activity: not activity.is_sigmoid,
    ),
    Column(
        "mass",
        "sum of the chosen experts' probabilities, each from 0 to 1",
        lambda x: f"{x.captured_mass:.2f}",
        lambda activity: activity.is_sigmoid,
    ),
    Column("even", "load entropy, 1 = all equally busy", lambda x: f"{x.load_entropy:.2f}"),
    Column(
        "shared",
        "the shared experts' share of all outputs",
        lambda x: _optional(x.shared_share, ".0%"),
        lambda activity: activity.shared_share is not None,
    ),
    Column(
        "gate",
        "the shared experts' gate",
        lambda x: _optional(x.shared_gate, ".0%"),
        lambda activity: activity.shared_gate is not None,
    ),
    Column("peak", "load of the busiest expert divided by the mean", lambda x: f"{x.load_peak:.1f}"),
    Column("unused", "experts that no token chose", lambda x: str(x.unused)),
    Column("nats", "entropy of the router", lambda x: _optional(x.router_entropy, ".2f")),
)
"""Narrow tables have only the first ones."""


def columns_of(activity: Activity) -> Sequence[Column]:
    """Return the columns that apply to a model."""
    return [column for column in COLUMNS if column.applies(activity)]


def busiest(layer: LayerActivity, n: int = N_BUSIEST) -> Text:
    """Return the most used experts with the shares of the tokens that chose them."""
    digits = len(str(len(layer.counts) - 1))
    parts = [
        Text.assemble(f"{expert:>{digits}}", (f" {share:4.0%}", "dim")) for expert, share in layer.busiest(n)
    ]
    return Text("  ").join(parts)


def layer_rows(activity: Activity) -> list[tuple[str, ...]]:
    """Return the table of layers as rows of text with a heading, for plain terminals."""
    columns = columns_of(activity)
    return [
        ("layer", *(column.heading for column in columns), "busiest"),
        *(
            (str(layer.layer), *(column.write(layer) for column in columns), busiest(layer).plain)
            if layer.tokens
            else (str(layer.layer), *("" for _ in columns), "no tokens")
            for layer in activity.layers
        ),
    ]


def legend(columns: Sequence[Column]) -> str:
    """Return the meanings of the columns as one sentence."""
    return "; ".join(f"{column.heading}: {column.meaning}" for column in columns)


def layer_table(activity: Activity, width: int, *, explained: bool = True) -> RenderableType:
    """Return a table with a line for each layer, and as many columns and experts as fit.

    If `explained`, the meanings of the columns follow.
    """
    expert = len(str(activity.n_routed_experts - 1)) + len(" 100%  ")
    room = width - _MARGINS
    known = columns_of(activity)
    columns = [
        column
        for number, column in enumerate(known, 1)
        if sum(map(_column_width, known[:number])) + 2 * expert <= room
    ] or [known[0]]
    n_busiest = max(1, min(8, (room + 2 - sum(map(_column_width, columns))) // expert))
    table = _table()
    table.add_column("layer", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    table.add_column("busiest", no_wrap=True)
    for layer in activity.layers:
        written = [column.write(layer) for column in columns] if layer.tokens else [""] * len(columns)
        table.add_row(str(layer.layer), *written, busiest(layer, n_busiest) if layer.tokens else "no tokens")
    return _explained(table, legend(columns)) if explained else table


def expert_table(parts: Mapping[str, LayerActivity], width: int) -> RenderableType:
    """Return a table of the most used experts of the first part with tokens, with a bar for each part."""
    seen = {name: layer for name, layer in parts.items() if layer.tokens}
    if not seen:
        return Text("no tokens yet", style="dim")
    wide = width >= _WIDE
    bar = max(4, min(24, (width - 10) // len(seen) - (14 if wide else 8)))
    table = _table()
    table.add_column("", justify="right", no_wrap=True)
    for name in seen:
        table.add_column(name, no_wrap=True)
        if wide:
            table.add_column("mass", justify="right", no_wrap=True)
    leading = next(iter(seen.values()))
    for expert, _ in leading.busiest(_N_SHOWN):
        cells: list[str] = []
        for layer in seen.values():
            share, count = layer.shares[expert], layer.counts[expert]
            cells.append(f"{'▇' * round(bar * share):<{bar}} {share:4.0%}")
            if wide:
                cells.append(f"{layer.mass[expert] / count:.2f}" if count else "")
        table.add_row(str(expert), *cells)
    notes = ["experts, by the share of the tokens that chose them"]
    notes += ["mass: the router's mean probability for tokens that chose them"] if wide else []
    n_more = len(leading.counts) - leading.unused - _N_SHOWN
    notes += [f"{n_more} more were chosen"] if n_more > 0 else []
    if leading.n_groups > 1:
        notes.append(f"choices by group: {', '.join(f'{share:.0%}' for share in leading.group_shares)}")
    return _explained(table, "; ".join(notes))


def expert_rows(parts: Mapping[str, LayerActivity]) -> list[tuple[str, ...]]:
    """Return the table of experts as rows of text with a heading, for plain terminals."""
    seen = {name: layer for name, layer in parts.items() if layer.tokens}
    if not seen:
        return [("no tokens yet",)]
    leading = next(iter(seen.values()))
    return [
        ("expert", *seen),
        *(
            (str(expert), *(f"{layer.shares[expert]:.0%}" for layer in seen.values()))
            for expert, _ in leading.busiest(_N_SHOWN)
        ),
    ]


def difference_table(differences: Sequence[Difference], names: tuple[str, str], width: int) -> RenderableType:
    """Return a table of the experts that two texts use most differently."""
    table = _table()
    for heading in ("layer", "expert"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", max_width=max(6, (width - 30) // 2), overflow="ellipsis")
    table.add_column("change", justify="right", no_wrap=True)
    for each in differences:
        table.add_row(
            str(each.layer),
            str(each.expert),
            f"{each.first:.0%}",
            f"{each.second:.0%}",
            f"{100 * (each.second - each.first):+.0f}",
        )
    return table


def _column_width(column: Column) -> int:
    return max(len(column.heading), len("100%")) + 2


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _explained(table: Table, text: str) -> RenderableType:
    return Group(table, Text(text, style="dim"))
