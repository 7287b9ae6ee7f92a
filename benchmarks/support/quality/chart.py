"""The chart of benchmarks/quality.py: bits per weight against divergence, on the trained reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.support.quality.figures import FidelityRow, Figures
from benchmarks.support.quality.variants import OURS

_MOST_BITS = 6.2
"""Types with more bits are listed below the chart. They would make it too wide."""
_KINDS: Mapping[str, tuple[str, str, str]] = {
    "stock": ("o", "#2f6fb7", "llama.cpp's types"),
    "ours": ("D", "#c2410c", "recipes of dsmoe-quantize"),
}
"""Marker, colour and legend of each kind of file."""
_FRONTIER = "#6b8e3d", "--target-bpw, for any size"
_CALIBRATED = "#7c3aed", "--calibrate (GPTQ), the same types"
_OFFSETS: Mapping[str, tuple[float, float, str]] = {
    "IQ4_NL": (0, -16, "center"),
    "Q4_0": (9, -4, "left"),
    "Q4_K_S": (0, 9, "center"),
    "IQ4_XS": (-9, -4, "right"),
    "Q5_K_M": (0, -16, "center"),
}
"""Offset in points, and alignment, of the labels that have no room at the right of their mark."""


def chart(figures: Figures) -> Figure:
    """Draw the chart."""
    part = figures.reference
    shown = [row for row in part.rows if row.bits_per_weight <= _MOST_BITS]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    _draw_frontier(axes, [row for row in part.frontier if row.bits_per_weight <= _MOST_BITS])
    marks = [(row.bits_per_weight, row.kl) for row in figures.calibrated.rows]
    axes.plot([bits for bits, _ in marks], [kl for _, kl in marks], "s", color=_CALIBRATED[0], markersize=5)
    for word in sorted(dict.fromkeys(row.type for row in shown), key=lambda word: _kind(word) == "ours"):
        _draw_type(axes, word, [row for row in shown if row.type == word])
    axes.set_title("What each type keeps for its size", loc="left", fontweight="bold")
    axes.set_xlabel("bits per weight\n" + _further([row for row in part.rows if row not in shown]))
    axes.set_ylabel("mean KL divergence from the unquantized model, nats")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(which="both", color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.06)
    axes.legend(handles=_legend(), frameon=False, fontsize=9)
    return figure


def save_chart(figures: Figures, path: Path) -> None:
    """Write the chart as SVG. The same figures give the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none", "font.family": "sans-serif"}):
        chart(figures).savefig(path, metadata={"Date": None, "Description": description(figures)})


def description(figures: Figures) -> str:
    """Return the figures of the chart in words, for readers who cannot see it."""
    words = {False: "without imatrix", True: "with imatrix"}
    part = figures.reference
    rows = [(words[row.imatrix], row) for row in (*part.rows, *part.frontier)]
    rows += [("calibrated", row) for row in figures.calibrated.rows]
    told = (f"{row.type} {how}: {row.bits_per_weight:.2f} bits, {row.kl:.2g}" for how, row in rows)
    return f"Bits per weight, and mean KL divergence in nats. {'; '.join(told)}."


def _kind(word: str) -> str:
    return "ours" if word in OURS else "stock"


def _draw_type(axes: Axes, word: str, rows: Sequence[FidelityRow]) -> None:
    """Draw a type without (hollow) and with an importance matrix, and label the latter."""
    kind = _kind(word)
    marker, colour, _ = _KINDS[kind]
    axes.plot([row.bits_per_weight for row in rows], [row.kl for row in rows], color=colour, alpha=0.5)
    for row in rows:
        face = colour if row.imatrix else "white"
        axes.plot(row.bits_per_weight, row.kl, marker, color=colour, markerfacecolor=face, zorder=3)
    last = max(rows, key=lambda row: row.imatrix)
    x, y, side = _OFFSETS.get(word, (9, -4, "left"))
    axes.annotate(
        word,
        (last.bits_per_weight, last.kl),
        (x, y),
        textcoords="offset points",
        ha=side,
        color=colour,
        fontsize=9,
        fontweight="bold" if kind == "ours" else "normal",
    )


def _draw_frontier(axes: Axes, rows: Iterable[FidelityRow]) -> None:
    for imatrix, style in ((False, "--"), (True, "-")):
        line = sorted((row.bits_per_weight, row.kl) for row in rows if row.imatrix is imatrix)
        axes.plot([bits for bits, _ in line], [kl for _, kl in line], style, color=_FRONTIER[0])


def _legend() -> list[Line2D]:
    marks = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, label=label)
        for marker, colour, label in _KINDS.values()
    ]
    hollow = Line2D([], [], linestyle="--", marker="o", color="#57606a", markerfacecolor="white")
    hollow.set_label("hollow, dashed: without imatrix")
    solved = Line2D([], [], color=_FRONTIER[0], label=_FRONTIER[1])
    calibrated = Line2D(
        [], [], linestyle="none", marker="s", markersize=5, color=_CALIBRATED[0], label=_CALIBRATED[1]
    )
    return [*marks, solved, calibrated, hollow]


def _further(rows: Iterable[FidelityRow]) -> str:
    """List the types that are not in the chart, without an importance matrix."""
    types: dict[str, list[str]] = {}
    for row in rows:
        if not row.imatrix:
            types.setdefault(f"{row.bits_per_weight:.2f} bits, {row.kl:.2g}", []).append(row.type)
    told = "; ".join(f"{' and '.join(words)}, {figures}" for figures, words in types.items())
    return f"Further right, without imatrix: {told}" if told else ""
