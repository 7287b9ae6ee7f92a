"""Figures and how they are taken: contenders in turn, medians, a bar, a table. Knows no model."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

Measure = Callable[[int], float]
"""Takes the number of the round, which decides what text is used, and returns a figure."""

WARM_UP = 0  # the round that does not count
CONTROL = ", again"
"""Behind the name of the contender that is measured twice in each round."""


def off_by(ratios: Iterable[float]) -> float:
    """The factor by which a method is off, at least, by ratios of what is the same."""
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def is_difference(ratio: float, control: float) -> bool:
    """Whether a ratio is outside the spread of a method that is off by the factor `control`."""
    return not 1 / control <= ratio <= control


@dataclass(frozen=True, slots=True)
class Bar:
    """What a ratio is held against."""

    value: float
    at_most: bool = False

    def holds(self, ratio: float) -> bool:
        """Whether `ratio` is good enough."""
        return ratio <= self.value if self.at_most else ratio >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `result` is ours / theirs, or ours - theirs; no `bar`: for information. `spread`
    is from the least of the rounds to the greatest, further on both sides by `control`, the factor by which
    the method is off.
    """

    measure: str
    ours: float
    contender: str
    theirs: float
    result: float
    unit: str = "tokens/s"
    bar: Bar | None = None
    note: str = ""
    is_difference: bool = False
    spread: tuple[float, float] | None = None
    control: float = 1.0

    @property
    def is_uncertain(self) -> bool:
        """Whether the spread has both what would meet the bar and what would miss it."""
        return self.bar is not None and len({self.bar.holds(end) for end in self.spread or ()}) == 2

    @property
    def is_none(self) -> bool:
        """Whether the control shows as much: then it is no difference."""
        return self.control > 1 and not is_difference(self.result, self.control)

    @property
    def passed(self) -> bool | None:
        """None without a bar."""
        return self.bar.holds(self.result) if self.bar is not None else None

    def as_json(self) -> dict[str, object]:
        """For the line at the end."""
        return {
            "measure": self.measure,
            "ours": round(self.ours, 4),
            "against": self.contender,
            "theirs": round(self.theirs, 4),
            "unit": self.unit,
            "difference" if self.is_difference else "ratio": round(self.result, 4),
            "bar": str(self.bar) if self.bar is not None else None,
            "passed": self.passed,
            "uncertain": self.is_uncertain,
            "spread": self.spread and [round(end, 4) for end in self.spread],
            "control": round(self.control, 4),
            "note": self.note,
        }


def in_turn(contenders: Mapping[str, Measure], rounds: int, control: str = "") -> dict[str, list[float]]:
    """Measure everyone in every round, after a round that does not count; `control` twice.

    The order turns around from round to round, so that a slow drift of the machine favours nobody.
    """
    if control:
        contenders = {**contenders, control + CONTROL: contenders[control]}
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)[:: 1 if number % 2 else -1]
        for name in names:
            figure = contenders[name](number)
            say(f"  {'warm-up' if number == WARM_UP else f'round {number}'}: {name} {figure:,.2f}")
            if number != WARM_UP:
                figures[name].append(figure)
    return figures


def compare(
    measure: str,
    figures: Mapping[str, Sequence[float]],
    ours: str,
    theirs: str,
    *,
    bar: Bar | None = None,
    unit: str = "tokens/s",
    note: str = "",
) -> Row:
    """A row of medians. The ratio is the median of the rounds' own: both sides saw the same machine then."""

    def by_round(name: str) -> list[float]:
        return [a / b for a, b in zip(figures[name], figures[theirs], strict=True)]

    ratios = by_round(ours)
    control = off_by(by_round(theirs + CONTROL)) if theirs + CONTROL in figures else 1.0
    return Row(
        measure,
        statistics.median(figures[ours]),
        theirs,
        statistics.median(figures[theirs]),
        statistics.median(ratios),
        unit,
        bar,
        note,
        spread=(min(ratios) / control, max(ratios) * control),
        control=control,
    )


def _ratio(row: Row) -> str:
    return f"x {row.result:.3f}" + (" (no difference)" if row.is_none else "")


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(title: str, rows: Sequence[Row]) -> None:
    """The table on stdout."""
    table = Table(title=title, title_justify="left", title_style="", box=None)
    for heading in ("measure", "ours", "against", "theirs", "unit", "result", "bar", "", "note"):
        table.add_column(heading, justify="right" if heading in ("ours", "theirs", "result") else "left")
    words = {True: "met", False: "MISSED", None: ""}
    for row in rows:
        table.add_row(
            row.measure,
            f"{row.ours:,.1f}",
            row.contender,
            f"{row.theirs:,.1f}",
            row.unit,
            f"{row.result:+.1f}" if row.is_difference else _ratio(row),
            str(row.bar) if row.bar is not None else "",
            words[row.passed] + (", uncertain" if row.is_uncertain else ""),
            row.note,
        )
    # A file or a pipe has no width to fit into.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
