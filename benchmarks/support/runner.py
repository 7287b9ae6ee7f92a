"""Measures contenders side by side: rounds in alternating order, medians, ratios with a control, and bars."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

WARM_UP = 0
"""Rounds that count are numbered from 1. This one, and any before it, do not count."""
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


HEADS, SIDES = ("measure", "ours", "against", "theirs", "unit", "result", "bar", "", "note"), "lrlrlrlll"
"""The columns of a table of rows, and their sides."""
_HOLDS = {True: "met", False: "MISSED", None: ""}


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

    def cells(self) -> tuple[str, ...]:
        """For the table, under `HEADS`."""
        ratio = f"x {self.result:.3f}" + (" (no difference)" if self.is_none else "")
        return (
            self.measure,
            f"{self.ours:,.1f}",
            self.contender,
            f"{self.theirs:,.1f}",
            self.unit,
            f"{self.result:+.1f}" if self.is_difference else ratio,
            str(self.bar) if self.bar is not None else "",
            _HOLDS[self.passed] + (", uncertain" if self.is_uncertain else ""),
            self.note,
        )

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


def figure(value: object) -> str:
    """A figure as the progress on stderr shows it."""
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def in_turn(
    contenders: Mapping[str, Callable[[int], T]],
    rounds: int,
    control: str = "",
    *,
    n_warm_up: int = 1,
    told: Callable[[T], str] | None = figure,
) -> dict[str, list[T]]:
    """Measure every contender in every round, after warm-up rounds that do not count; `control` twice.

    A contender takes the number of the round. The order alternates from round to round, so that a slow drift
    of the machine favours nobody. `told` words a result for the progress on stderr; None for no progress.
    """
    if control:
        contenders = {**contenders, control + CONTROL: contenders[control]}
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(1 - n_warm_up, rounds + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            result = contenders[name](number)
            if told is not None:
                say(f"  {f'round {number}' if number > WARM_UP else 'warm-up'}: {name} {told(result)}")
            if number > WARM_UP:
                results[name].append(result)
    return results


def timed(work: Callable[[], object]) -> Callable[[int], float]:
    """A contender that takes the wall time of `work`, in seconds."""

    def seconds(_: int) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return seconds


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


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)
