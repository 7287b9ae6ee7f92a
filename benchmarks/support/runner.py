"""Measures contenders side by side: rounds in alternating order, medians, ratios with a control, and bars."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

T = TypeVar("T")

WARM_UP = 0
"""The number of the last warm-up round. Rounds that count are numbered from 1."""
CONTROL = ", again"
"""Follows the name of the contender that is measured twice in each round."""


def off_by(ratios: Iterable[float]) -> float:
    """Return the largest factor by which ratios of equal things differ from 1."""
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def is_difference(ratio: float, control: float) -> bool:
    """Return True if a ratio is outside the spread of the control, a factor from `off_by`."""
    return max(ratio, 1 / ratio) > control


@dataclass(frozen=True, slots=True)
class Bar:
    """The least value of a result, or the largest one."""

    value: float
    at_most: bool = False

    def holds(self, result: float) -> bool:
        """Return True if `result` meets the bar."""
        return result <= self.value if self.at_most else result >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}"


HEADS = ("measure", "ours", "against", "theirs", "unit", "result", "control", "bar", "", "note")
SIDES = "lrlrlrrlll"
"""The headings of a table of rows, and the alignment of its columns."""
_HOLDS = {True: "met", False: "MISSED", None: ""}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. `result` is ours / theirs; with `is_difference`, it is ours - theirs.

    `control` is the factor by which the method is off. `spread` is the range of the rounds, widened by it.
    """

    measure: str
    ours: float
    against: str
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
        """True if one end of the spread meets the bar and the other one misses it."""
        return self.bar is not None and len({self.bar.holds(end) for end in self.spread or ()}) == 2

    @property
    def is_none(self) -> bool:
        """True if the ratio is within the spread of the control."""
        return self.control > 1 and not is_difference(self.result, self.control)

    @property
    def passed(self) -> bool | None:
        """True if the bar is met; None without a bar."""
        return self.bar.holds(self.result) if self.bar is not None else None

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table under `HEADS`."""
        ratio = f"x {self.result:.3f}" + (" (no difference)" if self.is_none else "")
        return (
            self.measure,
            _rounded(self.ours),
            self.against,
            _rounded(self.theirs),
            self.unit,
            f"{self.result:+.1f}" if self.is_difference else ratio,
            f"{self.control:.2f}" if self.control > 1 else "",
            str(self.bar) if self.bar is not None else "",
            _HOLDS[self.passed] + (", uncertain" if self.is_uncertain else ""),
            self.note,
        )

    def as_json(self) -> dict[str, object]:
        """Return the row for `json.dumps`."""
        bar = None if self.bar is None else str(self.bar)
        return {**asdict(self), "bar": bar, "passed": self.passed, "uncertain": self.is_uncertain}


def _rounded(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"


def figure(value: object) -> str:
    """Return a result for the progress on stderr."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {figure(each)}" for name, each in value.items())
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
    """Return a row of medians. Its ratio is the median of the ratios of the rounds."""

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


def compare_all(rounds: Mapping[str, Sequence[Mapping[str, float]]], base: str) -> list[Row]:
    """Compare the contenders of `in_turn` with `base`, the control, in all that they measure.

    A contender returns numbers by what they are and, after a comma, their unit.
    """
    rows = []
    for label in rounds[base][0]:
        measure, _, unit = label.partition(", ")
        figures = {name: [each[label] for each in found] for name, found in rounds.items()}
        others = [name for name in rounds if name not in (base, base + CONTROL)]
        rows += [compare(f"{measure}, {name}", figures, name, base, unit=unit) for name in others]
    return rows


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)
