"""The bars of our recipes, and whether they are met. Takes figures; measures nothing.

A bar is compared with the ratio itself. The interval beside it shows how certain that is. For divergences it
is the 95% bootstrap interval over windows, with the same windows drawn for both sides; what another training
of the model would change is not in it. Both sides have embedding and output in Q8_0, because a small model
has a far larger share of its weights there than a 16B. For speeds the interval is from the lowest
round to the highest, widened by the control: the base timed against itself. A ratio within the spread of the
control is no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.support.quality.figures import Figures, Part, Reference, SpeedRow
from benchmarks.support.quality.variants import BASE, Variant
from benchmarks.support.runner import Bar, is_difference, off_by

_DRAWS, _SEED = 10_000, 0
_INTERVAL = (0.025, 0.975)
_LEAST_OF_TARGET = 0.99

SIZE, BYTES, PROMPT, DECODE = "size", "bytes per token", "prompt", "decode"
KL = "KL, same embedding and output"
AUTO = "auto"
REFERENCE_SIZE = "size of the reference"


def at_most(value: float) -> Bar:
    """Return the bar of a ratio that must not be larger."""
    return Bar(value, at_most=True)


BARS: Sequence[tuple[str, str, str, Bar]] = (
    (BASE, PROMPT, BASE, Bar(1.4)),
    (BASE, DECODE, BASE, Bar(0.97)),
    ("q4", SIZE, BASE, at_most(0.92)),
    ("q4", BYTES, BASE, at_most(0.96)),
    ("q4", PROMPT, BASE, Bar(1.5)),
    ("q4", DECODE, BASE, Bar(0.95)),
    ("q4", KL, BASE, at_most(0.65)),
    ("q4", REFERENCE_SIZE, BASE, at_most(1)),
    ("q4-fast", SIZE, BASE, at_most(0.87)),
    ("q4-fast", BYTES, BASE, at_most(0.90)),
    ("q4-fast", PROMPT, BASE, Bar(1.8)),
    ("q4-fast", DECODE, BASE, Bar(1)),
    ("q4-fast", KL, BASE, at_most(1.1)),
    ("q4-fast", REFERENCE_SIZE, BASE, at_most(1)),
    ("q4-small", SIZE, BASE, at_most(0.8)),
    ("q4-small", KL, "Q3_K_L", at_most(1)),
    ("q4-small", REFERENCE_SIZE, BASE, at_most(1)),
)
"""Recipe, measure, what it is compared with, and the bar, without an importance matrix and with one.
Size, bytes and speed are those of the 16B shape. Speeds are those with `--kernels auto`, against the base
repacked, as llama.cpp loads it.
"""
_SIZES: Mapping[str, tuple[str, str]] = {
    SIZE: ("sizes", "n_bytes"),
    BYTES: ("sizes", "n_bytes_per_token"),
    # The header, which holds the tokenizer, counts: it is what is on the disk.
    REFERENCE_SIZE: ("reference", "file_size"),
}
"""The part that has the size, and its field."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A ratio and its bar. `interval` is None for exact figures such as sizes. `control` is the factor by
    which the method is off.
    """

    recipe: str
    imatrix: bool
    measure: str
    against: str
    ratio: float
    bar: Bar
    interval: tuple[float, float] | None = None
    control: float = 1.0

    @property
    def is_difference(self) -> bool:
        """True if the ratio is further from 1 than that of two files with the same types."""
        return is_difference(self.ratio, self.control)

    @property
    def holds(self) -> bool:
        """True if the bar is met."""
        return self.bar.holds(self.ratio)

    @property
    def is_uncertain(self) -> bool:
        """True if part of the interval meets the bar and part of it misses it."""
        return len({self.bar.holds(end) for end in self.interval or ()}) == 2

    def as_json(self) -> dict[str, Any]:
        """Return it for `json.dumps`."""
        return {
            **asdict(self),
            "bar": str(self.bar),
            "holds": self.holds,
            "uncertain": self.is_uncertain,
            "difference": self.is_difference,
        }


def control_of(part: Part[SpeedRow], measure: str) -> float:
    """Return the factor by which speeds are off: the base's worst round against itself, both repacked."""
    control = next(row for row in part.rows if row.type == BASE and row.kernels != AUTO)
    return off_by(speed_ratios(control, measure))


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the ratio of two means over the same windows, and its 95% interval. ValueError if the numbers of
    windows differ.
    """
    a, b = np.array(ours), np.array(theirs)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} windows and {len(b)} are no pairs")
    random = np.random.default_rng(_SEED)
    drawn = random.integers(len(a), size=(_DRAWS, len(a)))
    ratios = a[drawn].sum(1) / b[drawn].sum(1)
    low, high = np.quantile(ratios, _INTERVAL).tolist()
    return float(a.sum() / b.sum()), (low, high)


def verdicts(figures: Figures) -> list[Verdict]:
    """Return the verdict on each bar, without an importance matrix and with one."""
    return [verdict_on(figures, *bar, imatrix=imatrix) for imatrix in (False, True) for bar in BARS]


def verdict_on(
    figures: Figures, recipe: str, measure: str, against: str, bar: Bar, *, imatrix: bool
) -> Verdict:
    """Compare a recipe with another type in one measure."""
    ours, theirs = Variant(recipe, imatrix), Variant(against, imatrix)
    compared = recipe, imatrix, measure, against
    if measure in (PROMPT, DECODE):
        timed = {(row.type, row.kernels): row for row in figures.speed.rows}
        ratios, control = speed_ratios(timed[recipe, AUTO], measure), control_of(figures.speed, measure)
        interval = min(ratios) / control, max(ratios) * control
        return Verdict(*compared, statistics.median(ratios), bar, interval, control=control)
    if measure in _SIZES:
        name, attribute = _SIZES[measure]
        part = getattr(figures, name)
        mine, other = part.row(ours), part.row(theirs)
        ratio = getattr(mine, attribute) / getattr(other, attribute)
        return Verdict(*compared, ratio, bar)
    mine, other = figures.reference.alike_row(ours), figures.reference.alike_row(theirs)
    ratio, interval = ratio_of(mine.windows, other.windows)
    return Verdict(*compared, ratio, bar, interval)


def speed_ratios(row: SpeedRow, measure: str) -> Sequence[float]:
    """Return the ratios to the base's speed, one for each round."""
    return row.prompt_ratio if measure == PROMPT else row.decode_ratio


def targets_hold(part: Reference) -> Sequence[tuple[float, bool]]:
    """Return, for each size asked for, the share of it that was used, and whether that is 99% to 100%."""
    shares = [row.file_size / row.budget for row in part.targets]
    return [(share, _LEAST_OF_TARGET <= share <= 1) for share in shares]
